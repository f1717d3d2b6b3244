"""Cuts a graph into stages at exits and around skippable blocks, and lists the steps that run them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from onnx import NodeProto

from evaluators.graph.exporter import INPUT, OUTPUT, gate_logits_name, logits_name
from evaluators.inference.staged import Step
from spaces.candidate import Candidate

Between = Callable[[str, Sequence[str], str], tuple[NodeProto, ...]]
"""Returns the nodes between one tensor and others; the last argument names the exit or block in errors."""


@dataclass(frozen=True)
class Stage:
    """A part of the graph that becomes a file of its own."""

    nodes: tuple[NodeProto, ...]
    input: str
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class LayoutStep:
    """One step without thresholds.

    Args:
        stage: the index of the file that it runs.
        exit: the exit at its end; None without one.
        block: the skippable block that it runs; None for other steps.
        gate: the index of the file with the block's gate alone; None if the step before returns the gate's logit.
        keeps: whether its file returns no features, because the next step reads the same ones.
    """

    stage: int
    exit: str | None = None
    block: str | None = None
    gate: int | None = None
    keeps: bool = False


@dataclass
class Layout:
    """The stages of a graph, and the steps that run them.

    A gate is part of the file before its block. If that file is a block that may itself be skipped, there is also a
    file with the gate alone.
    """

    stages: list[Stage] = field(default_factory=list)
    steps: list[LayoutStep] = field(default_factory=list)

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks that may be skipped, in the order in which they run."""
        return tuple(step.block for step in self.steps if step.block is not None)

    @property
    def nodes(self) -> frozenset[str]:
        """The names of all deployed nodes."""
        return frozenset(node.name for stage in self.stages for node in stage.nodes)

    def steps_with_thresholds(self, candidate: Candidate) -> tuple[Step, ...]:
        """Returns the steps with a candidate's thresholds; empty if no block may be skipped."""
        skips = candidate.active_skips
        if not skips:
            return ()
        confidence_of = dict(zip(candidate.active_exits, candidate.thresholds.confidences, strict=True))
        return tuple(
            Step(
                step.stage,
                confidence_of[step.exit] if step.exit else None,
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
    """Returns the stages and steps of a graph that is cut at some exits and around some blocks.

    Args:
        exits: the tensor that each active exit reads.
        blocks: the input and output tensor of each skippable block.
        position: returns the position in the graph of the node that computes a tensor.
        between: finds the nodes between tensors.
    """
    exit_at = {tensor: name for name, tensor in exits.items()}
    gate_at = {source: block for block, (source, _) in blocks.items()}
    block_of = {ends: block for block, ends in blocks.items()}
    ends = sorted({*exit_at, *(tensor for pair in blocks.values() for tensor in pair)}, key=position)
    layout = Layout()
    start = INPUT
    gate_known = True  # whether the file before always returns the gate's logit

    def add(source: str, outputs: Sequence[str], owner: str) -> int:
        layout.stages.append(Stage(between(source, outputs, owner), source, tuple(outputs)))
        return len(layout.stages) - 1

    owner = ""
    for end in [*ends, OUTPUT]:
        block = block_of.get((start, end))
        exit_name = exit_at.get(end)
        gated = gate_at.get(end)
        owner = exit_name or owner
        exit_logits = [logits_name(exit_name)] if exit_name else []
        logits = [*exit_logits, *([gate_logits_name(gated)] if gated else [])]
        gate = None if block is None or gate_known else add(start, [gate_logits_name(block)], owner)
        if block is not None and exit_name is not None:  # inputs that skip the block reach the exit as well
            layout.steps.append(LayoutStep(add(start, [end], owner), block=block, gate=gate))
            layout.steps.append(LayoutStep(add(end, logits, owner), exit_name, keeps=True))
        else:
            layout.steps.append(LayoutStep(add(start, [end, *logits], owner), exit_name, block, gate))
        start, gate_known = end, block is None or exit_name is not None
    return layout
