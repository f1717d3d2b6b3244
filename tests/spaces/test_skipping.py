"""Blocks that an input may pass by: found, gated, cut into files, and run."""

import base64
import copy
import io
import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.data import LabelledImages
from evaluators.deployed import predict
from evaluators.inference.staged import (
    StagedNetwork,
    Step,
    exits_of,
    from_json,
    longest,
    skipped_of,
    to_json,
)
from evaluators.runtimes.base import TargetError
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime, load
from evaluators.runtimes.remote.worker import Worker
from evaluators.runtimes.tensorrt_gpu.runtime import TensorRT
from evaluators.testing import BlockGateFileContract
from spaces.candidate import Candidate
from spaces.dynamic.block_gates import BLOCK_GATES
from spaces.dynamic.exit_network import ExitNetwork
from spaces.dynamic.skippable_blocks import check_blocks, find_blocks
from spaces.errors import StructureError
from spaces.joint import JointSpace
from spaces.precision import PrecisionSpace
from spaces.pruning.prunable import find_groups, halves
from spaces.pruning.slicing import sliced
from spaces.thresholds import Thresholds, ThresholdSpace
from tests.helpers import skippable, tiny
from tests.helpers.skippable import BLOCKS, SkippableNetwork
from tests.helpers.tiny import sparsity_space


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.zeros(1, 1, 8, 8)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=[(), ("second",), ("stem", "last"), ("down",)], ids=str)
def network(request) -> ExitNetwork:
    return skippable.gated(exits=request.param)


@pytest.fixture(scope="module")
def builder(network, pictures) -> ArtifactBuilder:
    return ArtifactBuilder(network, pictures.numpy(), OnnxRuntime())


def candidate(network, builder, skips: dict[str, float], exits: dict[str, float] | None = None, precision="fp32"):
    blocks = {block: skips.get(block) for block in network.skip_blocks}
    thresholds = Thresholds(dict.fromkeys(network.exit_names) | (exits or {}), blocks)
    return Candidate({}, dict.fromkeys(builder.layers, precision), thresholds)


def staged(builder, network, chosen) -> StagedNetwork:
    artifact = builder.build(network, chosen)
    return StagedNetwork([load(stage, 1) for stage in artifact.deployed], artifact.plan)


def in_torch(network: ExitNetwork, images: torch.Tensor, skips: dict[str, float]):
    """Returns the logits and, for each gated block, who runs it, for any thresholds."""
    runs: dict[str, torch.Tensor] = {}

    def decide(block: str, logits: torch.Tensor) -> torch.Tensor:
        runs[block] = logits >= skips.get(block, -np.inf)
        return runs[block].float()

    with torch.no_grad():
        _, logits = network.run_trunk(images, decide)
    return logits.numpy(), runs


def test_blocks_are_found_by_their_identity_shortcut(image) -> None:
    found = find_blocks(SkippableNetwork().eval(), image)
    assert found.gated == BLOCKS
    assert found.others == ("down",)
    assert "down always run" in str(found)


def test_a_network_without_identity_shortcuts_has_no_gates(image) -> None:
    plain = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    network = nn.Sequential(plain, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    assert find_blocks(network, image).gated == ()
    # Here the shortcut is there, but it is no module that could be skipped as a whole.
    assert find_blocks(tiny.randomized(), image).gated == ()


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "convnext_tiny"])
def test_blocks_of_known_networks(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    network = torchvision.models.get_model(name).eval()
    found = find_blocks(network, torch.randn(1, 3, 64, 64)).gated
    expected = {
        "mobilenet_v2": [3, 5, 6, 8, 9, 10, 12, 13, 15, 16],
        "resnet18": ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"],
        "convnext_tiny": [f"{stage}.{index}" for stage, n in ((1, 3), (3, 3), (5, 9), (7, 3)) for index in range(n)],
    }[name]
    assert [path.removeprefix("features.") for path in found] == [str(one) for one in expected]


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        (["down"], "maps"),
        (["nowhere"], "no module"),
        (["first.relu2"], "no weights"),
        (["first.conv2"], "does not reach"),
    ],
)
def test_what_cannot_be_skipped_is_refused(paths, reason, image) -> None:
    with pytest.raises(StructureError, match=reason):
        check_blocks(SkippableNetwork().eval(), image, paths)


