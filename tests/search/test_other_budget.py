"""A search and another budget: what is taken over, what is known of it, what is not."""

import json
from dataclasses import replace

import numpy as np
import pytest
from optuna.trial import create_trial

from evaluators.exits.threshold_problem import ThresholdProblem
from evaluators.exits.threshold_solver import Cost
from search.cli import run
from search.commands.front import front_json
from search.config.budget import Budget
from search.loop.resume import TAKEN, is_counted
from search.report.caveats import caveats
from search.report.other_budget import other_budget_lines
from search.report.overview import Overview
from search.results.kept_answers import ANSWERS, PREDICTED
from search.results.pareto import Version
from search.results.store import PROCESSOR_SECONDS
from spaces.thresholds import Thresholds
from tests.helpers import tiny
from tests.helpers.searches import measurement, stored, version

WITHOUT_EXITS = tiny.STUDY.replace('after = ["pool"]', "after = []")


def test_another_budget_starts_from_what_was_measured_of_the_same_network(tmp_path, cache, capsys) -> None:
    file = tmp_path / "study.toml"
    file.write_text(WITHOUT_EXITS)
    command = ["--study", str(file), "--runs", str(tmp_path)]
    run([*command, "--search", "first", "--trials", "5", "--budget", "latency<1000%"])
    assert "Another budget" not in capsys.readouterr().out
    run([*command, "--search", "second", "--trials", "2", "--budget", "latency<500%,size<90%"])
    said = capsys.readouterr().out
    assert "Another budget is a new search, from trial 0: first searched the same within latency<1000%" in said
    assert "Measuring the network as it is" not in said
    first, second = stored(tmp_path, "first"), stored(tmp_path, "second")
    assert second.baseline == first.baseline
    taken = [trial for trial in second.trials if TAKEN in trial.user_attrs]
    known = {f"first:{each.number}": each.evaluation.to_dict() for each in first.versions}
    assert {trial.user_attrs[TAKEN]: trial.user_attrs["evaluation"] for trial in taken} == known
    assert f"so do {len(known)} of its versions" in said
    assert sum(is_counted(trial) for trial in second.trials) == 2
    for trial in taken:  # told to the sampler by the new limits
        assert set(trial.constraints) == {"latency<500%", "size<90%"}
        assert trial.user_attrs[PROCESSOR_SECONDS] == 0
    assert all(trial.user_attrs[PROCESSOR_SECONDS] > 0 for trial in first.trials if is_counted(trial))
    assert not {TAKEN} & {name for trial in first.trials for name in trial.user_attrs}


def test_another_study_or_the_same_budget_takes_nothing_over(folder, tmp_path, cache, capsys) -> None:
    other = tmp_path / "study.toml"
    other.write_text(
        WITHOUT_EXITS.replace(
            'data.source = "tests.helpers.tiny:splits"', 'data = {source = "tests.helpers.tiny:splits", seed = 1}'
        )
    )
    command = ["--study", str(other), "--runs", str(tmp_path), "--trials", "1"]
    run([*command, "--search", "first"])
    other.write_text(WITHOUT_EXITS)
    run([*command, "--search", "second", "--budget", "latency<500%"])
    assert "Another budget" not in capsys.readouterr().out
    run([*command, "--search", "third", "--budget", "latency<500%", "--seed", "1"])  # the same question once more
    assert "Another budget" not in capsys.readouterr().out


@pytest.fixture
def overview(folder) -> Overview:
    """Of a search within 5 ms that scored two versions, one with an exit, and ended three."""
    dense = version(-1, 0.9, 10e-3, 100)
    own = Budget.parse(["latency<5ms", "accuracy_drop<10%"])
    search = stored(folder)
    search = replace(search, study=search.study.model_copy(update={"budget": own}), trials=())
    scored = version(1, 0.85, 3e-3, 30)
    leaving = replace(scored.evaluation.candidate, thresholds=Thresholds({"exit1": 0.5}))
    solved = replace(scored.evaluation, candidate=leaving, exit_thresholds={"accuracy": 0.85})
    scored = replace(scored, evaluation=solved)
    early = version(4, 0.7, 4e-3, 40)
    bound = replace(early.measured["accuracy"], others={"high": 0.75})
    early = replace(
        early,
        evaluation=replace(early.evaluation, ended="at most 75%", measurements={**early.measured, "accuracy": bound}),
    )
    versions = (version(0, 0.88, 4e-3, 40), scored, unscored(2, 6e-3), unscored(3, 9e-3), early)
    return Overview(search, own, dense, versions, versions[:2], versions[:1], (dense,), ())


def unscored(number: int, latency: float) -> Version:
    """Returns a version that was ended when it broke a limit on latency."""
    whole = version(number, 0.1, latency, 10)
    return replace(
        whole, evaluation=replace(whole.evaluation, measurements={"latency": measurement("latency", latency)})
    )


