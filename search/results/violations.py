"""Text on the limits of a budget that a version breaks."""

from collections.abc import Mapping

from evaluators.measurement import Measurement
from search.config.budget import Budget, Constraint
from search.config.units import quantity
from search.results.pareto import Version


def violation_line(constraint: Constraint, measured: Measurement, dense: Measurement) -> str:
    """Returns by how much a version exceeds a limit: `latency 5.6 ms, 12% over latency<5ms`."""
    side = "over" if constraint.metric.sign > 0 else "under"
    return f"{limited(constraint, measured, dense)}, {constraint.violation(measured, dense):.0%} {side} {constraint}"


def limited(constraint: Constraint, measured: Measurement, dense: Measurement) -> str:
    """Returns the limited metric and its value: `latency.p99 5.6 ms`."""
    return f"{constraint.name} {quantity(constraint.value(measured, dense), constraint.metric.unit)}"


def broken_limits(version: Version, budget: Budget, dense: Mapping[str, Measurement]) -> str:
    """Returns every limit that a version exceeds, and by how much."""
    return "; ".join(
        violation_line(constraint, version.measured[constraint.measured_as], dense[constraint.measured_as])
        for constraint in budget.broken(version.measured, dense)
    )


def kept_and_broken(version: Version, budget: Budget, dense: Mapping[str, Measurement]) -> str:
    """Returns where a fully measured version stands at every limit: by how much it exceeds it, or that it keeps it."""
    states = []
    for constraint in budget.constraints:
        measured, whole = version.measured[constraint.measured_as], dense[constraint.measured_as]
        is_kept = constraint.violation(measured, whole) <= 0
        kept = f"{limited(constraint, measured, whole)} keeps {constraint}"
        states.append(kept if is_kept else violation_line(constraint, measured, whole))
    return "; ".join(states)
