"""Configurations to start from: the least estimated damage for several amounts of time, solved as a knapsack."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from search.samplers.hypervolume.encoding import Array, Codec
from search.samplers.hypervolume.prior import Structure

SHARES = (0.95, 0.8, 0.68, 0.57, 0.48, 0.4, 0.33, 0.27)
"""Of the time that is allowed, from what just fits to what leaves room for estimates that are wrong."""
_EXITS = (0.75, 0.6, 0.45, 0.3)
"""Where thresholds of exits that are used lie between their lowest and their highest value, in turn."""
_ROUNDS = 4
_SECONDS = 2.0
"""A knapsack that is not solved by then is taken as far as it came."""


@dataclass(frozen=True)
class _Cell:
    """One way to run a layer: a width of its outputs and a precision."""

    layer: int
    width: int
    precision: int


def knapsacks(structure: Structure, codec: Codec, times: Sequence[float]) -> list[dict[str, Any]]:
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
    found: list[dict[str, Any]] = []
    for number, time in enumerate(times):
        row = solver.solve(time)
        if row is None:
            break
        kinds = (1.0, _EXITS[number // 2 % len(_EXITS)]) if structure.exits and number % 2 else (1.0,)
        for share in kinds:
            values = codec.decode(solver.with_exits(row, share))
            if values not in found:
                found.append(values)
    return found


class _Solver:
    def __init__(self, structure: Structure, codec: Codec) -> None:
        self._structure, self._codec = structure, codec
        self._speeds = np.array(list(structure.speeds.values()))
        self._flops = structure.flops[: structure.layers]
        self._inputs, self._outputs = structure.inputs[: structure.layers], structure.outputs[: structure.layers]
        self._group_of = [int(np.argmax(row)) if row.any() else -1 for row in self._outputs]
        index = {name: place for place, name in enumerate(codec.names)}
        self._columns = [index[name] for name in structure.channels]
        self._levels = [int(codec.levels[column]) for column in self._columns]
        self._precisions = [self._offered(layer) for layer in range(structure.layers)]
        self._cells = [
            _Cell(layer, width, precision)
            for layer, group in enumerate(self._group_of)
            for width in range(self._levels[group] if group >= 0 else 1)
            for precision in self._precisions[layer]
        ]
        self._widths = [(group, width) for group, levels in enumerate(self._levels) for width in range(levels)]

    def _offered(self, layer: int) -> list[int]:
        names, dimension = list(self._structure.speeds), self._structure.precision[layer]
        if dimension is None:
            return [names.index(self._structure.fixed[layer])]
        return [names.index(choice) for choice in self._codec.space[dimension].choices]  # type: ignore[attr-defined]

    def solve(self, time: float) -> Array | None:
        """Returns the row of least damage that takes a share of the dense network's time; None where none does."""
        row = self._middle()
        for _ in range(_ROUNDS):
            solved = self._solve_around(row, time)
            if solved is None:
                return None
            if (solved == row).all():
                break
            row = solved
        return row

    def _middle(self) -> Array:
        return np.floor(np.maximum(self._codec.levels - 1, 0) * 0.7)

    def with_exits(self, row: Array, share: float) -> Array:
        """Returns a row in which all exits have a threshold so far up from their lowest one."""
        row = row.copy()
        for name in self._structure.exits:
            column = self._codec.names.index(name)
            levels = self._codec.levels[column]
            row[column] = round(share * (levels - 1)) if levels else share
        return row

    def _solve_around(self, row: Array, time: float) -> Array | None:
        damage, costs = self._objective(row)
        total = float(self._flops.sum() * self._speeds[0])
        rules = [LinearConstraint(csr_array(costs[None, :]), ub=time * total), self._one_each(), self._agreement()]
        solved = milp(
            damage,
            integrality=np.ones(len(damage)),
            bounds=Bounds(0, 1),
            constraints=rules,
            options={"mip_rel_gap": 0.01, "time_limit": _SECONDS},
        )
        return None if solved.x is None else self._row(solved.x > 0.5)

    def _objective(self, row: Array) -> tuple[Array, Array]:
        """Returns the damage and the time of every cell, then of every width of a group: what its readers save."""
        structure = self._structure
        gone = structure.full - structure.kept(self._codec, row[None])[0]
        inputs, outputs = 1 - self._inputs @ gone, 1 - self._outputs @ gone
        speeds = self._speeds[structure.precisions(self._codec, row[None])[0]]
        damage, time = [], []
        for cell in self._cells:
            group = self._group_of[cell.layer]
            own = 1.0
            if group >= 0:
                change = gone[group] - self._gone(group, cell.width)
                own = outputs[cell.layer] + self._outputs[cell.layer, group] * change
            time.append(self._flops[cell.layer] * self._speeds[cell.precision] * inputs[cell.layer] * own)
            damage.append(self._precision_damage(cell))
        for group, width in self._widths:
            change = gone[group] - self._gone(group, width)
            time.append(float((self._flops * speeds * outputs * self._inputs[:, group] * change).sum()))
            costs = structure.damage.get(structure.channels[group])
            damage.append(costs[width] if costs else 0.0)
        return np.array(damage), np.array(time)

    def _gone(self, group: int, width: int) -> float:
        place = np.full((1, len(self._codec.names)), float(width))
        return float(self._structure.full[group] - self._codec.numbers(place, self._structure.channels[group])[0])

    def _precision_damage(self, cell: _Cell) -> float:
        dimension = self._structure.precision[cell.layer]
        costs = self._structure.damage.get(dimension) if dimension else None
        return costs[self._precisions[cell.layer].index(cell.precision)] if costs else 0.0

    def _one_each(self) -> LinearConstraint:
        """Every layer has one cell, and every group one width."""
        layers = np.array([cell.layer for cell in self._cells])
        groups = np.array([len(self._group_of) + group for group, _ in self._widths], dtype=np.int64)
        rows = np.concatenate([layers, groups])
        matrix = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))
        return LinearConstraint(matrix, 1, 1)

    def _agreement(self) -> LinearConstraint:
        """A layer's cell has the width of its group."""
        places = {pair: len(self._cells) + place for place, pair in enumerate(self._widths)}
        rules: dict[tuple[int, int], int] = {}
        data = []
        rows = []
        columns = []
        for place, cell in enumerate(self._cells):
            group = self._group_of[cell.layer]
            if group < 0:
                continue
            rule = (cell.layer, cell.width)
            if rule not in rules:
                rules[rule] = len(rules)
                data.append(-1.0)
                rows.append(rules[rule])
                columns.append(places[group, cell.width])
            data.append(1.0)
            rows.append(rules[rule])
            columns.append(place)
        shape = (max(len(rules), 1), len(self._cells) + len(self._widths))
        return LinearConstraint(csr_array((data, (rows, columns)), shape=shape), 0, 0)

    def _row(self, chosen: NDArray[np.bool_]) -> Array:
        row = np.zeros(len(self._codec.names))
        for place in np.flatnonzero(chosen):
            if place >= len(self._cells):
                group, width = self._widths[place - len(self._cells)]
                row[self._columns[group]] = width
                continue
            cell = self._cells[place]
            dimension = self._structure.precision[cell.layer]
            if dimension is not None:
                row[self._codec.names.index(dimension)] = self._precisions[cell.layer].index(cell.precision)
        return self.with_exits(row, 1.0)
