"""What would be deployed: ONNX with explicit Q/DQ, one file per stage, written without an export per candidate."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from evaluators.inference.frame_reuse import Reuse
from evaluators.inference.staged import Step, Steps


@dataclass(frozen=True)
class Artifact:
    """One version of a network, ready to be shipped.

    Args:
        stages: portable ONNX files: int8 as symmetric s8 Q/DQ, bias in float. A stage that ends in an exit returns the
            features for the next stage and the exit's logits; the last one returns the logits. What they return where
            blocks may be skipped is in `Step`.
        deployed: the same stages as the target's runtime wants them; what is measured.
        exits: the exit at the end of each stage but the last.
        thresholds: the confidence at which each of them answers.
        precisions: what each layer was written in, by the name of its ONNX node.
        boundaries: how many layers read from a layer that runs in another precision.
        confidence: what tells how sure an exit is, a name in `staged.CONFIDENCES`.
        reuse: when a frame of a stream is answered as the last key frame was; None where each input is computed.
        blocks: those that may be skipped, in the order in which they run.
        steps: how the stages are run where blocks may be skipped; where none may, they run one after the other.
    """

    stages: tuple[bytes, ...]
    deployed: tuple[bytes, ...]
    exits: tuple[str, ...]
    thresholds: tuple[float, ...]
    precisions: Mapping[str, str] = field(default_factory=dict)
    boundaries: int = 0
    confidence: str = "softmax"
    reuse: Reuse | None = None
    blocks: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()

    @property
    def plan(self) -> Steps:
        """How the stages are run: a confidence for each exit, or steps where blocks may be skipped."""
        return self.steps or self.thresholds

    @property
    def is_dynamic(self) -> bool:
        """Whether what an input costs depends on the input."""
        return bool(self.exits or self.blocks) or self.reuse is not None

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the deployed stages, the thresholds and, with exits, what they are held against."""
        gates = repr(self.plan) + (self.confidence if self.exits else "")
        content = hashlib.sha256(gates.encode())
        if self.reuse is not None:
            content.update(repr(self.reuse).encode())
        for stage in self.deployed:
            content.update(stage)
        return content.hexdigest()

    @property
    def size(self) -> int:
        """Bytes on disk of what is deployed."""
        return sum(len(stage) for stage in self.deployed)
