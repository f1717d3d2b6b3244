"""Early exits: cutting, gating and what they save."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from evaluators.artifact.build import ArtifactBuilder
from evaluators.data import LabelledImages
from evaluators.runtimes.ort import OnnxRuntime, load
from evaluators.runtimes.staged import StagedNetwork, largest_probability
from evaluators.subject import ask
from spaces.errors import StructureError
from spaces.network import ExitHead, ExitNetwork, feature_channels
from tests import tiny


def staged(builder, network, space, thresholds, precision="fp32"):
    values = space.uniform(1.0, precision, 1.0) | {
        f"threshold.exit{index + 1}": value for index, value in enumerate(thresholds)
    }
    candidate = space.candidate(values)
    artifact = builder.build(network, candidate)
    return artifact, StagedNetwork([load(stage, 1) for stage in artifact.deployed], artifact.thresholds)


def by_hand(network: ExitNetwork, images: torch.Tensor, thresholds: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Returns what the gates should answer, from all exits' logits at once."""
    with torch.no_grad():
        *exits, last = network(images)
    answer, left = last.clone(), torch.full((len(images),), len(thresholds))
    for index in reversed(range(len(thresholds))):
        fires = exits[index].softmax(1).max(1).values >= thresholds[index]
        answer[fires], left[fires] = exits[index][fires], index
    return answer.numpy(), left.numpy()


@pytest.mark.parametrize("thresholds", [[0.5, 0.5], [0.7, 0.55], [0.95, 0.6], [0.5, 0.95]])
def test_stages_answer_what_the_gates_say(thresholds, builder, network, space, images) -> None:
    _, run = staged(builder, network, space, thresholds)
    logits, left = run(images.numpy())
    expected, exits = by_hand(network, images, thresholds)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_array_equal(left, exits)


def test_an_exit_at_one_is_not_deployed(builder, network, space) -> None:
    assert len(staged(builder, network, space, [1.0, 1.0])[0].stages) == 1
    artifact, _ = staged(builder, network, space, [1.0, 0.8])
    assert artifact.exits == ("exit2",)
    assert len(artifact.stages) == 2
    assert b"exits.exit1" not in b"".join(artifact.stages)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_cutting_does_not_change_the_answer(precision, builder, network, space, images) -> None:
    whole = staged(builder, network, space, [1.0, 1.0], precision)[1]
    cut = staged(builder, network, space, [0.95, 0.95], precision)[1]
    never = StagedNetwork(cut.stages, [2.0, 2.0])
    np.testing.assert_allclose(
        never(images.numpy())[0], whole(images.numpy())[0], atol=1e-5 if precision == "fp32" else 0.2
    )


@settings(deadline=None)
@given(
    hnp.arrays(np.float32, (6, 4), elements=st.floats(-5, 5, width=32)),
    st.lists(st.floats(0.3, 1.0), min_size=0, max_size=2),
)
def test_survivors_go_on_and_every_input_is_answered_once(features: np.ndarray, thresholds: list[float]) -> None:
    seen: list[int] = []

    def stage(index: int, last: bool):
        def run(batch: np.ndarray) -> list[np.ndarray]:
            seen.append(len(batch))
            return [batch + index] if last else [batch, batch * (index + 1)]

        return run

    count = len(thresholds)
    network = StagedNetwork([stage(index, index == count) for index in range(count + 1)], thresholds)
    logits, left = network(features.copy())
    assert sorted(seen, reverse=True) == seen
    assert len(seen) <= count + 1
    for row, exit_index in enumerate(left):
        expected = features[row] + count if exit_index == count else features[row] * (exit_index + 1)
        np.testing.assert_allclose(logits[row], expected, rtol=1e-6)
        for earlier in range(exit_index):
            assert largest_probability(features[row : row + 1] * (earlier + 1))[0] < thresholds[earlier]


def test_thresholds_and_stages_have_to_fit() -> None:
    with pytest.raises(ValueError, match="one threshold per exit"):
        StagedNetwork([lambda batch: [batch]], [0.5])


def test_answers_know_who_got_how_far(builder, network, space, images) -> None:
    artifact, _ = staged(builder, network, space, [0.6, 0.6])
    opened = OnnxRuntime().open(artifact.deployed, artifact.thresholds, 1)
    answers = ask(opened, 3, LabelledImages(images.numpy(), np.zeros(len(images), np.int64)), batch=4)
    assert answers.reached[0] == 1.0
    assert list(answers.reached) == sorted(answers.reached, reverse=True)
    assert answers.reached[2] == pytest.approx(np.mean(answers.exits == 2))
    assert sum(count for _, count in answers.profiles) == 3
    assert len(answers.classes) == len(images)


def test_an_exit_inside_a_residual_block_is_refused(images) -> None:
    bypassed = ExitNetwork(tiny.randomized(), ["inner"], [ExitHead(24, 4, 2)]).eval()
    with pytest.raises(StructureError, match="one tensor separates the network in two"):
        ArtifactBuilder(bypassed, images.numpy(), OnnxRuntime())


def test_an_exit_needs_a_module_with_a_feature_map(image) -> None:
    with pytest.raises(StructureError, match="'nowhere'"):
        feature_channels(tiny.randomized(), ["nowhere"], image)
    with pytest.raises(StructureError, match="feature map"):
        feature_channels(tiny.randomized(), ["hidden"], image)


def test_deepcopies_capture_their_own_features(network, images) -> None:
    import copy

    twin = copy.deepcopy(network)
    with torch.no_grad():
        twin.trunk.stem[0].weight.mul_(2.0)
        assert not torch.allclose(twin(images)[0], network(images)[0])
