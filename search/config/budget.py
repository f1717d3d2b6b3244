"""The limits that a deployed version must keep: `latency<5ms`, `accuracy_drop<1%`.

Lower is better for every metric but accuracy, so each metric has one direction. `=` and `:` may be written instead of
`<` and `>`, which shells take for redirects unless quoted. Energy is not measured: it is FLOPs at a given price.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Self

from evaluators.measurement import METRICS, Measurement, Metric
from search.config.metric_names import meant
from spaces.errors import UserError

_SCALES: Mapping[str, Mapping[str, Decimal]] = {
    "s": {"us": Decimal("1e-6"), "ms": Decimal("1e-3"), "s": Decimal(1)},
    "ratio": {"%": Decimal("0.01")},
    "flop": {"": Decimal(1), "K": Decimal(10**3), "M": Decimal(10**6), "G": Decimal(10**9)},
    "count": {"": Decimal(1), "K": Decimal(10**3), "M": Decimal(10**6), "G": Decimal(10**9)},
    "byte": {"B": Decimal(1), "KB": Decimal(10**3), "MB": Decimal(10**6)},
    "joule": {
        "pJ": Decimal("1e-12"),
        "nJ": Decimal("1e-9"),
        "uJ": Decimal("1e-6"),
        "mJ": Decimal("1e-3"),
        "J": Decimal(1),
    },
}
ACCURACY_DROP = Metric("accuracy_drop", "ratio", 1, ("mean",), "accuracy drop", "accuracy_drop<1%")
ENERGY = Metric("energy", "joule", 1, ("expected", "worst"), "energy", "energy<2mJ@50pJ")
BUDGET_METRICS: Mapping[str, Metric] = {**METRICS, ACCURACY_DROP.name: ACCURACY_DROP, ENERGY.name: ENERGY}
"""Metrics that a budget may limit: all measured ones, the drop of accuracy below the dense network, and energy."""

_PATTERN = re.compile(
    r"""
    ^(?P<metric>[A-Za-z_][\w-]*) (?:\.(?P<statistic>\w+))?        # latency, latency.p99
    \s*(?P<side><=|>=|<|>|=|:)                              # = and : stand for the metric's direction
    \s*(?P<value>[^\s%@A-Za-z]*(?:[eE][-+]?\d+)?)           # 5, 0.5, 5e-3; parsed as a number later
    \s*(?P<unit>[^\s@]*)                                   # ms, %, nothing
    \s*(?:@\s*(?P<price>\S+))?$                            # of a FLOP, for energy: 50pJ
    """,
    re.VERBOSE,
)
_PRICE = re.compile(r"^(?P<value>[^A-Za-z]*(?:[eE][-+]?\d+)?)(?P<unit>[A-Za-z]+)$")


class BudgetError(UserError):
    """A budget cannot be parsed, or no version can keep it."""


@dataclass(frozen=True)
class Constraint:
    """One limit of a budget, in SI units.

    Constraint.parse("latency<5ms")       # median latency at most 0.005 s
    Constraint.parse("latency.p99<8ms")   # its 99th percentile
    Constraint.parse("flops<50%")         # half of the dense network's
    Constraint.parse("energy<2mJ@50pJ")   # at 50 pJ for each FLOP

    Args:
        metric: that is limited.
        statistic: of the metric.
        limit: in SI units, or if relative as a share of the dense network's value.
        relative: to the dense network.
        joules_per_flop: price of a FLOP, for a limit on energy; else 0.
    """

    metric: Metric
    statistic: str
    limit: float
    relative: bool
    joules_per_flop: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Returns the constraint in `text`.

        Raises:
            BudgetError: an unknown metric, statistic or unit, the wrong direction, or a limit that nothing can keep.
        """
        match = _PATTERN.match(text.strip())
        if match is None:
            raise BudgetError(_shape_hint(text))
        metric = _metric(match["metric"])
        statistic = _statistic(metric, match["statistic"])
        _check_side(metric, match["side"], text)
        price = _price(metric, match["price"], text)
        limit, relative = _limit(metric, match["value"], match["unit"], text)
        return cls(metric, statistic, limit, relative, price)

    @property
    def name(self) -> str:
        """The metric, and the statistic if it is not the default one."""
        return self.metric.name if self.limits_default_statistic else f"{self.metric.name}.{self.statistic}"

    def __str__(self) -> str:
        scales = _SCALES["ratio"] if self.relative else _SCALES[self.metric.unit]
        price = f"@{_scaled(self.joules_per_flop, _SCALES['joule'])}" if self.joules_per_flop else ""
        return f"{self.name}{'<' if self.metric.sign > 0 else '>'}{_scaled(self.limit, scales)}{price}"

    def violation(self, measured: Measurement, dense: Measurement) -> float:
        """Returns how far `measured` exceeds the limit, as a share of it; at or below 0 it is kept.

        Args:
            measured: of the metric `measured_as`.
            dense: the same of the dense network.

        Raises:
            UnitError: this statistic was not measured.
        """
        value = self.value(measured, dense)
        limit = self.limit * dense.statistic_value(self.statistic) if self.relative else self.limit
        return self.metric.sign * (value - limit) / (limit or 0.01)  # a limit of 0% drop counts in points

    def value(self, measured: Measurement, dense: Measurement) -> float:
        """Returns the value to compare with the limit: the statistic, the energy, or the drop of accuracy."""
        if self.metric == ACCURACY_DROP:
            return dense.value - measured.value
        return measured.statistic_value(self.statistic) * (self.joules_per_flop or 1.0)

    def floor(self, dense: Measurement) -> float:
        """Returns the lowest accuracy, 0 to 1, within a limit on accuracy or accuracy_drop."""
        return dense.value - self.limit if self.metric == ACCURACY_DROP else self.limit

    def ceiling(self, dense: Measurement) -> float:
        """Returns the highest measured value within a limit on any metric but accuracy."""
        if self.relative:
            return self.limit * dense.statistic_value(self.statistic)
        return self.limit / (self.joules_per_flop or 1.0)

    @property
    def measured_as(self) -> str:
        """The metric that has to be measured for this constraint."""
        return {ACCURACY_DROP: "accuracy", ENERGY: "flops"}.get(self.metric, self.metric.name)

    @property
    def limits_default_statistic(self) -> bool:
        """Whether it limits the default statistic, not a percentile or the worst case."""
        return self.statistic == self.metric.statistics[0]


