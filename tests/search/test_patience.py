"""When a search has won nothing for long enough."""

from dataclasses import replace

from evaluators.measurement import Measurement
from search.config.budget import Budget
from search.config.objectives import BEFORE, DEFAULT
from search.loop.patience import Patience
from search.results.evaluation import Evaluation
from search.results.pareto import Version
from spaces.candidate import Candidate


def measured(accuracy: float | None, latency: float, flops: float = 5e5) -> dict[str, Measurement]:
    values = {"latency": latency, "flops": flops} | ({} if accuracy is None else {"accuracy": accuracy})
    return {name: Measurement(name, value, "median", 1, 0.0, "here", "") for name, value in values.items()}


def version(*values: float | None) -> Version:
    return Version(0, Evaluation(Candidate({}, {}), measured(*values), "none", ""))


def test_trials_that_win_nothing_are_counted() -> None:
    stall = Patience(Budget.parse(["latency<5ms"]), measured(0.95, 0.01, 1e6), BEFORE)
    counts = []
    for each in (
        version(None, 0.009),  # the first miss
        version(None, 0.0095),
        version(None, 0.008),  # a nearer one
        None,  # failed
        version(0.9, 0.004),  # the first within the limit
        version(None, 0.0051),  # a nearer miss wins nothing any more
        version(0.89, 0.0045),  # dominated
        version(0.93, 0.0045),
    ):
        stall.count(each)
        counts.append(stall.trials)
    assert counts == [0, 1, 0, 1, 0, 1, 2, 0]


def test_a_version_that_was_not_scored_does_not_hide_how_near_others_come() -> None:
    stall = Patience(Budget.parse(["latency<5ms", "accuracy>90%"]), measured(0.95, 0.01, 1e6), BEFORE)
    counts = []
    for each in (
        version(None, 0.0051),  # its accuracy is not known
        version(0.5, 0.0045),  # the first that was measured on both
        version(0.7, 0.0045),  # a nearer one
        version(0.6, 0.0045),
    ):
        stall.count(each)
        counts.append(stall.trials)
    assert counts == [0, 0, 0, 1]


def test_fewer_flops_win_only_where_they_count() -> None:
    counts = {}
    for objectives in (BEFORE, DEFAULT):
        stall = Patience(Budget.parse(["latency<5ms"]), measured(0.95, 0.01, 1e6), objectives)
        stall.count(version(0.9, 0.004, 5e5))
        stall.count(version(0.9, 0.004, 2e5))
        counts[objectives] = stall.trials
    assert counts == {BEFORE: 0, DEFAULT: 1}


def test_a_hair_more_hypervolume_wins_nothing() -> None:
    stall = Patience(Budget.parse(["latency<5ms"]), measured(0.95, 0.01, 1e6), BEFORE)
    first = version(0.9, 0.004)
    stall.count(first)
    stall.count(replace(first, evaluation=version(0.900001, 0.004).evaluation))
    assert stall.trials == 1
