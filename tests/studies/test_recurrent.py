"""Recurrent networks that skip updates: the cells' formulas, their training, and the loop that is deployed."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from evaluators.data import LabelledImages
from evaluators.runtimes.paired_timing import TimingProtocol
from search.config.sections import FittingSection
from search.training.loop import TrainingBatches
from studies.digits.data import splits
from studies.recurrent.gru import GruClassifier
from studies.recurrent.loops import EveryStep, PredictedLoop, SkipLoop, steps_to_skip
from studies.recurrent.measuring import load_file, skimming, time_beside
from studies.recurrent.onnx_files import head_file, predictor_file, skip_step_file, step_file, whole_file
from studies.recurrent.skip_predictor import SkipPredictor, skimmed
from studies.recurrent.skip_rnn import SkipGruClassifier, straight_through_round
from studies.recurrent.training import same_answer, small_move, train_classifier, train_predictor, train_skipping

FEATURES, HIDDEN, CLASSES, STEPS = 8, 12, 10, 8


def in_steps(images: torch.Tensor) -> torch.Tensor:
    return images.reshape(len(images), STEPS, FEATURES)


def as_read(sequences: torch.Tensor) -> np.ndarray:
    return sequences.numpy()[:, :, None, :]


@pytest.fixture(scope="module")
def digits() -> LabelledImages:
    return splits(8).train.head(200)


@pytest.fixture(scope="module")
def sequences(digits) -> torch.Tensor:
    return in_steps(torch.from_numpy(digits.images[:]))


@pytest.fixture(scope="module")
def plain(digits) -> GruClassifier:
    torch.manual_seed(0)
    network = GruClassifier(FEATURES, HIDDEN, CLASSES)
    chosen = FittingSection(epochs=15, batch=50, learning_rate=0.3, clip=1.0)
    train_classifier(network, in_steps, TrainingBatches(digits, 50, 0), chosen)
    return network


@pytest.fixture(scope="module")
def skipping(plain) -> SkipGruClassifier:
    """Returns an untrained Skip RNN whose increments lie on both sides of a half and of a quarter."""
    torch.manual_seed(1)
    network = SkipGruClassifier(plain)
    nn.init.normal_(network.skip.due.weight, std=1.0)
    nn.init.constant_(network.skip.due.bias, -0.8)
    return network


@pytest.fixture(scope="module")
def predictor(plain, sequences) -> SkipPredictor:
    return train_predictor(plain, "move", sequences, seed=0)


class Counting:
    """A file that counts how often it is run."""

    def __init__(self, model: bytes) -> None:
        self.file, self.calls = load_file(model, 1), 0

    def __call__(self, *inputs):
        self.calls += 1
        return self.file(*inputs)


def transcribed(network: SkipGruClassifier, sequence: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Returns the logits of one sequence and its updates, by the published recurrence, number by number."""
    cell, due = network.skip.cell, network.skip.due
    w_ih, w_hh, b_ih, b_hh = (each.detach().double().numpy() for each in cell.parameters())
    state, cumulated, increment, updates = np.zeros(HIDDEN), 0.0, 1.0, []
    for inputs in sequence:
        cumulated = cumulated + min(increment, 1 - cumulated)
        update = 1 if cumulated > 0.5 else 0
        of_inputs, of_state = np.split(w_ih @ inputs + b_ih, 3), np.split(w_hh @ state + b_hh, 3)
        reset, keep = (1 / (1 + np.exp(-(of_inputs[gate] + of_state[gate]))) for gate in (0, 1))
        renewed = (1 - keep) * np.tanh(of_inputs[2] + reset * of_state[2]) + keep * state
        logit = float(due.weight.detach().double().numpy()[0] @ renewed) + due.bias.item()
        state = update * renewed + (1 - update) * state
        increment = update / (1 + math.exp(-logit)) + (1 - update) * increment
        cumulated = 0.0 if update else cumulated
        updates.append(update)
    return network.head.weight.detach().numpy() @ state + network.head.bias.detach().numpy(), updates


