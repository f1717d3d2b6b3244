"""The files of one version: ONNX with explicit Q/DQ, one file per stage."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from evaluators.inference.frame_reuse import Reuse
from evaluators.inference.staged import Step, Steps


@dataclass(frozen=True)
class Artifact:
    """One version of a network, ready to be deployed.

    Args:
        stages: portable ONNX files: int8 as symmetric s8 Q/DQ, bias in float. A stage that ends in an exit returns the
            features for the next stage and the exit's logits; the last one returns the logits. `Step` says what they
            return if blocks may be skipped.
        deployed: the same stages in the form of the target's runtime; these are measured and shipped.
        exits: the exit at the end of each stage but the last.
        thresholds: the confidence from which each of these exits answers.
        precisions: the precision in which each layer was written, by the name of its ONNX node.
        boundaries: the number of layers that read from a layer in another precision.
        confidence: the measure of an exit's confidence, a name in `staged.CONFIDENCES`.
        reuse: when a frame of a stream reuses the last key frame's prediction; None if every input is computed.
        blocks: the blocks that may be skipped, in the order in which they run.
        steps: how the stages are run if blocks may be skipped; empty if they run one after the other.
        input_size: height and width that images are resized to before the first stage; None for their own.
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
    input_size: int | None = None

    @property
    def plan(self) -> Steps:
        """How the stages are run: the confidence threshold of each exit, or steps if blocks may be skipped."""
        return self.steps or self.thresholds

    @property
    def is_dynamic(self) -> bool:
        """Whether what an input costs depends on the input."""
        return bool(self.exits or self.blocks) or self.reuse is not None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the deployed stages, the plan, the frame reuse and, with exits, the measure of confidence."""
        gates = repr(self.plan) + (self.confidence if self.exits else "")
        content = hashlib.sha256(gates.encode())
        if self.reuse is not None:
            content.update(repr(self.reuse).encode())
        if self.input_size is not None:
            content.update(repr(self.input_size).encode())
        for stage in self.deployed:
            content.update(stage)
        return content.hexdigest()

    @property
    def size(self) -> int:
        """Bytes on disk of the deployed stages."""
        return sum(len(stage) for stage in self.deployed)
