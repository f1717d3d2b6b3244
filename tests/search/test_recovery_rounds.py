"""How the time after a search is shared out: first rounds for all, then where the forecast wins most per second."""

import pytest

from evaluators.measurement import Measurement
from search.config.objectives import Objectives
from search.config.study import FinalSection, FinetuneSection
from search.loop.recovery_rounds import PAYS, next_training
from search.results.evaluation import Evaluation
from search.results.pareto import Version, most_promising
from search.results.rounds import Round, decay, forecast
from spaces.candidate import Candidate


def _version(
    number: int, accuracy: float, trained: FinetuneSection | None = None, seconds: float | None = None
) -> Version:
    values = {"accuracy": accuracy, "latency": accuracy / 100 if seconds is None else seconds}
    measured = {metric: Measurement(metric, value, "mean", 100, 0.01, "", "") for metric, value in values.items()}
    settings = trained.model_dump() if trained else None
    return Version(number, Evaluation(Candidate({}, {}), measured, "elastic", "", finetune=settings))


def _rounds(*accuracies: float, first_s: float = 30.0) -> list[Round]:
    return [Round(accuracy, 0, first_s * (2**index - 1)) for index, accuracy in enumerate(accuracies)]


OBJECTIVES: Objectives = ("accuracy", "latency")
SHARED = FinalSection(of_search=0.5, versions=3)


def test_a_third_of_the_time_goes_to_first_rounds() -> None:
    front = [_version(number, 0.9 - number / 100) for number in range(5)]
    training = next_training(front, {}, SHARED, 1200.0, OBJECTIVES)
    assert training.version.number == 0
    assert training.settings.minutes == pytest.approx(600 / 3 / 3 / 60, rel=0.05)
    assert training.settings.rounds == 1
    # Two had theirs: one more may begin, and not a fourth.
    rounds = {0: _rounds(0.9, 0.9), 1: _rounds(0.89, 0.89)}
    assert next_training(front, rounds, SHARED, 1200.0, OBJECTIVES).version.number == 2
    assert next_training(front, {**rounds, 2: _rounds(0.88, 0.88)}, SHARED, 1200.0, OBJECTIVES) is None


def test_further_rounds_go_where_most_is_won_per_second() -> None:
    once = FinetuneSection(minutes=0.5)
    front = [_version(1, 0.905, once), _version(2, 0.85, once)]
    rounds = {1: _rounds(0.90, 0.905), 2: _rounds(0.80, 0.85)}
    training = next_training(front, rounds, SHARED.model_copy(update={"versions": 2}), 2000.0, OBJECTIVES)
    assert training.version.number == 2
    assert training.settings == once.model_copy(update={"rounds": 2})
    assert training.gain == pytest.approx(forecast(rounds[2], decay(rounds)))
    assert [each.minutes for each in training.settings.each_round()] == [0.5, 1.0]


def test_a_version_that_another_would_still_beat_is_done() -> None:
    once = FinetuneSection(minutes=0.5)
    slow = _version(2, 0.85, once, seconds=1.0)
    rounds = {2: _rounds(0.80, 0.85)}
    final = FinalSection(of_search=5, versions=1)
    assert next_training([_version(1, 0.95), slow], rounds, final, 2000.0, OBJECTIVES) is None
    assert next_training([_version(1, 0.86), slow], rounds, final, 2000.0, OBJECTIVES) is not None


def test_the_most_promising_versions_are_whole_fronts_and_some_of_the_next() -> None:
    first = [_version(number, 0.9 - number / 10) for number in range(2)]
    second = [_version(number, 0.9 - number / 10, seconds=1 - number / 100) for number in range(2, 8)]
    chosen = most_promising([*second, *first], OBJECTIVES, 4)
    assert [version.number for version in chosen] == [0, 1, 2, 7]
    assert len(most_promising([*second, *first], OBJECTIVES, 20)) == 8


def test_it_ends_where_nothing_more_is_won() -> None:
    front = [_version(1, 0.9, FinetuneSection(minutes=0.5))]
    final = FinalSection(of_search=5, versions=1)
    assert next_training(front, {1: _rounds(0.90 - PAYS, 0.90)}, final, 2000.0, OBJECTIVES) is None
    assert next_training(front, {1: _rounds(0.90, 0.89)}, final, 2000.0, OBJECTIVES) is None
    assert next_training(front, {1: _rounds(0.80, 0.90)}, final, 2000.0, OBJECTIVES) is not None


def test_it_ends_where_the_next_round_takes_longer_than_what_is_left() -> None:
    front = [_version(1, 0.9, FinetuneSection(minutes=0.5))]
    rounds = {1: _rounds(0.80, 0.90)}  # 30 s are spent; the next round takes 60
    final = FinalSection(of_search=1, versions=1)
    assert next_training(front, rounds, final, 89.0, OBJECTIVES) is None
    assert next_training(front, rounds, final, 91.0, OBJECTIVES) is not None


def test_the_forecast_follows_the_gains_so_far() -> None:
    halves = {1: _rounds(0.5, 0.7, 0.8, 0.85), 2: _rounds(0.6, 0.8, 0.9)}
    assert decay(halves) == pytest.approx(0.5)
    assert decay({1: _rounds(0.5, 0.7, 0.7)}) < 0.05
    assert decay({1: _rounds(0.5, 0.6, 0.9)}) == 1.0  # a round wins no more than the one before
    assert decay({}) == 0.5
    assert forecast(halves[1], 0.5) == pytest.approx(0.025)


def test_with_a_length_of_its_own_each_version_is_trained_once() -> None:
    final = FinalSection(epochs=2, versions=2)
    front = [_version(number, 0.9) for number in range(3)]
    training = next_training(front, {}, final, 0.0, OBJECTIVES)
    assert (training.version.number, training.settings.epochs, training.settings.rounds) == (0, 2, 1)
    assert next_training(front, {0: _rounds(0.9, 0.91), 1: _rounds(0.9, 0.89)}, final, 0.0, OBJECTIVES) is None


def test_no_version_is_trained_where_none_shall_be() -> None:
    assert next_training([_version(0, 0.9)], {}, FinalSection(versions=0), 100.0, OBJECTIVES) is None


def test_rounds_are_no_part_of_a_key_unless_there_are_several() -> None:
    assert "rounds" not in FinetuneSection().model_dump_json()
    assert "of_search" not in FinalSection(epochs=1).model_dump_json()
    assert FinetuneSection.model_validate_json(FinetuneSection(rounds=3).model_dump_json()).rounds == 3