def test_the_cell_is_the_published_recurrence(skipping, sequences) -> None:
    with torch.no_grad():
        found = skipping(sequences[:40])
    assert 0.2 < found.updates.mean() < 0.9
    for sequence, logits, updates in zip(sequences[:40].numpy(), found.logits, found.updates, strict=True):
        expected, decided = transcribed(skipping, sequence)
        assert updates.tolist() == decided
        np.testing.assert_allclose(logits.numpy(), expected, atol=1e-4)


def test_a_new_skip_rnn_updates_at_every_step_and_answers_as_the_plain_network(plain, sequences) -> None:
    network = SkipGruClassifier(plain)
    nn.init.zeros_(network.skip.due.weight)
    with torch.no_grad():
        found = network(sequences)
        assert bool(found.updates.all())
        torch.testing.assert_close(found.logits, plain(sequences))


@given(st.floats(0, 1, width=32))
def test_rounding_is_exact_and_has_the_gradient_of_the_identity(probability) -> None:
    given_one = torch.tensor([probability], requires_grad=True)
    rounded = straight_through_round(given_one)
    rounded.sum().backward()
    assert rounded.item() == float(probability > 0.5)
    assert given_one.grad.item() == 1.0


def test_gradients_reach_the_gate_from_the_answer_and_from_the_cost_of_updates(plain, skipping, sequences) -> None:
    for loss in (lambda found: found.logits.square().sum(), lambda found: found.updates.sum()):
        skipping.zero_grad()
        loss(skipping(sequences[:50])).backward()
        assert skipping.skip.due.weight.grad.abs().sum() > 0
        assert skipping.skip.due.bias.grad.abs().sum() > 0


def test_a_cost_of_updates_leads_to_fewer_of_them(plain, digits, sequences) -> None:
    chosen, shares = FittingSection(epochs=10, batch=50, learning_rate=0.1, clip=1.0), []
    for cost in (0.0, 0.5):
        torch.manual_seed(0)
        network = SkipGruClassifier(plain)
        train_skipping(network, plain, cost, in_steps, TrainingBatches(digits, 50, 0), chosen)
        with torch.no_grad():
            shares.append(float(network(sequences).updates.mean()))
    assert shares[1] < shares[0] - 0.2


@given(st.floats(2**-12, 1, width=32), st.integers(1, 80))
def test_how_many_steps_are_skipped_is_known_at_the_update(increment, steps) -> None:
    cumulated, count, one = torch.tensor(0.0), 0, torch.tensor(increment)
    for _ in range(steps):
        cumulated = cumulated + torch.minimum(one, 1 - cumulated)
        if torch.round(cumulated) == 1:
            break
        count += 1
    assert steps_to_skip(increment, steps) == count
    assert count == pytest.approx(min(math.ceil(0.5 / increment - 1), steps), abs=1)


def test_the_deployed_skip_rnn_decides_and_answers_as_torch_does(skipping, sequences) -> None:
    loop = SkipLoop(load_file(skip_step_file(skipping), 1), load_file(head_file(skipping.head), 1), HIDDEN)
    with torch.no_grad():
        found = skipping(sequences)
    for sequence, logits, updates in zip(as_read(sequences), found.logits, found.updates, strict=True):
        read = loop(sequence)
        np.testing.assert_array_equal(read.updates, updates.numpy().astype(bool))
        np.testing.assert_allclose(read.logits, logits.numpy(), atol=1e-4)


def test_a_skipped_step_runs_nothing(skipping, sequences) -> None:
    step, head = Counting(skip_step_file(skipping)), Counting(head_file(skipping.head))
    loop = SkipLoop(step, head, HIDDEN)
    updates = sum(int(loop(sequence).updates.sum()) for sequence in as_read(sequences))
    assert step.calls == updates < len(sequences) * STEPS
    assert head.calls == len(sequences)


