"""Where a graph is cut into files, and in which order they run: between exits and around blocks that may be skipped."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from onnx import NodeProto

from evaluators.graph.exporter import INPUT, OUTPUT, gate_logits_name, logits_name
from evaluators.inference.staged import Step
from spaces.candidate import Candidate

Between = Callable[[str, Sequence[str], str], tuple[NodeProto, ...]]
"""Returns the nodes that lead from one tensor to others; told whose place it is, for errors."""


@dataclass(frozen=True)
class Stage:
    """A part of the graph that becomes a file of its own."""

    nodes: tuple[NodeProto, ...]
    input: str
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class LaidStep:
    """One step, before thresholds are known.

    Args:
        stage: the file that it runs.
        exit: the exit at its end.
        block: the block that it is.
        gate: the file that tells whether the block is run, where the step before may not have told.
        keeps: whether its file only reads the features, and returns none.
    """

    stage: int
    exit: str | None = None
    block: str | None = None
    gate: int | None = None
    keeps: bool = False


@dataclass
class Layout:
    """The files that a graph falls into, and the steps that run them.

    A gate is computed in the file before its block. Where that file is a block that may itself be skipped, there is a
    file of the gate alone, too.
    """

    stages: list[Stage] = field(default_factory=list)
    steps: list[LaidStep] = field(default_factory=list)

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks that may be skipped, in the order in which they run."""
        return tuple(step.block for step in self.steps if step.block is not None)

    @property
    def nodes(self) -> frozenset[str]:
        """The names of all nodes that are deployed."""
        return frozenset(node.name for stage in self.stages for node in stage.nodes)

    def planned(self, candidate: Candidate) -> tuple[Step, ...]:
        """Returns the steps with a candidate's thresholds; none where no block may be skipped."""
        skips = candidate.active_skips
        if not skips:
            return ()
        return tuple(
            Step(
                step.stage,
                candidate.thresholds[step.exit] if step.exit else None,
                skips[step.block] if step.block else None,
                step.gate,
                step.keeps,
            )
            for step in self.steps
        )


def lay_out(
    exits: Mapping[str, str],
    blocks: Mapping[str, tuple[str, str]],
    position: Callable[[str], int],
    between: Between,
) -> Layout:
    """Returns the files between the places where the graph is cut.

    Args:
        exits: the tensor that each active exit reads.
        blocks: what each block that may be skipped reads and gives.
        position: where in the graph a tensor is made.
        between: finds the nodes between tensors.
    """
    exit_at = {tensor: name for name, tensor in exits.items()}
    gate_at = {source: block for block, (source, _) in blocks.items()}
    block_of = {ends: block for block, ends in blocks.items()}
    ends = sorted({*exit_at, *(tensor for pair in blocks.values() for tensor in pair)}, key=position)
    layout = Layout()
    start = INPUT
    told = True

    def add(source: str, outputs: Sequence[str], place: str) -> int:
        layout.stages.append(Stage(between(source, outputs, place), source, tuple(outputs)))
        return len(layout.stages) - 1

    place = ""
    for end in [*ends, OUTPUT]:
        block = block_of.get((start, end))
        exit_name = exit_at.get(end)
        gated = gate_at.get(end)
        place = exit_name or place
        exit_logits = [logits_name(exit_name)] if exit_name else []
        logits = [*exit_logits, *([gate_logits_name(gated)] if gated else [])]
        gate = None if block is None or told else add(start, [gate_logits_name(block)], place)
        if block is not None and exit_name is not None:  # who skips the block reaches the exit as well
            layout.steps.append(LaidStep(add(start, [end], place), block=block, gate=gate))
            layout.steps.append(LaidStep(add(end, logits, place), exit_name, keeps=True))
        else:
            layout.steps.append(LaidStep(add(start, [end, *logits], place), exit_name, block, gate))
        start, told = end, block is None or exit_name is not None
    return layout
