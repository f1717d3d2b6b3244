"""From a compressed network in torch to its artifact, without an export."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from evaluators.artifact import Artifact
from evaluators.graph.exporter import INPUT, OPSET, OUTPUT, ExportError, gate_logits_name, logits_name
from evaluators.graph.probe import Means, input_means
from evaluators.graph.stages import Layout, Stage
from evaluators.graph.template import Arrays, Template, output_channels
from evaluators.quantization import fp8, int4
from evaluators.quantization.adaround import Learning, Report, RoundingTask
from evaluators.quantization.batchnorm_moments import Moments, activation_moments
from evaluators.quantization.bias_correction import corrected
from evaluators.quantization.calibration.ranges import calibrated_ranges
from evaluators.quantization.fp16 import HalfWriter
from evaluators.quantization.int8 import FOLLOWING, NO_GRIDS, Grids, Placement, Quantizer, Ranges
from evaluators.quantization.scheme import MINMAX, Scheme
from evaluators.quantization.trainable_graph import TrainableGraph
from evaluators.runtimes.base import FP32_IN_METADATA, Fp32In, Runtime, deployed_stages
from evaluators.runtimes.onnxruntime_cpu import load
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork

_MEAN_IMAGES = 64
"""So many calibration images tell the mean of a layer's input."""
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
        fp32_in: what its fp32 layers may run in.
        scheme: how int8 is made.
        confidence: what tells how sure an exit is.

    Raises:
        ExportError: torch cannot export the network.
        StructureError: an exit sits where the graph cannot be cut in two.
        UnknownNameError: the scheme names a calibrator that does not exist.
        QuantizationError: the scheme's calibrator needs a histogram of an activation that is not finite.
    """

    def __init__(
        self,
        network: ExitNetwork,
        calibration: NDArray[np.float32],
        runtime: Runtime,
        fp32_in: Fp32In = "fp32",
        scheme: Scheme = MINMAX,
        confidence: str = "softmax",
    ) -> None:
        self._confidence = confidence
        self._runtime = runtime
        self._scheme = scheme
        self._calibration = calibration[:_MEAN_IMAGES]
        self._properties = FP32_IN_METADATA[fp32_in]
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
            following={*FOLLOWING, *able.int8_operators},
        )
        self._half = HalfWriter(self._template.nodes, self._template.layers)
        self._float8 = fp8.Float8Writer(self._template.layers)
        self._int4 = int4.Int4Writer(self._template.layers)
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

    @property
    def grid(self) -> tuple[int, str]:
        """What weights are rounded to: the largest step, and whether each output channel has a scale of its own."""
        return self._quantizer.weight_limit, self._scheme.weights

    def read_ranges(self, network: ExitNetwork, images: NDArray[np.float32]) -> Ranges:
        """Returns the range of every activation of a network of this structure, as the scheme says.

        Calibrated over `images`, or from batch normalisation, which only takes from them what the input is like. Where
        blocks can be skipped, it spans what they give and what passes them by.

        Raises:
            QuantizationError: an operator stands in the way of distributions.
        """
        if self._scheme.ranges == "batchnorm":
            moments = {name: found.range for name, found in self._moments(network, images).items()}
            for source, result in self._template.blocks.values():
                moments[result] = _spanning(moments[source], moments[result])
            return {tensor: moments[tensor] for tensor in self._quantizer.activations()}
        weights, names = self._template.weights(network.state_dict()), self._quantizer.activations()
        models = [self._template.file(self._everything, nodes, weights) for nodes in self._template.flows]
        every = [calibrated_ranges(model, names, images, self._scheme) for model in models]
        return {name: _spanning(*(ranges[name] for ranges in every)) for name in every[0]}

    def _moments(self, network: ExitNetwork, images: NDArray[np.float32]) -> dict[str, Moments]:
        return activation_moments(self._template, self._everything, network.state_dict(), images)

    def _input_means(self, network: ExitNetwork, weights: Arrays) -> Means:
        """Returns the mean input of each layer that the scheme corrects biases by; of none where it does not."""
        if self._scheme.bias_correction == "none":
            return {}
        if self._scheme.bias_correction == "batchnorm":
            found = self._moments(network, self._calibration)
            layers = [node for node in self._everything.nodes if node.op_type in ("Conv", "Gemm")]
            return {node.input[1]: found[node.input[0]].channel_means for node in layers}
        model = self._template.file(self._everything, self._template.flows[-1], weights)
        return input_means(model, self._everything.nodes, self._calibration)

    def learn_rounding(
        self,
        network: ExitNetwork,
        candidate: Candidate,
        images: NDArray[np.float32],
        learning: Learning,
        ranges: Ranges | None = None,
        report: Report = lambda _done, _total: None,
    ) -> Grids:
        """Returns the weights of the candidate's int8 layers, rounded so that they answer as in float.

        Args:
            network: compressed and recovered, in evaluation mode.
            candidate: its precisions.
            images: for calibration.
            learning: for how long and how.
            ranges: of the activations; the dense network's where not given.
            report: told how many layers are done.
        """
        placement, _ = self._place(self.written_precisions(network, candidate))
        weights = self._template.weights(network.state_dict())
        task = RoundingTask(
            self._template, self._everything, self._quantizer, placement, weights, ranges or self.ranges
        )
        return task.learn(images, learning, report)

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
        channels left, and, where it asks for any number of them, grouped ones; and the linear layers that exits answer
        by, where the target computes what gives a float in float. They are fp16 if the target has it, else fp32.
        """
        precisions = dict.fromkeys(self.layers, "fp32") | dict(candidate.precision)
        instead = "fp16" if "fp16" in self._able.precisions else "fp32"
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        floats = () if self._able.int8_heads else self._template.answering
        for layer, weight in self._template.layer_weights.items():
            takes = self._takes_8_bits(weight, shapes[weight]) and not (precisions[layer] == "int8" and layer in floats)
            if precisions[layer] in ("int8", "fp8") and not takes:
                precisions[layer] = instead
        return precisions

    def _takes_8_bits(self, weight: str, shape: tuple[int, ...]) -> bool:
        fewest = self._able.int8_channels
        return fewest <= 1 or (weight not in self._template.grouped and min(shape[:2]) >= fewest)

    def boundaries(self, candidate: Candidate) -> int:
        """Returns how many layers read from a layer that runs in another precision, as the candidate asks for them.

        Each costs a conversion. Layers that are only stored in 4 bits run in fp32; heads that never answer do not run,
        nor do gates of blocks that always run.
        """
        placement, halves = self._place(candidate.precision)
        eights = self._float8.place(_at("fp8", candidate.precision))
        others = dict.fromkeys(halves, "fp16") | dict.fromkeys(eights, "fp8")
        precisions = dict.fromkeys(placement.nodes, "int8") | others
        return self._quantizer.boundaries(precisions, self._layout(candidate).nodes)

    def _place(self, precisions: Mapping[str, str]) -> tuple[Placement, frozenset[str]]:
        """Returns where Q/DQ goes and which nodes are fp16, for the precision of each layer."""
        placement = self._quantizer.place(_at("int8", precisions))
        return placement, self._half.place(_at("fp16", precisions), placement.tensors)

    def trainable(self) -> TrainableGraph:
        """Returns the graph as something that trains in torch.

        Raises:
            QuantizationError: it has an operator that cannot be trained through.
        """
        return TrainableGraph(self._template, self._quantizer)

    def int8_placement(self, network: ExitNetwork, candidate: Candidate) -> Placement:
        """Returns where Q/DQ goes in the artifact of a network that has been compressed as `candidate` says."""
        return self._place(self.written_precisions(network, candidate))[0]

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
            QuantizationError: a weight of an fp16 layer is beyond fp16's range.
        """
        weights = self._template.weights(network.state_dict())
        precisions = self.written_precisions(network, candidate)
        placement, halves = self._place(precisions)
        eights, ranges = self._float8.place(_at("fp8", precisions)), ranges or self.ranges
        means = self._input_means(network, weights) if placement.nodes else {}
        fours = self._int4.place(_at("int4", precisions))
        files: list[bytes] = []
        layout = self._layout(candidate)
        for stage in layout.stages:
            nodes, values = self._quantizer.write(stage, placement, weights, ranges, grids)
            nodes, values = corrected(nodes, values, means)
            wanted = ((fp8.OPSET, eights), (int4.OPSET, fours))
            opset = max([OPSET, *(least for least, placed in wanted if any(node.name in placed for node in nodes))])
            nodes, values = self._float8.write(nodes, eights, values, ranges)
            nodes, values = self._int4.write(nodes, fours, values)
            nodes, values = self._half.write(nodes, halves, values, stage.outputs)
            # What is built for one shape has to know the channels of its input.
            channels = output_channels(files[-1]) if files and not self._able.dynamic_batch else {}
            nodes = nodes if opset == OPSET else fp8.in_opset(nodes, values)
            files.append(self._template.file(stage, nodes, values, channels, opset, self._properties))
        return Artifact(
            stages=tuple(files),
            deployed=deployed_stages(self._runtime, files, bool(layout.blocks)),
            exits=candidate.active_exits,
            thresholds=tuple(candidate.thresholds[name] for name in candidate.active_exits),
            precisions=self._deployed_precisions(precisions, layout),
            boundaries=self.boundaries(replace(candidate, precision=precisions)),
            confidence=self._confidence,
            blocks=layout.blocks,
            steps=layout.planned(candidate),
        )

    def _layout(self, candidate: Candidate) -> Layout:
        return self._template.layout(candidate.active_exits, tuple(candidate.active_skips))

    def _deployed_precisions(self, precisions: Mapping[str, str], layout: Layout) -> dict[str, str]:
        """Returns the precision of each layer that is deployed, by its ONNX node.

        Heads that never answer and gates of blocks that always run are not.
        """
        named = {self._template.layers[layer]: given for layer, given in precisions.items()}
        return {node: given for node, given in named.items() if node in layout.nodes}


def _spanning(*ranges: tuple[float, float]) -> tuple[float, float]:
    """Returns the range that holds all of these."""
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _difference(answer: NDArray[np.float32], logits: NDArray[np.float32]) -> float:
    """Returns the largest difference as a share of the largest logit, or as it is where all logits are 0."""
    if answer.shape != logits.shape:
        return np.nan
    return float(np.abs(answer - logits).max() / (np.abs(logits).max() or 1.0))


def _at(precision: str, precisions: Mapping[str, str]) -> list[str]:
    return [layer for layer, given in precisions.items() if given == precision]
