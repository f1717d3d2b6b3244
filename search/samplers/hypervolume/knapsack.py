"""Configurations to start from: the least estimated damage for several amounts of time, solved as a knapsack.

Every layer takes one of its ways to run, a width of its outputs and a precision; every group of channels takes one
width, and every stage one depth; the damage is a sum, and so is the time. That is a multiple-choice knapsack, solved as
an integer program.

Sources: Sinha and Zoltners, The Multiple-Choice Knapsack Problem, 1979; Yao et al., HAWQ-V3: Dyadic Neural Network
Quantization, 2021, for precisions; Shen et al., HALP: Hardware-Aware Latency Pruning, 2021, for channels.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from search.samplers.hypervolume.encoding import Array, Codec
from search.samplers.hypervolume.prior import NetworkStructure

SHARES = (0.95, 0.8, 0.68, 0.57, 0.48, 0.4, 0.33, 0.27)
"""Of the time that is allowed, from what just fits to what leaves room for estimates that are wrong."""
_EXIT_THRESHOLDS = (0.75, 0.6, 0.45, 0.3)
"""Where thresholds of exits that are used lie between their lowest and their highest value, in turn."""
_FIRST_WIDTH = 0.7
"""Where the first knapsack takes widths to lie between the narrowest and the widest."""
_ROUNDS = 4
_TIME_LIMIT_S = 2.0
"""A knapsack that is not solved by then is taken as far as it came."""
_GAP = 0.01
"""Solved to within this share of the least damage."""


@dataclass(frozen=True)
class _Option:
    """One way to run a layer.

    Args:
        layer: its index.
        width: the level of its group of channels; 0 where it has none.
        precision: an index of the structure's `speeds`.
    """

    layer: int
    width: int
    precision: int


def knapsacks(structure: NetworkStructure, codec: Codec, times: Sequence[float]) -> list[dict[str, Any]]:
    """Returns the configurations of least estimated damage within each of some times, and where there are exits the
    same again with exits that are used now and then.

    A layer's time is its work times its precision's speed. Work is a product of inputs and outputs, which no knapsack
    can weigh, so the knapsack is solved again with the inputs that the last one came to.

    Args:
        structure: with estimates of damage.
        codec: of the space.
        times: as shares of the dense network's, descending.
    """
    solver = _Solver(structure, codec)
    configurations: list[dict[str, Any]] = []
    for number, time in enumerate(times):
        row = solver.solve(time)
        if row is None:
            break
        thresholds = [1.0]
        if structure.exits and number % 2:
            thresholds.append(_EXIT_THRESHOLDS[number // 2 % len(_EXIT_THRESHOLDS)])
        for threshold in thresholds:
            values = codec.decode(solver.with_exits(row, threshold))
            if values not in configurations:
                configurations.append(values)
    return configurations


class _Solver:
    """Solves knapsacks of one network.

    The variables are one for each option of a layer, one for each width of a group of channels, and one for each depth
    of a stage, 0 or 1.
    """

    def __init__(self, structure: NetworkStructure, codec: Codec) -> None:
        self._structure = structure
        self._codec = codec
        self._speeds = np.array(list(structure.speeds.values()))
        self._flops = structure.flops[: structure.layers]
        self._inputs = structure.inputs[: structure.layers]
        self._outputs = structure.outputs[: structure.layers]
        self._group_of = [int(np.argmax(shares)) if shares.any() else -1 for shares in self._outputs]
        self._columns = [codec.names.index(name) for name in structure.channels]
        levels = [int(codec.levels[column]) for column in self._columns]
        self._precisions = [self._offered(layer) for layer in range(structure.layers)]
        self._options = [
            _Option(layer, width, precision)
            for layer, group in enumerate(self._group_of)
            for width in range(levels[group] if group >= 0 else 1)
            for precision in self._precisions[layer]
        ]
        self._widths = [(group, width) for group, count in enumerate(levels) for width in range(count)]
        self._depth_columns = [codec.names.index(name) for name in structure.depth]
        self._depths = [
            (stage, level)
            for stage, column in enumerate(self._depth_columns)
            for level in range(int(codec.levels[column]))
        ]

    def _offered(self, layer: int) -> list[int]:
        """Returns the precisions that a layer may have, as indices of `speeds`."""
        names, dimension = list(self._structure.speeds), self._structure.precision[layer]
        if dimension is None:
            return [names.index(self._structure.fixed[layer])]
        return [names.index(choice) for choice in self._codec.space[dimension].choices]  # type: ignore[attr-defined]

    def solve(self, time: float) -> Array | None:
        """Returns the row `(d,)` of least damage in a share of the dense network's time; None where none takes less.

        Every input size is solved for on its own, because it scales the time of all layers.
        """
        sizes = range(len(self._structure.size_work)) if self._structure.size is not None else (0,)
        solved = [row for size in sizes if (row := self._solve_at(size, time)) is not None]
        if not solved:
            return None
        return solved[int(np.argmin(self._structure.estimated_damage(self._codec, np.stack(solved)).sum(axis=1)))]

    def _solve_at(self, size: int, time: float) -> Array | None:
        """Returns the row of least damage with one of the input sizes; None where none takes as little time."""
        row = self._at_size(np.floor(np.maximum(self._codec.levels - 1, 0) * _FIRST_WIDTH), size)
        for _ in range(_ROUNDS):
            solved = self._solve_around(row, time)
            if solved is None:
                return None
            solved = self._at_size(solved, size)
            if (solved == row).all():
                break
            row = solved
        return row

    def _at_size(self, row: Array, size: int) -> Array:
        row = row.copy()
        if self._structure.size is not None:
            row[self._codec.names.index(self._structure.size)] = size
        return row

    def with_exits(self, row: Array, share: float) -> Array:
        """Returns a row `(d,)` in which all exits have a threshold so far up from their lowest one."""
        row = row.copy()
        for name in self._structure.exits:
            column = self._codec.names.index(name)
            levels = self._codec.levels[column]
            row[column] = round(share * (levels - 1)) if levels else share
        return row

    def _solve_around(self, row: Array, time: float) -> Array | None:
        """Returns the solution where the inputs of each layer are those of a row `(d,)`; None where there is none."""
        damage, seconds = self._coefficients(row)
        allowed = time * float(self._flops.sum() * self._speeds[0])
        within_time = LinearConstraint(csr_array(seconds[None, :]), ub=allowed)
        with _silent():
            solution = milp(
                damage,
                integrality=np.ones(len(damage)),
                bounds=Bounds(0, 1),
                constraints=[within_time, self._one_of_each(), self._options_have_the_width_of_their_group()],
                options={"mip_rel_gap": _GAP, "time_limit": _TIME_LIMIT_S},
            )
        return None if solution.x is None else self._row_of(solution.x > 0.5)

    def _coefficients(self, row: Array) -> tuple[Array, Array]:
        """Returns the damage and the time of every variable, `(variables,)` each.

        The time of a width is what it saves those who read the channels, against a row `(d,)`.
        """
        structure = self._structure
        removed = structure.full - structure.kept(self._codec, row[None])[0]
        inputs, outputs = 1 - self._inputs @ removed, 1 - self._outputs @ removed
        speeds = self._speeds[structure.precisions(self._codec, row[None])[0]]
        pixels = float(structure.pixels(self._codec, row[None])[0])
        damage, time = [], []
        for option in self._options:
            layer, group = option.layer, self._group_of[option.layer]
            own_outputs = 1.0
            if group >= 0:
                change = removed[group] - self._removed(group, option.width)
                own_outputs = outputs[layer] + self._outputs[layer, group] * change
            time.append(pixels * self._flops[layer] * self._speeds[option.precision] * inputs[layer] * own_outputs)
            damage.append(self._precision_damage(option))
        for group, width in self._widths:
            change = removed[group] - self._removed(group, width)
            time.append(float((self._flops * speeds * outputs * self._inputs[:, group] * change).sum()))
            estimates = structure.damage.get(structure.channels[group])
            damage.append(estimates[width] if estimates else 0.0)
        for stage, level in self._depths:
            saved = self._flops * speeds * inputs * outputs * self._gone(stage, level)
            time.append(-float(saved.sum()))
            estimates = structure.damage.get(structure.depth[stage])
            damage.append(estimates[level] if estimates else 0.0)
        return np.array(damage), np.array(time)

    def _gone(self, stage: int, level: int) -> NDArray[np.bool_]:
        """Returns which layers are in blocks that are left out at a level of a stage, `(L,)`."""
        name = self._structure.depth[stage]
        row = np.full((1, len(self._codec.names)), float(level))
        kept = self._codec.numbers(row, name)[0]
        gone: NDArray[np.bool_] = self._structure.runs_from[: self._structure.layers, stage] > kept
        return gone

    def _removed(self, group: int, width: int) -> float:
        """Returns how many channels a group lacks at one of its levels."""
        row = np.full((1, len(self._codec.names)), float(width))
        return float(self._structure.full[group] - self._codec.numbers(row, self._structure.channels[group])[0])

    def _precision_damage(self, option: _Option) -> float:
        dimension = self._structure.precision[option.layer]
        estimates = self._structure.damage.get(dimension) if dimension else None
        return estimates[self._precisions[option.layer].index(option.precision)] if estimates else 0.0

    def _one_of_each(self) -> LinearConstraint:
        """Every layer has one option, every group one width, and every stage one depth."""
        layers = np.array([option.layer for option in self._options])
        groups = np.array([len(self._group_of) + group for group, _ in self._widths], dtype=np.int64)
        known = len(self._group_of) + len(self._columns)
        stages = np.array([known + stage for stage, _ in self._depths], dtype=np.int64)
        rows = np.concatenate([layers, groups, stages])
        matrix = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))
        return LinearConstraint(matrix, 1, 1)

    def _options_have_the_width_of_their_group(self) -> LinearConstraint:
        """For each layer and width, its options sum to the variable of that width of its group."""
        variable_of = {pair: len(self._options) + index for index, pair in enumerate(self._widths)}
        rows_of: dict[tuple[int, int], int] = {}
        entries: list[tuple[float, int, int]] = []
        for variable, option in enumerate(self._options):
            group = self._group_of[option.layer]
            if group < 0:
                continue
            pair = (option.layer, option.width)
            if pair not in rows_of:
                rows_of[pair] = len(rows_of)
                entries.append((-1.0, rows_of[pair], variable_of[group, option.width]))
            entries.append((1.0, rows_of[pair], variable))
        values, rows, columns = zip(*entries, strict=True) if entries else ((), (), ())
        shape = (max(len(rows_of), 1), len(self._options) + len(self._widths) + len(self._depths))
        return LinearConstraint(csr_array((values, (rows, columns)), shape=shape), 0, 0)

    def _row_of(self, chosen: NDArray[np.bool_]) -> Array:
        """Returns the row `(d,)` of the variables that are 1."""
        row = np.zeros(len(self._codec.names))
        for variable in np.flatnonzero(chosen):
            if variable >= len(self._options) + len(self._widths):
                stage, level = self._depths[variable - len(self._options) - len(self._widths)]
                row[self._depth_columns[stage]] = level
                continue
            if variable >= len(self._options):
                group, width = self._widths[variable - len(self._options)]
                row[self._columns[group]] = width
                continue
            option = self._options[variable]
            dimension = self._structure.precision[option.layer]
            if dimension is not None:
                row[self._codec.names.index(dimension)] = self._precisions[option.layer].index(option.precision)
        return self.with_exits(row, 1.0)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keeps from the screen what the solver prints whatever its options say."""
    sys.stdout.flush()
    screen = os.dup(1)
    try:
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what it printed may still wait in its own buffer
        os.dup2(screen, 1)
        os.close(screen)