def test_what_the_own_budget_ended_is_not_said_to_break_another(overview) -> None:
    assert other_budget_lines(overview) == []
    assert [each.number for each in overview.broken] == [2, 3]
    assert not overview.undecided
    wider = replace(
        overview, budget=Budget.parse(["latency<8ms"]), feasible=overview.versions[:2], front=overview.versions[:1]
    )
    assert [each.number for each in wider.broken] == [3]
    assert [each.number for each in wider.undecided] == [2, 4]
    told = caveats(wider)
    assert (
        told[0] == "1 of 5 versions does not keep latency<8ms; it was not measured further, so the accuracy is unknown."
    )
    assert told[1].startswith("2 versions were never scored: latency<5ms,accuracy_drop<10% ended them before")
    assert told[2].startswith("1 version has thresholds of exits that were solved for latency<5ms,accuracy_drop<10%")
    assert "A search with --budget 'latency<8ms' starts from what this one measured" in told[3]
    strict = replace(wider, budget=Budget.parse(["latency<8ms", "accuracy>80%"]))
    assert [each.number for each in strict.undecided] == [2]  # the other is known to be less accurate


def test_a_report_within_another_budget_has_a_name_of_its_own(folder, tmp_path, capsys) -> None:
    files = {}
    for budget in ([], ["--budget", "latency<900%"], ["--budget", "latency<9s,size<70%"]):
        assert run(["report", "--runs", str(folder), "--search", "one", "--json", *budget]) == 0
        (files[str(budget)],) = {file.rsplit(".", 1)[0] for file in json.loads(capsys.readouterr().out)["files"]}
    names = [name.rsplit("/", 1)[1] for name in files.values()]
    assert names == ["report", "report-latency-900pct", "report-latency-9s-size-70pct"]
    assert run(["front", "--runs", str(folder), "--search", "one", "--json", "--budget", "latency<900%"]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["solved_for"] == str(stored(folder).budget)


def problem() -> ThresholdProblem:
    """Returns the thresholds of one exit that is right about the images it is sure of; leaving there takes half."""
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.3, 1, 400)
    correct = np.stack([rng.uniform(size=400) < sure, rng.uniform(size=400) < 0.95], axis=1)
    confidences = np.stack([sure, np.full(400, 0.9)], axis=1).astype(np.float32)
    costs = {"latency": Cost([2e-3, 4e-3], [1e-4]), "flops": Cost([20.0, 40.0], [1.0])}
    return ThresholdProblem(confidences, correct, costs, None, 0.02, {"latency": 1.1})


def test_kept_answers_solve_for_another_limit_as_those_of_then() -> None:
    whole = problem()
    kept = ThresholdProblem.from_dict(json.loads(json.dumps(whole.to_dict())))
    for ceilings, floor in (({"latency": 3e-3}, None), ({"flops": 30.0}, None), ({}, 0.8), ({"latency": 3.5e-3}, 0.7)):
        solved = kept.within(ceilings, floor).solve()
        assert solved == whole.within(ceilings, floor).solve()
        for metric, ceiling in ceilings.items():
            assert solved.costs[metric] <= ceiling
        assert floor is None or solved.expected_accuracy >= floor


def test_thresholds_are_solved_again_for_another_budget(overview) -> None:
    kept, solved = problem(), problem().within({"latency": 3.9e-3}, None).solve()
    outcome = kept.outcome_of(solved.thresholds)
    scored = version(1, outcome.expected_accuracy, outcome.costs["latency"], 30)
    leaving = replace(scored.evaluation.candidate, thresholds=Thresholds({"exit1": solved.thresholds[0]}))
    evaluation = replace(scored.evaluation, candidate=leaving, exit_thresholds=solved.to_dict())
    answers = {"exits": ["exit1"], "thresholds": solved.thresholds, **kept.to_dict()}
    trial = create_trial(values=[0.9, 1e-3], user_attrs={ANSWERS: json.loads(json.dumps(answers))})
    trial.number = 1
    search = replace(overview.search, trials=(trial,), recovered={})
    budget = Budget.parse(["latency<2.8ms"])
    faster = replace(overview, search=search, budget=budget, versions=(Version(1, evaluation),), feasible=(), front=())
    (found,) = faster.predicted
    threshold = found.evaluation.candidate.thresholds.exits["exit1"]
    assert threshold < solved.thresholds[0]
    assert found.measured["latency"].value <= 2.8e-3
    assert found.measured["accuracy"].value == pytest.approx(kept.outcome_of([threshold]).expected_accuracy)
    assert found.measured["latency"].statistic == PREDICTED
    assert any("Solved again for latency<2.8ms" in line and "trial 1," in line for line in other_budget_lines(faster))
    assert front_json(faster)["predicted"][0]["trial"] == 1
    assert not replace(faster, budget=search.budget).predicted


def test_trials_keep_the_answers_that_solved_their_thresholds(folder) -> None:
    search = stored(folder)
    kept = [trial for trial in search.trials if ANSWERS in trial.user_attrs]
    solved = [trial for trial in search.trials if trial.user_attrs.get("evaluation", {}).get("gates")]
    assert [trial.number for trial in kept] == [trial.number for trial in solved]
    assert kept
    for trial in kept:
        answers = trial.user_attrs[ANSWERS]
        outcome = ThresholdProblem.from_dict(answers).outcome_of(answers["thresholds"])
        record = trial.user_attrs["evaluation"]["gates"]
        assert outcome.accuracy == pytest.approx(record["accuracy"])
        assert outcome.shares == pytest.approx(record["shares"])
