"""A network that exists as formulas only: for comparing samplers where a long search for the best front is affordable.

What makes the real problem hard is there: damage that mostly adds up, layer by layer, but not only; latency with layers
that narrowing hardly speeds up, kernels that pad channels, and a price for every change of precision; exits that save
what lies behind them; timings and accuracies with noise; and candidates that break the latency limit are not scored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from search.samplers.hypervolume.encoding import Array, Codec
from search.samplers.hypervolume.prior import CostTarget, LinearConstraint, NetworkStructure, ProblemPrior

PRECISIONS = ("fp32", "int8", "int4")
STEP = 4
ALIGNED = np.array([4, 16, 16])
"""Channels are padded to a multiple, in each precision."""
DENSE_ACCURACY, CHANCE = 0.92, 0.1
DENSE_S = 0.010
BOUNDARY_S = 5e-5
"""What each change of precision between neighbours costs."""
GATE_S = 6e-5
"""What each exit costs whom it does not let go."""
_DEPTHS, _WHERE = (0.25, 0.5, 0.75), (0.35, 0.55, 0.7)


@dataclass(frozen=True)
class Setting:
    """One kind of synthetic problem.

    Args:
        layers: how many.
        exits: 0 to 3 of them.
        is_residual: whether every second layer of a stage shares its channels with the others, as in a ResNet.
        limit_s: of latency; the dense network takes 10 ms.
        floor: the lowest accuracy.
        noise: of accuracy and timings, in multiples of 0.15 points and 1%.
    """

    layers: int = 20
    exits: int = 3
    is_residual: bool = False
    limit_s: float = 0.005
    floor: float = 0.82
    noise: float = 1.0


class Problem:
    """A synthetic network, target and budget.

    Args:
        seed: networks of different seeds differ in all of their coefficients.
        setting: their kind.
    """

    def __init__(self, seed: int, setting: Setting = Setting()) -> None:
        self.setting = setting
        rng, count = np.random.default_rng(1000 + seed), setting.layers
        self.widths = np.repeat([16, 32, 64], [count // 3, count // 3, count - 2 * (count // 3)])
        self._groups = _groups(setting, self.widths)
        self.codec = Codec(self._space())
        self._flops = _summing_to(1.0, rng.lognormal(0, 0.5, count))
        self._seconds = _summing_to(DENSE_S, self._flops * rng.lognormal(0, 0.35, count))
        self._sensitive = _summing_to(0.9, rng.lognormal(-1.0, 0.9, self._groups.shape[1]))
        int8 = _summing_to(0.008, rng.lognormal(-1.5, 0.8, count))
        int4 = _summing_to(0.5, rng.lognormal(-1.0, 1.1, count))
        self._quantized = np.stack([np.zeros(count), int8, int4], axis=1)
        speeds = [np.ones(count), rng.normal(0.48, 0.08, count), rng.normal(0.36, 0.14, count)]
        self._speeds = np.clip(np.stack(speeds, axis=1), 0.2, 1.0)
        self._pairs, self._strengths = rng.integers(0, count, (40, 2)), rng.lognormal(0.5, 0.8, 40)
        self._misjudgements = rng.lognormal(0, 0.5, (count, 2))
        self._exit_after = [int(depth * count) for depth in _DEPTHS[: setting.exits]]

    def _space(self) -> dict[str, BaseDistribution]:
        space: dict[str, BaseDistribution] = {}
        for group in range(self._groups.shape[1]):
            width = int(self.widths[self._groups[:, group]][0])
            space[f"channels.{group:02}"] = IntDistribution(width // 4, width, step=STEP)
        for layer in range(self.setting.layers):
            space[f"precision.{layer:02}"] = CategoricalDistribution(PRECISIONS)
        for number in range(self.setting.exits):
            space[f"threshold.{number}"] = FloatDistribution(0.0, 1.0)
        return space

    def _channels(self) -> list[str]:
        return [name for name in self.codec.names if name.startswith("channels")]

    def true(self, rows: Array) -> Array:
        """Returns accuracy, seconds and FLOPs of rows, without noise, `(n, 3)`."""
        kept = np.stack([self.codec.numbers(rows, name) for name in self._channels()], axis=1)
        full = np.array([self.widths[members][0] for members in self._groups.T])
        shares = np.stack([kept @ self._groups.T, *[self._padded(kept, k) for k in range(3)]])
        ratios = shares / self.widths  # (1 + precisions, n, L)
        before = np.concatenate([np.ones((4, len(rows), 1)), ratios[:, :, :-1]], axis=2)
        work = ratios * before
        chosen = rows[:, [self.codec.names.index(f"precision.{layer:02}") for layer in range(self.setting.layers)]]
        precision = chosen.astype(int)
        damage = self._damage(1 - kept / full, precision)
        lost, goes_on = self._exits(rows)
        layers = np.arange(self.setting.layers)
        timed = np.take_along_axis(work[1:], precision[None], axis=0)[0]
        seconds = goes_on * self._seconds * (0.12 + 0.88 * timed) * self._speeds[layers, precision]
        latency = seconds.sum(axis=1) + BOUNDARY_S * (precision[:, 1:] != precision[:, :-1]).sum(axis=1)
        latency += GATE_S * self.setting.exits
        accuracy = CHANCE + (DENSE_ACCURACY - CHANCE) * np.exp(-damage - lost)
        return np.stack([accuracy, latency, (goes_on * self._flops * work[0]).sum(axis=1)], axis=1)

    def _padded(self, kept: Array, precision: int) -> Array:
        step = ALIGNED[precision]
        return np.asarray(np.minimum(np.ceil(kept @ self._groups.T / step) * step, self.widths))

    def _damage(self, lost: Array, precision: NDArray[np.int64]) -> Array:
        """Returns the damage of pruning and quantization: it adds up, but for forty pairs of layers and narrow ones."""
        own = self._sensitive * (0.08 * lost + lost**2.5)
        members = self._groups / self._groups.sum(axis=0)
        layers = np.arange(self.setting.layers)
        narrow = 1 + lost @ self._groups.T
        by_layer = own @ members.T + self._quantized[layers, precision] * narrow
        first, second = self._pairs.T
        return np.asarray(
            by_layer.sum(axis=1) + (self._strengths * by_layer[:, first] * by_layer[:, second]).sum(axis=1)
        )

    def _exits(self, rows: Array) -> tuple[Array, Array]:
        """Returns the damage of exits, `(n,)`, and the share of inputs that each layer sees, `(n, L)`."""
        lost, running = np.zeros(len(rows)), np.ones(len(rows))
        goes_on = np.ones((len(rows), self.setting.layers))
        for number, (after, price) in enumerate(zip(self._exit_after, (0.30, 0.18, 0.10), strict=False)):
            threshold = self.codec.numbers(rows, f"threshold.{number}")
            leaves = 1 / (1 + np.exp(-12 * (_WHERE[number] - threshold)))
            lost += running * leaves**2 * price
            running = running * (1 - leaves)
            goes_on[:, after:] = running[:, None]
        return lost, goes_on

    def measure(self, parameters: Mapping[str, Any], rng: np.random.Generator) -> tuple[float | None, float, float]:
        """Returns accuracy, seconds and FLOPs with noise; no accuracy where the limit on latency is broken."""
        accuracy, seconds, flops = self.true(self.codec.encode([parameters]))[0]
        seconds *= 1 + 0.01 * self.setting.noise * rng.standard_normal()
        accuracy += 0.0015 * self.setting.noise * rng.standard_normal()
        return (None if seconds > self.setting.limit_s else float(accuracy)), float(seconds), float(flops)

    def violations(self, accuracy: float | None, seconds: float) -> dict[str, float]:
        """Returns the violation of each limit that was measured."""
        violations = {"latency": seconds / self.setting.limit_s - 1}
        if accuracy is not None:
            violations["accuracy"] = (self.setting.floor - accuracy) / self.setting.floor
        return violations

    def prior(self) -> ProblemPrior:
        """Returns what a sampler may know beforehand: shapes, FLOPs, and sensitivities that are off by e^0.5."""
        count, groups = self.setting.layers, self._groups
        outputs = groups / self.widths[:, None]
        inputs = np.concatenate([np.zeros((1, groups.shape[1])), outputs[:-1]])
        structure = NetworkStructure(
            channels=tuple(self._channels()),
            full=np.array([float(self.widths[members][0]) for members in groups.T]),
            flops=self._flops,
            inputs=inputs,
            outputs=outputs,
            precision=tuple(f"precision.{layer:02}" for layer in range(count)),
            fixed=("fp32",) * count,
            speeds=dict(zip(PRECISIONS, (1.0, 0.5, 0.4), strict=True)),
            exits=tuple(f"threshold.{number}" for number in range(self.setting.exits)),
            exit_after=tuple(self._exit_after),
            damage=self._estimates(),
        )
        setting = self.setting
        objectives = (
            CostTarget("accuracy", DENSE_ACCURACY, setting.floor, CHANCE),
            CostTarget("latency", DENSE_S, setting.limit_s),
            CostTarget("flops", 1.0, 1.0),
        )
        linear_constraints = {
            "latency": LinearConstraint(1, 1 / setting.limit_s, -1.0),
            "accuracy": LinearConstraint(0, -1 / setting.floor, 1.0),
        }
        return ProblemPrior(structure, objectives, linear_constraints)

    def _estimates(self) -> dict[str, tuple[float, ...]]:
        estimates = {}
        for group, name in enumerate(self._channels()):
            width = float(self.widths[self._groups[:, group]][0])
            lost = 1 - np.arange(width // 4, width + 1, STEP) / width
            damage = self._misjudgements[group, 0] * self._sensitive[group] * (0.08 * lost + lost**2.5)
            estimates[name] = tuple(float(value) for value in damage)
        for layer in range(self.setting.layers):
            damage = self._quantized[layer] * self._misjudgements[layer, 1]
            estimates[f"precision.{layer:02}"] = tuple(float(value) for value in damage)
        return estimates

    def uniform(self) -> list[dict[str, Any]]:
        """Returns configurations that treat every layer alike, as a search tries them first."""
        configurations = []
        for keep in (1.0, 0.75, 0.5):
            for threshold in (1.0, 0.9, 0.7) if self.setting.exits else (1.0,):
                configurations += [self._uniform(keep, precision, threshold) for precision in PRECISIONS]
        return configurations

    def _uniform(self, keep: float, precision: str, threshold: float) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, space in self.codec.space.items():
            if isinstance(space, IntDistribution):
                steps = round((keep * space.high - space.low) / STEP)
                values[name] = min(max(space.low + steps * STEP, space.low), space.high)
            else:
                values[name] = precision if name.startswith("precision") else threshold
        return values


def _groups(setting: Setting, widths: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Returns which layers' outputs belong to each dimension of channels, `(L, G)`."""
    count = setting.layers
    if not setting.is_residual:
        return np.eye(count, dtype=bool)
    own: dict[Any, list[int]] = {}
    for layer in range(count):
        own.setdefault(layer if layer % 2 else ("stream", int(widths[layer])), []).append(layer)
    members = np.zeros((count, len(own)), dtype=bool)
    for group, layers in enumerate(own.values()):
        members[layers, group] = True
    return members


def _summing_to(total: float, values: Array | float) -> Array:
    return np.asarray(values) * (total / float(np.sum(values)))
