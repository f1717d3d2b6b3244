"""What MLflow is told about a trial: figures in people's units, and tags to filter by."""

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
"""Tags, the last two being MLflow's own."""
_SCALES = {
    "latency_ms": ("latency", 1e3),
    "accuracy_pct": ("accuracy", 100.0),
    "size_mb": ("size", 1e-6),
    "params_k": ("params", 1e-3),
}


@dataclass(frozen=True)
class Logged:
    """One trial, as MLflow keeps it.

    Args:
        name: of its run.
        tags: to filter by.
        metrics: in the units of their names.
        params: what the sampler chose.
        status: MLflow's word for how it ended.
        begin: milliseconds since 1970.
        end: the same; every metric has this time, so that writing twice changes nothing.
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
    """Returns the items in parts of `most` at most."""
    return [items[start : start + most] for start in range(0, len(items), most)]


def run_name(number: int, on_front: bool) -> str:
    """Returns the name of a trial's run."""
    return f"trial {number} (front)" if on_front else f"trial {number}"


def logged(trial: FrozenTrial, search: StoredSearch) -> Logged:
    """Returns what MLflow is told about a finished trial of a search."""
    dense = search.baseline.dense
    tags = {
        SEARCH: search.folder.name,
        ROLE: "trial",
        TRIAL: str(trial.number),
        "state": trial.state.name.lower(),
        "sampler": search.sampler_of(trial.number),
        FRONT: "false",
    }
    tags |= {name: str(trial.user_attrs[name]) for name in ("reason", "duplicate_of") if name in trial.user_attrs}
    metrics: dict[str, float] = {}
    if "evaluation" in trial.user_attrs:
        evaluation = Evaluation.from_dict(trial.user_attrs["evaluation"])
        metrics = figures_and_margins(evaluation, search)
        met = not evaluation.ended and search.budget.is_met(evaluation.measurements, dense.measured)
        tags |= {"feasible": str(met).lower(), EFFORT: evaluation.effort}
        if evaluation.ended:
            tags["reason"] = f"ended early: {evaluation.ended}"
        elif trial.state == TrialState.PRUNED:
            broken = broken_limits(Version(trial.number, evaluation), search.budget, dense.measured)
            tags["reason"] = f"not measured further: {broken}"
    assert trial.datetime_complete is not None  # it is finished
    begin = trial.datetime_start or trial.datetime_complete
    return Logged(
        run_name(trial.number, False),
        tags,
        metrics,
        {name: str(value) for name, value in trial.params.items()},
        "FAILED" if trial.state == TrialState.FAIL else "FINISHED",
        int(begin.timestamp() * 1000),
        int(trial.datetime_complete.timestamp() * 1000),
    )


def figures_and_margins(evaluation: Evaluation, search: StoredSearch) -> dict[str, float]:
    """Returns what was measured, in the units that people read, and how far each limit is kept."""
    return figures(evaluation, search.baseline.evaluation.measurements) | margins(evaluation, search)


def figures(evaluation: Evaluation, dense: Mapping[str, Measurement]) -> dict[str, float]:
    """Returns what was measured in the units of the names, of which some are shares of the dense network's."""
    measured = evaluation.measurements
    shown = {name: measured[m].value * scale for name, (m, scale) in _SCALES.items() if m in measured}
    if evaluation.ended:  # no chart shall show it among those that were counted on all images
        shown["accuracy_estimate_pct"] = shown.pop("accuracy_pct")
    if "flops" in measured:
        shown["flops_pct_of_dense"] = measured["flops"].value / dense["flops"].value * 100
    if "latency" in measured:
        others = dict(measured["latency"].others)
        shown["longest_path_ms"] = others.pop("worst") * 1e3
        shown |= {f"{name}_wall_ms": value * 1e3 for name, value in others.items()}
        shown["speedup"] = dense["latency"].value / measured["latency"].value
    return {name: round(value, 4) for name, value in shown.items()}


def margins(evaluation: Evaluation, search: StoredSearch) -> dict[str, float]:
    """Returns how far each limit is kept, in percent of it; negative where it is broken."""
    dense = search.baseline.evaluation.measurements
    return {
        f"margin_{constraint.name.replace('.', '_')}_pct": round(
            -100 * constraint.violation(found, dense[constraint.measured_as]), 3
        )
        for constraint in search.budget.constraints
        if (found := evaluation.measurements.get(constraint.measured_as))
        and not (evaluation.ended and constraint.measured_as == "accuracy")
    }
