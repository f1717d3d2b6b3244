"""The MLflow run of a trial: metrics in practical units, and tags to filter by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from optuna.trial import FrozenTrial, TrialState

from evaluators.measurement import Measurement
from search.results.evaluation import Evaluation
from search.results.pareto import Version
from search.results.store import StoredSearch
from search.results.violations import broken_limits

SEARCH = "search"
ROLE = "role"
TRIAL = "trial"
FRONT = "front"
EFFORT = "effort"
NAME, NOTE = "mlflow.runName", "mlflow.note.content"
"""Tags; the last two are MLflow's own."""
_SCALES = {
    "latency_ms": ("latency", 1e3),
    "accuracy_pct": ("accuracy", 100.0),
    "size_mb": ("size", 1e-6),
    "params_k": ("params", 1e-3),
}


@dataclass(frozen=True)
class TrialContent:
    """The content of a trial's run.

    Args:
        name: of its run.
        tags: to filter by.
        metrics: in the units of their names.
        params: the sampler's choices.
        status: in MLflow's terms.
        begin: milliseconds since the epoch.
        end: milliseconds since the epoch; the timestamp of every metric, so that writing is idempotent.
    """

    name: str
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    params: Mapping[str, str]
    status: str
    begin: int
    end: int


T = TypeVar("T")


def chunks(items: Sequence[T], most: int) -> list[Sequence[T]]:
    """Returns the items in chunks of at most `most`."""
    return [items[start : start + most] for start in range(0, len(items), most)]


def run_name(number: int, on_front: bool) -> str:
    """Returns the name of a trial's run."""
    return f"trial {number} (front)" if on_front else f"trial {number}"


def trial_content(trial: FrozenTrial, search: StoredSearch) -> TrialContent:
    """Returns the content of the run of a finished trial."""
    dense = search.baseline.dense
    tags = {
        SEARCH: search.folder.name,
        ROLE: "trial",
        TRIAL: str(trial.number),
        "state": trial.state.name.lower(),
        "sampler": search.sampler_of(trial.number),
        FRONT: "false",
    }
    if "duplicate_of" in trial.user_attrs:
        tags["duplicate_of"] = str(trial.user_attrs["duplicate_of"])
    if reason := reason_of(trial, search):
        tags["reason"] = reason
    metrics: dict[str, float] = {}
    if "evaluation" in trial.user_attrs:
        evaluation = Evaluation.from_dict(trial.user_attrs["evaluation"])
        metrics = figures_and_margins(evaluation, search)
        is_feasible = not evaluation.ended and search.budget.is_met(evaluation.measurements, dense.measured)
        tags |= {"feasible": str(is_feasible).lower(), EFFORT: evaluation.effort}
    assert trial.datetime_complete is not None  # it is finished
    begin = trial.datetime_start or trial.datetime_complete
    return TrialContent(
        run_name(trial.number, False),
        tags,
        metrics,
        {name: str(value) for name, value in trial.params.items()},
        "FAILED" if trial.state == TrialState.FAIL else "FINISHED",
        int(begin.timestamp() * 1000),
        int(trial.datetime_complete.timestamp() * 1000),
    )


def reason_of(trial: FrozenTrial, search: StoredSearch) -> str:
    """Returns why a trial failed, or was not measured in full; empty if it was."""
    if "evaluation" not in trial.user_attrs:
        return str(trial.user_attrs.get("reason", ""))
    evaluation = Evaluation.from_dict(trial.user_attrs["evaluation"])
    if evaluation.ended:
        return f"ended early: {evaluation.ended}"
    if trial.state == TrialState.PRUNED:
        broken = broken_limits(Version(trial.number, evaluation), search.budget, search.baseline.dense.measured)
        return f"not measured further: {broken}"
    return str(trial.user_attrs.get("reason", ""))


def figures_and_margins(evaluation: Evaluation, search: StoredSearch) -> dict[str, float]:
    """Returns the metrics of an evaluation, and the margins to each limit."""
    return figures(evaluation, search.baseline.evaluation.measurements) | margins(evaluation, search)


def figures(evaluation: Evaluation, dense: Mapping[str, Measurement]) -> dict[str, float]:
    """Returns the metrics in the units of their names; some are relative to the dense network."""
    measured = evaluation.measurements
    figures = {name: measured[metric].value * scale for name, (metric, scale) in _SCALES.items() if metric in measured}
    if evaluation.ended:  # an estimate must not appear in charts of accuracies on all images
        figures["accuracy_estimate_pct"] = figures.pop("accuracy_pct")
    if "flops" in measured:
        figures["flops_pct_of_dense"] = measured["flops"].value / dense["flops"].value * 100
    if "latency" in measured:
        others = dict(measured["latency"].others)
        figures["longest_path_ms"] = others.pop("worst") * 1e3
        figures |= {f"{name}_wall_ms": value * 1e3 for name, value in others.items()}
        figures["speedup"] = dense["latency"].value / measured["latency"].value
    return {name: round(value, 4) for name, value in figures.items()}


def margins(evaluation: Evaluation, search: StoredSearch) -> dict[str, float]:
    """Returns the margin to each limit, in percent of it; negative if it is broken."""
    dense = search.baseline.evaluation.measurements
    return {
        f"margin_{constraint.name.replace('.', '_')}_pct": round(
            -100 * constraint.violation(measured, dense[constraint.measured_as]), 3
        )
        for constraint in search.budget.constraints
        if (measured := evaluation.measurements.get(constraint.measured_as))
        and not (evaluation.ended and constraint.measured_as == "accuracy")
    }
