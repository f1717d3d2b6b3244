"""One measured number, and the metrics that there are.

This module imports nothing heavy: a budget is parsed against it before torch is loaded.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

Unit = Literal["s", "ratio", "flop", "count", "byte", "joule"]


class UnitError(ValueError):
    """A measurement of one metric was used as another."""


@dataclass(frozen=True)
class Metric:
    """What can be measured.

    Args:
        name: as a budget spells it.
        unit: of every stored value.
        sign: +1 where less is better, -1 where more is.
        statistics: what a budget may ask for; the first is the default.
        title: for people.
        example: a limit on it, as a budget spells it.
        is_counted: whether it is counted, so that any difference is one; else it is measured, with noise.
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
    """A value in SI units, and how it came to be.

    Args:
        metric: a name in `METRICS`.
        value: the default statistic.
        statistic: what `value` is, in words: `median`, `expected`, `mean`, ...
        n: how many samples stand behind it.
        spread: its standard error, in the same unit; 0 where the value is exact.
        others: further statistics of the same samples, same unit.
        target: where it was measured.
        protocol: how, in one line.
        notes: further facts, such as the share of inputs that leaves at each exit.
        remarks: what makes the value doubtful, in words; none is best.
        unproven: nodes of the deployed graph whose precision the runtime does not tell.
        states: what the device told of its clocks, power mode and temperature, `before` and `after`.
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
        """Returns one statistic of the metric, its default one included.

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
        """The half-width of the value's 95% interval, as a share of it; by the standard error where none was noted."""
        by_spread = 1.96 * self.spread / self.value if self.value else 0.0
        return self.notes.get("half_width", by_spread)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy."""
        return asdict(self) | {
            "others": dict(self.others),
            "notes": dict(self.notes),
            "remarks": list(self.remarks),
            "unproven": list(self.unproven),
            "states": {moment: dict(told) for moment, told in self.states.items()},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Returns the measurement that `to_dict` described."""
        lines = {name: tuple(content.get(name, ())) for name in ("remarks", "unproven")}
        return cls(**{**content, **lines})


def scaled(measured: Measurement, factor: float) -> Measurement:
    """Returns a measurement whose every statistic is so many times as large."""
    others = {name: factor * value for name, value in measured.others.items()}
    return replace(measured, value=factor * measured.value, others=others)


def mean_of(one: Measurement, two: Measurement) -> Measurement:
    """Returns the mean of two measurements of the same thing, all else being the second's."""
    others = {name: (one.others[name] + value) / 2 for name, value in two.others.items() if name in one.others}
    return replace(
        two,
        value=(one.value + two.value) / 2,
        n=one.n + two.n,
        spread=math.hypot(one.spread, two.spread) / 2,
        others=others,
        protocol=f"mean of two, {one.value:.6g} and {two.value:.6g}; {two.protocol}",
    )
