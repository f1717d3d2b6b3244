"""From a compressed network in torch to its artifact, without an export."""

import numpy as np
import torch
from numpy.typing import NDArray

from evaluators.artifact import Artifact
from evaluators.artifact.exporter import OUTPUT, logits_name
from evaluators.artifact.qdq import Quantizer, Ranges
from evaluators.artifact.template import Stage, Template
from evaluators.runtimes.ort import activation_ranges
from evaluators.target import Runtime
from spaces.candidate import Candidate
from spaces.network import ExitNetwork


class ArtifactBuilder:
    """Writes the artifact of any candidate of one network.

    The dense network is exported once and its activation ranges are read once; a candidate's file is that graph with
    sliced weights and Q/DQ written in.

    Args:
        network: the dense network with its exits, in evaluation mode.
        calibration: images that the ranges are read from, `(n, c, h, w)`.
        runtime: what will run the artifact.

    Raises:
        ExportError: torch cannot export the network.
        StructureError: an exit sits where the graph cannot be cut in two.
    """

    def __init__(self, network: ExitNetwork, calibration: NDArray[np.float32], runtime: Runtime) -> None:
        self._runtime = runtime
        self._template = Template(network, torch.from_numpy(calibration[:1]))
        outputs = [OUTPUT, *(logits_name(name) for name in network.exit_names)]
        weight_bits = runtime.capabilities().weight_bits
        self._quantizer = Quantizer(self._template.nodes, self._template.layers, outputs, weight_bits)
        self._everything = Stage(self._template.nodes, self._template.stages(())[0].input, tuple(outputs))
        self.ranges: Ranges = self.read_ranges(network, calibration)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that can be int8, in the order in which they run."""
        return tuple(self._template.layers)

    def read_ranges(self, network: ExitNetwork, images: NDArray[np.float32]) -> Ranges:
        """Returns the range of every activation of a network of this structure, over `images`."""
        weights = self._template.weights(network.state_dict())
        model = self._template.file(self._everything, self._template.nodes, weights)
        return activation_ranges(model, self._quantizer.activations(), images)

    def boundaries(self, candidate: Candidate) -> int:
        """Returns how many layers read from a layer of another precision; each costs a conversion."""
        return self._quantizer.place(_int8(candidate)).boundaries

    def build(self, network: ExitNetwork, candidate: Candidate, ranges: Ranges | None = None) -> Artifact:
        """Returns the artifact of a network that has been compressed as `candidate` says.

        Args:
            network: compressed and recovered, in evaluation mode.
            candidate: its precisions and thresholds.
            ranges: of the activations; the dense network's where not given.
        """
        weights = self._template.weights(network.state_dict())
        placement = self._quantizer.place(_int8(candidate))
        files = []
        for stage in self._template.stages(candidate.active_exits):
            nodes, values = self._quantizer.write(stage, placement, weights, ranges or self.ranges)
            files.append(self._template.file(stage, nodes, values))
        return Artifact(
            stages=tuple(files),
            deployed=tuple(self._runtime.deployable(file) for file in files),
            exits=candidate.active_exits,
            thresholds=tuple(candidate.thresholds[name] for name in candidate.active_exits),
        )


def _int8(candidate: Candidate) -> list[str]:
    return [layer for layer, precision in candidate.precision.items() if precision == "int8"]