def test_named_blocks_come_in_the_order_in_which_they_run(image) -> None:
    assert check_blocks(SkippableNetwork().eval(), image, ["last", "first"]).gated == ("first", "last")


def test_open_gates_are_the_plain_network_and_closed_ones_are_it_without_the_blocks(pictures) -> None:
    network = skippable.gated()
    with torch.no_grad():
        np.testing.assert_array_equal(in_torch(network, pictures, {})[0], network.trunk(pictures).numpy())
        without = copy.deepcopy(network.trunk)
        without.first = without.second = without.last = nn.Identity()
        closed, _ = in_torch(network, pictures, dict.fromkeys(BLOCKS, np.inf))
        np.testing.assert_array_equal(closed, without(pictures).numpy())


THRESHOLDS = [
    *(dict.fromkeys(some, 0.0) for count in (1, 2, 3) for some in itertools.combinations(BLOCKS, count)),
    dict.fromkeys(BLOCKS, 9.0),
    {"first": 9.0, "second": -0.5, "last": 0.5},
]


@pytest.mark.parametrize("skips", THRESHOLDS, ids=str)
@pytest.mark.parametrize("batch", [1, 7, 40])
def test_files_decide_and_answer_as_torch_does(skips, batch, network, builder, pictures) -> None:
    opened = OnnxRuntime()
    artifact = builder.build(network, candidate(network, builder, skips))
    logits, routes = opened.open(artifact.deployed, artifact.plan, 1).answer(pictures.numpy(), batch)
    expected, runs = in_torch(network, pictures, skips)
    assert artifact.blocks == tuple(block for block in BLOCKS if block in skips)
    np.testing.assert_array_equal(
        ~skipped_of(routes, len(skips)), np.column_stack([runs[block] for block in artifact.blocks])
    )
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_gates_are_of_different_minds() -> None:
    _, runs = in_torch(skippable.gated(), torch.randn(40, 1, 8, 8), dict.fromkeys(BLOCKS, 0.0))
    assert all(0 < each.float().mean() < 1 for each in runs.values())


@pytest.mark.parametrize("batch", [1, 7])
def test_exits_and_skips_go_together(batch, network, builder, pictures) -> None:
    with torch.no_grad():
        features, last = network.run_trunk(pictures)
        heads = [head(feature) for head, feature in zip(network.exits.values(), features, strict=True)]
    sure = [head.softmax(1).max(1).values for head in heads]
    exits = {name: float(each.median()) + 1e-4 for name, each in zip(network.exit_names, sure, strict=True)}
    artifact = builder.build(network, candidate(network, builder, dict.fromkeys(BLOCKS, 0.0), exits))
    logits, routes = OnnxRuntime().open(artifact.deployed, artifact.plan, 1).answer(pictures.numpy(), batch)
    for row, exit_index in enumerate(exits_of(routes)):
        found = [bool(each[row] >= exits[name]) for name, each in zip(network.exit_names, sure, strict=True)]
        assert exit_index == (found.index(True) if True in found else len(heads))
        np.testing.assert_allclose(logits[row], [*heads, last][exit_index][row].numpy(), atol=1e-4)
    assert len(set(exits_of(routes))) == len(heads) + 1