def test_the_loop_of_every_step_and_the_whole_file_answer_as_torch_does(plain, sequences) -> None:
    loop = EveryStep(load_file(step_file(plain.cell), 1), load_file(head_file(plain.head), 1), HIDDEN)
    whole = load_file(whole_file(plain, STEPS), 1)
    with torch.no_grad():
        expected = plain(sequences).numpy()
    for sequence, logits in zip(as_read(sequences[:50]), expected, strict=False):
        np.testing.assert_allclose(loop(sequence).logits, logits, atol=1e-5)
        np.testing.assert_allclose(whole(sequence)[0].reshape(-1), logits, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_the_deployed_predictor_decides_and_answers_as_torch_does(threshold, plain, predictor, sequences) -> None:
    step, asked = Counting(step_file(plain.cell)), Counting(predictor_file(predictor, plain.cell))
    loop = PredictedLoop(step, load_file(head_file(plain.head), 1), asked, HIDDEN, threshold)
    with torch.no_grad():
        found = skimmed(plain, predictor, threshold, sequences)
    read = [loop(sequence) for sequence in as_read(sequences)]
    same = [np.array_equal(one.updates, updates) for one, updates in zip(read, found.updates.numpy(), strict=True)]
    assert np.mean(same) >= 0.995  # a probability may lie at the threshold
    for one, logits, is_same in zip(read, found.logits.numpy(), same, strict=True):
        if is_same:
            np.testing.assert_allclose(one.logits, logits, atol=1e-4)
    updates = int(sum(one.updates.sum() for one in read))
    assert 0 < updates < len(sequences) * STEPS
    assert step.calls == updates
    assert asked.calls == len(sequences) * STEPS


def test_a_threshold_of_one_skips_nothing_and_one_below_zero_everything(plain, predictor, sequences) -> None:
    with torch.no_grad():
        nothing = skimmed(plain, predictor, 1.0, sequences)
        everything = skimmed(plain, predictor, -1.0, sequences)
        torch.testing.assert_close(nothing.logits, plain(sequences))
    assert bool(nothing.updates.all())
    assert not bool(everything.updates.any())
    torch.testing.assert_close(everything.logits, plain.head.bias.detach().expand(len(sequences), -1))


def test_labels_say_what_one_skipped_update_does(plain, sequences) -> None:
    few = sequences[:20]
    with torch.no_grad():
        states = plain.states(few)
        answers, moves = same_answer(plain, few, states), small_move(plain, few, states)
        for skipped in range(STEPS):
            left = torch.cat([few[:, :skipped], few[:, skipped + 1 :]], dim=1)
            torch.testing.assert_close(answers[:, skipped], plain(left).argmax(1) == plain(few).argmax(1))
    assert float(moves.float().mean()) == pytest.approx(0.25, abs=0.01)
    moved = (states[:, 1:] - states[:, :-1]).norm(dim=2)
    assert moved[moves].max() <= moved[~moves].min() + 1e-6


def test_a_predictor_leaves_the_network_as_it_is_and_repeats(plain, predictor, sequences) -> None:
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    again = train_predictor(plain, "move", sequences, seed=0)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, before[name])
    for one, other in zip(predictor.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 40))
def test_skimming_counts_answers_and_updates(skipping, sequences, digits, count) -> None:
    loop = SkipLoop(load_file(skip_step_file(skipping), 1), load_file(head_file(skipping.head), 1), HIDDEN)
    found = skimming(loop, as_read(sequences[:count]), digits.labels[:count])
    with torch.no_grad():
        expected = skipping(sequences[:count])
    assert found.updated == pytest.approx(float(expected.updates.mean()))
    right = expected.logits.argmax(1).numpy() == digits.labels[:count]
    assert found.accuracy == pytest.approx(right.mean())


def test_every_number_of_updates_is_timed_as_often_as_it_occurs(skipping, sequences) -> None:
    loop = SkipLoop(load_file(skip_step_file(skipping), 1), load_file(head_file(skipping.head), 1), HIDDEN)
    read = as_read(sequences[:60])
    timing = time_beside(loop, loop, read, TimingProtocol(turns=2, limit_s=0.1))
    _, counts = np.unique([loop(sequence).updates.sum() for sequence in read], return_counts=True)
    assert timing.shares == pytest.approx(counts / 60)
    assert timing.ratio > 0
