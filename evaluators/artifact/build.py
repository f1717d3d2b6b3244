"""From a compressed network in torch to its artifact, without an export."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from evaluators.artifact import Artifact, fp8
from evaluators.artifact.exporter import INPUT, OPSET, OUTPUT, ExportError, gate_logits_name, logits_name
from evaluators.artifact.half import HalfWriter
from evaluators.artifact.layout import Layout, Stage
from evaluators.artifact.qdq import NO_GRIDS, Grids, Placement, Quantizer, Ranges
from evaluators.artifact.scheme import MINMAX, Scheme
from evaluators.artifact.template import Template, output_channels
from evaluators.runtimes.ort import activation_ranges, load
from evaluators.target import ALLOW_TF32, Runtime
from spaces.candidate import Candidate
from spaces.network import ExitNetwork

_CLOSE = 1e-3
"""A file and torch may differ by this share of the largest logit: deep networks amplify what rounding does."""


class ArtifactBuilder:
    """Writes the artifact of any candidate of one network.

    The dense network is exported once and its activation ranges are read once; a candidate's file is that graph with
    sliced weights, Q/DQ and fp16 written in.

    Args:
        network: the dense network with its exits, in evaluation mode.
        calibration: images that the ranges are read from, `(n, c, h, w)`.
        runtime: what will run the artifact.
        tf32: whether its fp32 layers may run in TF32.
        scheme: how int8 is made.

    Raises:
        ExportError: torch cannot export the network.
        StructureError: an exit sits where the graph cannot be cut in two.
    """

    def __init__(
        self,
        network: ExitNetwork,
        calibration: NDArray[np.float32],
        runtime: Runtime,
        tf32: bool = False,
        scheme: Scheme = MINMAX,
    ) -> None:
        self._runtime = runtime
        self._properties = ALLOW_TF32 if tf32 else {}
        self._template = Template(network, torch.from_numpy(calibration[:1]))
        outputs = [OUTPUT, *(logits_name(name) for name in network.exit_names)]
        outputs += [gate_logits_name(block) for block in network.skip_blocks]
        able = self._able = runtime.capabilities()
        self._quantizer = Quantizer(
            self._template.nodes,
            self._template.layers,
            outputs,
            able.weight_bits,
            able.quantized_add,
            per_channel=scheme.weights == "per-channel",
        )
        self._half = HalfWriter(self._template.nodes, self._template.layers)
        self._float8 = fp8.Float8Writer(self._template.layers)
        self._everything = Stage(self._template.nodes, INPUT, tuple(outputs))
        self._probe = calibration[:2]
        refusal = self.disagreement(network)
        if refusal is not None:
            raise ExportError(f"the exported network answers as in torch, got another answer: {': '.join(refusal)}")
        self.ranges: Ranges = self.read_ranges(network, calibration)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that have a precision, in the order in which they run."""
        return tuple(self._template.layers)

    def read_ranges(self, network: ExitNetwork, images: NDArray[np.float32]) -> Ranges:
        """Returns the range of every activation of a network of this structure, over `images`.

        Where blocks can be skipped, it spans what they give and what passes them by, as the gates were trained.
        """
        weights = self._template.weights(network.state_dict())
        found = []
        for nodes in self._template.flows:
            model = self._template.file(self._everything, nodes, weights)
            found.append(activation_ranges(model, self._quantizer.activations(), images))
        return {name: (min(r[name][0] for r in found), max(r[name][1] for r in found)) for name in found[0]}

    def disagreement(self, network: ExitNetwork) -> tuple[str, str] | None:
        """Returns why a network of this structure cannot be written by slicing; None where its file answers as it does.

        Of two calibration images, so that a batch size that was written into the graph is noticed.
        """
        weights = self._template.weights(network.state_dict())
        model = self._template.file(self._everything, self._template.nodes, weights)
        try:
            last, *exits = load(model, 0)(self._probe)
        except Exception as error:
            return "its width is written into the exported graph", str(error).splitlines()[0]
        with torch.no_grad():
            expected = [logits.numpy() for logits in network(torch.from_numpy(self._probe))]
        for answer, logits in zip([*exits, last], expected, strict=True):
            difference = _difference(answer, logits)
            if not difference <= _CLOSE:
                return "its exported graph answers otherwise", f"by {difference:.2g} of the largest logit"
        return None

    def written_precisions(self, network: ExitNetwork, candidate: Candidate) -> dict[str, str]:
        """Returns the precision that each layer gets in the artifact.

        It is the candidate's, but for layers that the target would run no faster in its 8 bits: those with too few
        channels left, and, where it asks for any number of them, grouped ones. They are fp16 if the target has it, else
        fp32.
        """
        precisions = dict.fromkeys(self.layers, "fp32") | dict(candidate.precision)
        instead = "fp16" if "fp16" in self._able.precisions else "fp32"
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        for layer, weight in self._template.layer_weights.items():
            if precisions[layer] in ("int8", "fp8") and not self._takes_8_bits(weight, shapes[weight]):
                precisions[layer] = instead
        return precisions

    def _takes_8_bits(self, weight: str, shape: tuple[int, ...]) -> bool:
        fewest = self._able.int8_channels
        return fewest <= 1 or (weight not in self._template.grouped and min(shape[:2]) >= fewest)

    def boundaries(self, candidate: Candidate) -> int:
        """Returns how many layers read from a layer of another precision, as the candidate asks for them.

        Each costs a conversion.
        """
        placement, halves = self._place(candidate.precision)
        eights = self._float8.place(_at("fp8", candidate.precision))
        others = dict.fromkeys(halves, "fp16") | dict.fromkeys(eights, "fp8")
        return self._quantizer.boundaries(dict.fromkeys(placement.nodes, "int8") | others)

    def _place(self, precisions: Mapping[str, str]) -> tuple[Placement, frozenset[str]]:
        """Returns where Q/DQ goes and which nodes are fp16, for the precision of each layer."""
        placement = self._quantizer.place(_at("int8", precisions))
        return placement, self._half.place(_at("fp16", precisions), placement.tensors)

    def build(
        self, network: ExitNetwork, candidate: Candidate, ranges: Ranges | None = None, grids: Grids = NO_GRIDS
    ) -> Artifact:
        """Returns the artifact of a network that has been compressed as `candidate` says.

        Args:
            network: compressed and recovered, in evaluation mode.
            candidate: its precisions and thresholds.
            ranges: of the activations; the dense network's where not given.
            grids: weights that something learned has put on their grids.

        Raises:
            HalfPrecisionError: a weight of an fp16 layer is beyond fp16's range.
        """
        weights = self._template.weights(network.state_dict())
        precisions = self.written_precisions(network, candidate)
        placement, halves = self._place(precisions)
        eights, ranges = self._float8.place(_at("fp8", precisions)), ranges or self.ranges
        files: list[bytes] = []
        layout = self._template.layout(candidate.active_exits, tuple(candidate.active_skips))
        for stage in layout.stages:
            nodes, values = self._quantizer.write(stage, placement, weights, ranges, grids)
            opset = fp8.OPSET if any(node.name in eights for node in nodes) else OPSET
            nodes, values = self._float8.write(nodes, eights, values, ranges)
            nodes, values = self._half.write(nodes, halves, values, stage.outputs)
            # What is built for one shape has to know the channels of its input.
            channels = output_channels(files[-1]) if files and not self._able.dynamic_batch else {}
            nodes = nodes if opset == OPSET else fp8.in_opset(nodes, values)
            files.append(self._template.file(stage, nodes, values, channels, opset, self._properties))
        return Artifact(
            stages=tuple(files),
            deployed=tuple(self._runtime.deployable(file) for file in files),
            exits=candidate.active_exits,
            thresholds=tuple(candidate.thresholds[name] for name in candidate.active_exits),
            precisions=self._deployed_precisions(precisions, layout),
            blocks=layout.blocks,
            plan=layout.plan(candidate),
        )

    def _deployed_precisions(self, precisions: Mapping[str, str], layout: Layout) -> dict[str, str]:
        """Returns the precision of each layer that is deployed, by its ONNX node: heads that never answer are not."""
        deployed = {node.name for stage in layout.stages for node in stage.nodes}
        named = {self._template.layers[layer]: given for layer, given in precisions.items()}
        return {node: given for node, given in named.items() if node in deployed}


def _difference(answer: NDArray[np.float32], logits: NDArray[np.float32]) -> float:
    """Returns the largest difference as a share of the largest logit, or as it is where all logits are 0."""
    if answer.shape != logits.shape:
        return np.nan
    return float(np.abs(answer - logits).max() / (np.abs(logits).max() or 1.0))


def _at(precision: str, precisions: Mapping[str, str]) -> list[str]:
    return [layer for layer, given in precisions.items() if given == precision]