def test_without_gates_the_files_are_those_of_a_network_that_has_none(network, builder, pictures) -> None:
    bare = ExitNetwork(network.trunk, network.cut_points, list(network.exits.values())).eval()
    plain = ArtifactBuilder(bare, pictures.numpy(), OnnxRuntime())
    exits = dict.fromkeys(network.exit_names, 0.7)
    chosen = candidate(network, builder, {}, exits)
    ours, theirs = builder.build(network, chosen), plain.build(bare, Candidate({}, {}, Thresholds(exits)))
    images = pictures.numpy()
    assert len(ours.stages) == len(theirs.stages)
    for one, other in zip(ours.deployed[:1], theirs.deployed[:1], strict=True):
        for mine, its in zip(load(one, 1)(images), load(other, 1)(images), strict=True):
            np.testing.assert_array_equal(mine, its)
    assert b"skips." not in b"".join(ours.stages)


def test_a_skipped_block_is_a_file_that_is_not_run(pictures) -> None:
    network = skippable.gated()
    builder = ArtifactBuilder(network, pictures.numpy(), OnnxRuntime())
    artifact = builder.build(network, candidate(network, builder, dict.fromkeys(BLOCKS, 0.0)))
    seen: list[int] = []

    def counting(index: int, run):
        return lambda batch: (seen.append(index), run(batch))[1]

    runs = StagedNetwork(
        [counting(index, load(stage, 1)) for index, stage in enumerate(artifact.deployed)], artifact.plan
    )
    for picture in pictures.numpy():
        seen.clear()
        _, routes = runs(picture[None])
        ran = ~skipped_of(routes, 3)[0]
        bodies = [step.stage for step in artifact.plan if step.skip is not None]
        assert [body in seen for body in bodies] == list(ran)
        alone = {step.gate for step in artifact.plan} - {None}
        assert bool(alone & set(seen)) == (not ran[0])  # only who passed the first block by asks the second's gate


def test_the_longest_path_runs_every_block(network, builder, pictures) -> None:
    exits = dict.fromkeys(network.exit_names, 0.3)
    artifact = builder.build(network, candidate(network, builder, dict.fromkeys(BLOCKS, 3.0), exits))
    stages = [load(stage, 1) for stage in artifact.deployed]
    logits, routes = StagedNetwork(stages, longest(artifact.plan))(pictures.numpy())
    assert not skipped_of(routes, 3).any()
    assert set(exits_of(routes)) == {len(network.exit_names)}
    np.testing.assert_allclose(logits, in_torch(network, pictures, {})[0], atol=1e-4)


class TestAig(BlockGateFileContract):
    name = "aig"


class TestSkipNet(BlockGateFileContract):
    name = "skipnet"


def test_every_gate_keeps_the_contract() -> None:
    assert set(BLOCK_GATES) <= {subclass.name for subclass in BlockGateFileContract.__subclasses__()}


@pytest.mark.parametrize("kind", sorted(BLOCK_GATES))
def test_int8_files_stay_close_whoever_skips_what(kind, pictures) -> None:
    network = skippable.gated(kind=kind)
    builder = ArtifactBuilder(network, pictures.numpy(), OnnxRuntime())
    for skips in ({}, dict.fromkeys(BLOCKS, 9.0)):
        chosen = candidate(network, builder, skips, precision="int8")
        logits, _ = staged(builder, network, chosen)(pictures.numpy())
        expected, _ = in_torch(network, pictures, skips)
        assert np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("kind", sorted(BLOCK_GATES))
