"""What is known of a problem before anything is measured: the network's structure, its objectives and its limits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from search.samplers.hypervolume.encoding import Array, Codec

Kind = Literal["accuracy", "latency", "flops", "params", "size"]


@dataclass(frozen=True)
class NetworkStructure:
    """A network as a sampler sees it: `L` layers in the order in which they run, `G` dimensions of channels.

    Behind the layers, `flops`, `inputs` and `outputs` may have rows for what has FLOPs but no precision: norms.

    Args:
        channels: the dimensions of channels, `G` names.
        full: how many channels each of them has in the dense network, `(G,)`.
        flops: of each layer, and then of each norm, in the dense network, `(L + norms,)`.
        inputs: the share of a layer's inputs that goes with one channel of each dimension, `(L + norms, G)`.
        outputs: the same of its outputs.
        precision: for each layer its dimension; None where it has no choice.
        fixed: for each layer the precision that it has where it has no choice.
        speeds: seconds that a FLOP takes in each precision, against the first one.
        exits: the dimensions of thresholds, by depth; none where thresholds are no dimensions.
        exit_after: for each of them, or else for each exit whose threshold is solved, the number of layers before it.
        damage: for some dimensions an estimate of what each of their values costs in accuracy, in any unit.
        depth: the dimensions of blocks that stay, `D` names.
        runs_from: for each layer and norm the fewest blocks that each dimension of depth keeps with it, 0 where it runs
            in any case, `(L + norms, D)`.
        size: the dimension of the input's size; None without.
        size_work: for each of its choices its share of the work at the images' own size.
    """

    channels: tuple[str, ...]
    full: Array
    flops: Array
    inputs: Array
    outputs: Array
    precision: tuple[str | None, ...]
    fixed: tuple[str, ...]
    speeds: Mapping[str, float]
    exits: tuple[str, ...] = ()
    exit_after: tuple[int, ...] = ()
    damage: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    depth: tuple[str, ...] = ()
    runs_from: Array = field(default_factory=lambda: np.zeros((0, 0)))
    size: str | None = None
    size_work: tuple[float, ...] = ()

    @property
    def layers(self) -> int:
        """How many layers have a precision."""
        return len(self.precision)

    @property
    def names(self) -> set[str]:
        """Every dimension that it speaks of."""
        precisions = (name for name in self.precision if name is not None)
        return {*self.channels, *self.exits, *self.depth, *precisions, *((self.size,) if self.size else ())}

    def first(self, layers: int) -> "NetworkStructure":
        """Returns the network as far as some of its layers, without norms: what runs before an exit."""
        names = ("flops", "inputs", "outputs", "precision", "fixed", "runs_from")
        return replace(self, **{name: getattr(self, name)[:layers] for name in names})

    def kept(self, codec: Codec, rows: Array) -> Array:
        """Returns the channels that rows `(n, d)` keep of each dimension, `(n, G)`."""
        columns = [codec.numbers(rows, name) for name in self.channels]
        return np.stack(columns, axis=1) if columns else np.zeros((len(rows), 0))

    def work(self, codec: Codec, rows: Array) -> Array:
        """Returns the FLOPs of each layer and norm of rows `(n, d)`, `(n, L + norms)`."""
        removed = self.full - self.kept(codec, rows)
        work = self.flops * (1 - removed @ self.inputs.T) * (1 - removed @ self.outputs.T)
        return work * self.runs(codec, rows) * self.pixels(codec, rows)[:, None]

    def pixels(self, codec: Codec, rows: Array) -> Array:
        """Returns the work per layer of rows `(n, d)` as a share of that at the images' own size, `(n,)`."""
        if self.size is None:
            return np.ones(len(rows))
        shares: Array = np.array(self.size_work)[codec.numbers(rows, self.size).astype(int)]
        return shares

    def kept_blocks(self, codec: Codec, rows: Array) -> Array:
        """Returns the share of its blocks that rows `(n, d)` keep in each dimension of depth, `(n, D)`."""
        columns = [codec.numbers(rows, name) / codec.space[name].high for name in self.depth]  # type: ignore[attr-defined]
        return np.stack(columns, axis=1) if columns else np.zeros((len(rows), 0))

    def runs(self, codec: Codec, rows: Array) -> Array:
        """Returns 1 for each layer and norm that rows `(n, d)` keep, 0 for those in blocks that are left out."""
        running = np.ones((len(rows), len(self.flops)))
        for column, name in enumerate(self.depth):
            running *= codec.numbers(rows, name)[:, None] >= self.runs_from[:, column]
        return running

    def precisions(self, codec: Codec, rows: Array) -> NDArray[np.int64]:
        """Returns the index of each layer's precision in `speeds` for rows `(n, d)`, `(n, L)`."""
        names = list(self.speeds)
        indices = np.empty((len(rows), self.layers), dtype=np.int64)
        for layer, dimension in enumerate(self.precision):
            if dimension is None:
                indices[:, layer] = names.index(self.fixed[layer])
            else:
                choices: Sequence[str] = codec.space[dimension].choices  # type: ignore[attr-defined]
                of_choice = np.array([names.index(choice) for choice in choices])
                indices[:, layer] = of_choice[codec.numbers(rows, dimension).astype(int)]
        return indices

    def estimated_damage(self, codec: Codec, rows: Array) -> Array:
        """Returns what each dimension is estimated to cost rows `(n, d)` in accuracy, `(n, estimated dimensions)`."""
        column_of = {name: column for column, name in enumerate(codec.names)}
        columns = [np.array(costs)[rows[:, column_of[name]].astype(int)] for name, costs in self.damage.items()]
        return np.stack(columns, axis=1) if columns else np.zeros((len(rows), 0))


@dataclass(frozen=True)
class CostTarget:
    """What is known of one objective of a study: where it starts, and where it has to get to.

    Args:
        kind: what it measures.
        dense: the dense network's value.
        worst: the reference point of hypervolume: values beyond it count for nothing.
        chance: of accuracy: what guessing comes to.
        aimed_at: what the mean is brought to where thresholds of exits are solved and the longest path costs more;
            infinite where nothing is.
    """

    kind: Kind
    dense: float
    worst: float
    chance: float = 0.0
    aimed_at: float = float("inf")

    @property
    def ideal_cost(self) -> float:
        """The cost that nothing is below: all answers right, or none of a time or a count."""
        return -1.0 if self.kind == "accuracy" else 0.0


@dataclass(frozen=True)
class LinearConstraint:
    """A constraint that is a function of an objective: `slope * value + offset`, feasible at or below 0.

    Args:
        objective: its index.
        slope: by how much the constraint grows with the objective's value.
        offset: the constraint where the objective is 0.
    """

    objective: int
    slope: float
    offset: float


@dataclass(frozen=True)
class ProblemPrior:
    """What is known of a study's dimensions, objectives and constraints beforehand.

    Args:
        structure: of its dimensions.
        objectives: what is known of each, in their order.
        linear_constraints: by name, those that are functions of an objective.
        solves_thresholds: whether there are exits whose thresholds are solved inside of each evaluation.
        allowed: the share of the dense network's time and FLOPs that limits allow, those on no objective included.
    """

    structure: NetworkStructure
    objectives: tuple[CostTarget, ...]
    linear_constraints: Mapping[str, LinearConstraint] = field(default_factory=dict)
    solves_thresholds: bool = False
    allowed: float = 1.0