@dataclass(frozen=True)
class Budget:
    """The limits of a deployment, all of them hard.

    Budget.parse(["latency<5ms,size<1MB", "accuracy_drop<1%"])
    """

    constraints: tuple[Constraint, ...]

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Self:
        """Returns the budget in one or more texts, each with one or several comma-separated limits.

        Raises:
            BudgetError: a limit cannot be parsed, or two limit the same metric.
        """
        constraints = [Constraint.parse(part) for text in texts for part in text.split(",")]
        names = [constraint.name for constraint in constraints]
        for name in names:
            if names.count(name) > 1:
                both = " and ".join(str(constraint) for constraint in constraints if constraint.name == name)
                raise BudgetError(f"a budget limits each metric once, got {both}; keep the tighter one")
        return cls(tuple(constraints))

    def __str__(self) -> str:
        return ",".join(str(constraint) for constraint in self.constraints)

    def on(self, metric: str) -> tuple[Constraint, ...]:
        """Returns the constraints that `metric` has to be measured for."""
        return tuple(constraint for constraint in self.constraints if constraint.measured_as == metric)

    def without(self, metric: str) -> Self:
        """Returns the budget without the constraints that `metric` has to be measured for."""
        return type(self)(tuple(constraint for constraint in self.constraints if constraint.measured_as != metric))

    def violations(self, measured: Mapping[str, Measurement], dense: Mapping[str, Measurement]) -> dict[str, float]:
        """Returns the violation of every constraint whose metric has been measured, by the constraint's text.

        Args:
            measured: of a version, by metric.
            dense: the same of the dense network.
        """
        return {str(constraint): excess for constraint, excess in self._excesses(measured, dense).items()}

    def broken(self, measured: Mapping[str, Measurement], dense: Mapping[str, Measurement]) -> dict[Constraint, float]:
        """Returns the broken constraints among those measured, each with the excess as a share of its limit."""
        return {constraint: excess for constraint, excess in self._excesses(measured, dense).items() if excess > 0}

    def is_met(self, measured: Mapping[str, Measurement], dense: Mapping[str, Measurement]) -> bool:
        """Returns whether every constraint has been measured and is kept."""
        violations = self._excesses(measured, dense)
        return len(violations) == len(self.constraints) and all(excess <= 0 for excess in violations.values())

    def accuracy_floor(self, dense: Mapping[str, Measurement]) -> float | None:
        """Returns the lowest accuracy, 0 to 1, within all limits; None without a limit on it."""
        return max((limit.floor(dense["accuracy"]) for limit in self.on("accuracy")), default=None)

    def ceiling(self, metric: str, dense: Mapping[str, Measurement]) -> float | None:
        """Returns the highest value of a metric other than accuracy within all limits; None without a limit on it.

        Limits on its other statistics are ignored.
        """
        limits = [limit for limit in self.on(metric) if limit.limits_default_statistic]
        return min((limit.ceiling(dense[metric]) for limit in limits), default=None)

    def _excesses(
        self, measured: Mapping[str, Measurement], dense: Mapping[str, Measurement]
    ) -> dict[Constraint, float]:
        return {
            constraint: constraint.violation(measured[constraint.measured_as], dense[constraint.measured_as])
            for constraint in self.constraints
            if constraint.measured_as in measured
        }