def test_slices_of_gated_networks_are_what_nothing_reads_the_dropped_channels_of(kind, pictures) -> None:
    network = skippable.gated(kind=kind)
    groups = find_groups(network, pictures[:1])
    assert not any(group.name.startswith("skips.") for group in (*groups.free, *groups.whole))
    stream = next(group for group in groups.free if group.name == "stem.0")
    readers = {member.path for member in stream.members if member.axis == "in"}
    assert all(any(path.startswith(f"skips.{block}.") for path in readers) for block in ("first", "second"))
    smaller = sliced(network, groups.free, halves(groups.free))
    builder = ArtifactBuilder(network, pictures.numpy(), OnnxRuntime())
    skips = dict.fromkeys(BLOCKS, 0.0)
    logits, routes = staged(builder, smaller, candidate(network, builder, skips))(pictures.numpy())
    expected, runs = in_torch(smaller, pictures, skips)
    np.testing.assert_array_equal(~skipped_of(routes, 3), np.column_stack([runs[block] for block in BLOCKS]))
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_a_board_is_told_the_steps(pictures, tmp_path) -> None:
    network = skippable.gated()
    builder = ArtifactBuilder(network, pictures.numpy(), OnnxRuntime())
    artifact = builder.build(network, candidate(network, builder, dict.fromkeys(BLOCKS, 0.0)))
    worker, images = Worker(OnnxRuntime(), tmp_path), io.BytesIO()
    np.save(images, pictures.numpy())

    def ask_worker(do: str, **content):
        return json.loads(json.dumps(worker.handle(json.loads(json.dumps({"id": 1, "do": do} | content)))))["ok"]

    def put(content: bytes) -> str:
        return ask_worker("put", data=base64.b64encode(content).decode())["digest"]

    stages = [put(stage) for stage in artifact.deployed]
    ask_worker("open", handle=1, stages=stages, plan=to_json(artifact.plan), threads=1)
    found = ask_worker("answer", handle=1, images=put(images.getvalue()), batch=7)
    _, routes = OnnxRuntime().open(artifact.deployed, artifact.plan, 1).answer(pictures.numpy(), 7)
    assert found["routes"] == routes.tolist()


def test_engines_refuse_steps() -> None:
    with pytest.raises(TargetError, match="blocks are skipped on a CPU"):
        TensorRT().open([b"", b""], (Step(0), Step(1, skip=0.0)), 1)


def test_steps_come_back_from_json() -> None:
    plan = (Step(0), Step(2, skip=0.5, gate=1), Step(3, exit=0.9, keeps=True), Step(4))
    assert from_json(to_json(plan)) == plan
    assert from_json(to_json((0.5, 0.75))) == (0.5, 0.75)


def test_the_space_offers_a_threshold_for_each_gate(pictures) -> None:
    network = skippable.gated(exits=("second",))
    builder = ArtifactBuilder(network, pictures.numpy(), OnnxRuntime())
    groups = find_groups(network, pictures[:1]).free
    space = JointSpace(
        sparsity_space(network, groups, step=4, minimum=0.25),
        PrecisionSpace(builder.layers, ("fp32", "int8")),
        ThresholdSpace(network.exit_names, 0.5, 0.05, skips=network.skip_blocks),
    )
    dense = space.dense()
    assert dense.active_skips == {}
    assert dense.active_exits == ()
    everywhere = space.candidate(space.uniform(1.0, "int8", 0.9))
    assert everywhere.active_skips == dict.fromkeys(BLOCKS, 0.0)
    assert everywhere.precision["skips.first.reduce"] == "int8"
    idle = space.candidate(space.uniform(1.0, "int8", 0.9) | {"threshold.skip.first": -4.0})
    assert list(idle.active_skips) == ["second", "last"]
    assert idle.precision["skips.first.reduce"] == "fp32"
    assert Candidate.from_dict(idle.to_dict()) == idle


def test_ways_are_counted_and_many_of_them_stand_for_equal_shares(pictures) -> None:
    class Session:
        def answer(self, images, batch):
            routes = np.random.default_rng(0).integers(0, 2**6, len(images)) << 8
            return np.zeros((len(images), 4), np.float32), routes

    many = LabelledImages(np.zeros((400, 1, 1, 1), np.float32), np.zeros(400, np.int64))
    answers = predict(Session(), 1, many, 1, blocks=6)
    assert answers.path_count == 64
    assert len(answers.profiles) == 24
    assert sum(count for _, count in answers.profiles) == 400
    passed = answers.skipped.sum(axis=1)
    estimate = sum(passed[start] * count for start, count in answers.profiles) / 400
    assert estimate == pytest.approx(passed.mean(), abs=0.1)
