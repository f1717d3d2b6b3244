"""A measured value, and the metrics.

This module imports nothing heavy, because budgets are checked against it before torch is loaded.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

Unit = Literal["s", "ratio", "flop", "count", "byte", "joule"]


class UnitError(ValueError):
    """A statistic is requested that was not measured."""


@dataclass(frozen=True)
class Metric:
    """A quantity that can be measured.

    Args:
        name: as in a budget.
        unit: of every stored value.
        sign: +1 if less is better, -1 if more is better.
        statistics: those that a budget may limit; the first is the default.
        title: its name for users.
        example: a limit on it, as in a budget.
        is_counted: whether it is exact, such as a count; else it is measured with noise.
        may_be_relative: whether a budget may limit it to a share of the dense network's.
    """

    name: str
    unit: Unit
    sign: Literal[1, -1]
    statistics: tuple[str, ...]
    title: str
    example: str
    is_counted: bool = False
    may_be_relative: bool = False


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "latency", "s", 1, ("median", "p90", "p95", "p99", "worst"), "latency", "latency<5ms", may_be_relative=True
        ),
        Metric("accuracy", "ratio", -1, ("mean",), "accuracy", "accuracy>98%"),
        Metric("flops", "flop", 1, ("expected", "worst"), "FLOPs", "flops<50%", True, True),
        Metric("params", "count", 1, ("total",), "parameters", "params<200K", True, True),
        Metric("size", "byte", 1, ("total",), "size", "size<1MB", True, True),
    )
}


@dataclass(frozen=True)
class Measurement:
    """A value in SI units, and how it was measured.

    Args:
        metric: a name in `METRICS`.
        value: the default statistic.
        statistic: name of that statistic: `median`, `expected`, `mean`, ...
        n: number of samples.
        spread: its standard error, in the same unit; 0 if the value is exact.
        others: other statistics of the same samples, by name, in the same unit.
        target: where it was measured.
        protocol: how it was measured, in one line.
        notes: further numbers, such as the share of inputs that leave at each exit.
        remarks: reasons to doubt the value, as sentences.
        unproven: nodes of the deployed graph whose precision the runtime does not report.
        states: the device's clocks, power mode and temperature, `before` and `after`.
    """

    metric: str
    value: float
    statistic: str
    n: int
    spread: float
    target: str
    protocol: str
    others: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, float] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    unproven: tuple[str, ...] = ()
    states: Mapping[str, Mapping[str, float | str]] = field(default_factory=dict)

    def statistic_value(self, statistic: str) -> float:
        """Returns a statistic of the metric by its name.

        Raises:
            UnitError: this statistic was not measured.
        """
        if statistic == METRICS[self.metric].statistics[0]:
            return self.value
        if statistic not in self.others:
            raise UnitError(
                f"{self.metric} was measured as {sorted([self.statistic, *self.others])}, got {statistic!r}"
            )
        return self.others[statistic]

    @property
    def half_width(self) -> float:
        """The half-width of the value's 95% interval, as a share of the value: from `notes`, else from `spread`."""
        by_spread = 1.96 * self.spread / self.value if self.value else 0.0
        return self.notes.get("half_width", by_spread)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy."""
        return asdict(self) | {
            "others": dict(self.others),
            "notes": dict(self.notes),
            "remarks": list(self.remarks),
            "unproven": list(self.unproven),
            "states": {moment: dict(state) for moment, state in self.states.items()},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Returns the measurement that `to_dict` described."""
        tuples = {name: tuple(content.get(name, ())) for name in ("remarks", "unproven")}
        return cls(**{**content, **tuples})


def scaled(measured: Measurement, factor: float) -> Measurement:
    """Returns a measurement with every statistic multiplied by `factor`."""
    others = {name: factor * value for name, value in measured.others.items()}
    return replace(measured, value=factor * measured.value, others=others)


def mean_of(one: Measurement, two: Measurement) -> Measurement:
    """Returns the mean of two measurements of the same metric; target, notes and remarks are those of the second."""
    others = {name: (one.others[name] + value) / 2 for name, value in two.others.items() if name in one.others}
    return replace(
        two,
        value=(one.value + two.value) / 2,
        n=one.n + two.n,
        spread=math.hypot(one.spread, two.spread) / 2,
        others=others,
        protocol=f"mean of two, {one.value:.6g} and {two.value:.6g}; {two.protocol}",
    )
