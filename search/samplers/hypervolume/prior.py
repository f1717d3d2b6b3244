"""What the dimensions of a search mean: layers, channels, precisions and exits, and what is known without measuring."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from search.samplers.hypervolume.encoding import Array, Codec

Kind = Literal["accuracy", "latency", "flops"]


@dataclass(frozen=True)
class Structure:
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

    @property
    def layers(self) -> int:
        """How many layers have a precision."""
        return len(self.precision)

    @property
    def names(self) -> set[str]:
        """Every dimension that it speaks of."""
        return {*self.channels, *self.exits, *(name for name in self.precision if name is not None)}

    def first(self, layers: int) -> "Structure":
        """Returns the network as far as some of its layers, without norms: what runs before an exit."""
        parts = {name: getattr(self, name)[:layers] for name in ("flops", "inputs", "outputs", "precision", "fixed")}
        return replace(self, **parts)

    def kept(self, codec: Codec, rows: Array) -> Array:
        """Returns the channels that rows keep of each dimension, `(n, G)`."""
        columns = [codec.numbers(rows, name) for name in self.channels]
        return np.stack(columns, axis=1) if columns else np.zeros((len(rows), 0))

    def work(self, codec: Codec, rows: Array) -> Array:
        """Returns the FLOPs of each layer and norm of rows, `(n, L + norms)`."""
        gone = self.full - self.kept(codec, rows)
        return self.flops * (1 - gone @ self.inputs.T) * (1 - gone @ self.outputs.T)

    def precisions(self, codec: Codec, rows: Array) -> NDArray[np.int64]:
        """Returns the place of each layer's precision among those with a speed, `(n, L)`."""
        names = list(self.speeds)
        found = np.empty((len(rows), self.layers), dtype=np.int64)
        for layer, dimension in enumerate(self.precision):
            if dimension is None:
                found[:, layer] = names.index(self.fixed[layer])
            else:
                choices: Sequence[str] = codec.space[dimension].choices  # type: ignore[attr-defined]
                places = np.array([names.index(choice) for choice in choices])
                found[:, layer] = places[codec.numbers(rows, dimension).astype(int)]
        return found

    def estimated_damage(self, codec: Codec, rows: Array) -> Array:
        """Returns what each dimension of rows is estimated to cost in accuracy, `(n, dimensions with an estimate)`."""
        index = {name: place for place, name in enumerate(codec.names)}
        columns = [np.array(costs)[rows[:, index[name]].astype(int)] for name, costs in self.damage.items()]
        return np.stack(columns, axis=1) if columns else np.zeros((len(rows), 0))


@dataclass(frozen=True)
class Aim:
    """What is known of one objective of a study.

    Args:
        kind: what it measures.
        dense: the dense network's value.
        worst: values beyond it count for nothing.
        chance: of accuracy: what guessing comes to.
        aimed: what the mean is brought to where thresholds of exits are solved and the longest path costs more.
    """

    kind: Kind
    dense: float
    worst: float
    chance: float = 0.0
    aimed: float = float("inf")

    @property
    def least_cost(self) -> float:
        """The cost that nothing is below: all answers right, or none of a time or a count."""
        return -1.0 if self.kind == "accuracy" else 0.0


@dataclass(frozen=True)
class Link:
    """A constraint that is a function of an objective: `slope * value + offset`, feasible at or below 0."""

    objective: int
    slope: float
    offset: float


@dataclass(frozen=True)
class Meaning:
    """What a study's dimensions, objectives and constraints mean.

    Args:
        structure: of its dimensions.
        aims: of its objectives, in their order.
        links: from constraints, by name, to objectives.
        is_solved: whether there are exits whose thresholds are solved inside of each evaluation.
    """

    structure: Structure
    aims: tuple[Aim, ...]
    links: Mapping[str, Link] = field(default_factory=dict)
    is_solved: bool = False