def _shape_hint(text: str) -> str:
    name = text.strip().split(".")[0]
    example = BUDGET_METRICS.get(name, METRICS["latency"]).example
    return (
        f"a budget is a metric and a limit, as in '{example}', got {text!r}; quote it, because an unquoted < or > is a"
        f" redirect in every shell, or write {example.replace('<', '=').replace('>', '=')}"
    )


def _metric(name: str) -> Metric:
    if name not in BUDGET_METRICS:
        hint = meant(name, BUDGET_METRICS) or f"choose from {', '.join(BUDGET_METRICS)}"
        raise BudgetError(f"a budget limits a metric that is measured, got {name!r}; {hint}")
    return BUDGET_METRICS[name]


def _statistic(metric: Metric, name: str | None) -> str:
    if name is None:
        return metric.statistics[0]
    if name not in metric.statistics:
        raise BudgetError(f"a statistic of {metric.name} is one of {', '.join(metric.statistics)}, got {name!r}")
    return name


def _check_side(metric: Metric, side: str, text: str) -> None:
    natural = "<" if metric.sign > 0 else ">"
    if side[0] in "<>" and side[0] != natural:
        raise BudgetError(
            f"{metric.name} is limited from {'above' if metric.sign > 0 else 'below'}, got {text.strip()!r};"
            f" write {text.strip().replace(side, natural)!r}"
        )


def _price(metric: Metric, price: str | None, text: str) -> float:
    """Returns the joules per FLOP."""
    if metric != ENERGY:
        if price:
            raise BudgetError(f"only energy has a price for a FLOP, got {text.strip()!r}; leave out '@{price}'")
        return 0.0
    match, scales = _PRICE.match(price or ""), _SCALES["joule"]
    try:
        joules = Decimal(match["value"]) * scales[match["unit"]] if match else Decimal(0)
    except (InvalidOperation, KeyError):
        joules = Decimal(0)
    if not joules.is_finite() or joules <= 0:
        raise BudgetError(
            f"energy is not measured but FLOPs at a stated price, got {text.strip()!r};"
            f" write {ENERGY.example!r} for 50 pJ each, in one of {', '.join(scales)}"
        )
    return float(joules)


def _limit(metric: Metric, number: str, unit: str, text: str) -> tuple[float, bool]:
    scales = _SCALES[metric.unit]
    relative = unit == "%" and metric.may_be_relative
    try:
        value = Decimal(number)
    except InvalidOperation:
        raise BudgetError(f"a limit is a number, got {number or 'nothing'!r} in {text.strip()!r}") from None
    if not relative and unit not in scales:
        units = [name for name in scales if name] + (["%"] if metric.may_be_relative else [])
        raise BudgetError(
            f"{metric.name} is limited in {', '.join(units)}, got {text.strip()!r}; write {metric.example!r}"
        )
    limit = float(value * (_SCALES["ratio"]["%"] if relative else scales[unit]))
    may_be_zero = metric == ACCURACY_DROP and limit == 0
    if not value.is_finite() or (limit <= 0 and not may_be_zero):
        raise BudgetError(f"a limit is above 0, got {text.strip()!r}")
    if metric.unit == "ratio" and limit >= 1:
        raise BudgetError(f"{metric.name} is a share of the images, below 100%, got {text.strip()!r}")
    return limit, relative


def _scaled(value: float, scales: Mapping[str, Decimal]) -> str:
    """Returns a number in the largest unit in which it is at least 1."""
    exact = Decimal(repr(value))
    unit = next((unit for unit, scale in reversed(list(scales.items())) if exact >= scale), next(iter(scales)))
    return f"{_plain(exact / scales[unit])}{unit}"


def _plain(value: Decimal) -> str:
    return f"{value.normalize():f}"
