"""Writes the artifact of a compressed torch network, without exporting it again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from evaluators.artifact import Artifact
from evaluators.graph.exporter import INPUT, OPSET, OUTPUT, ExportError, gate_logits_name, logits_name
from evaluators.graph.probe import Means, input_means
from evaluators.graph.stages import Layout, Stage
from evaluators.graph.template import Arrays, Template, output_channels
from evaluators.inference.resizing import resized
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
from spaces.errors import QuantizationError

_MEAN_IMAGES = 64
"""The number of calibration images from which the means of layers' inputs are computed."""
_MOST_FORMS = 200
"""Graphs without some blocks that are kept in memory, at most."""
_TOLERANCE = 1e-3
"""A file and torch may differ by this share of the largest logit: deep networks amplify rounding errors."""


@dataclass(frozen=True)
class _Form:
    """A graph without the blocks that are left out, and what writes its layers in each precision."""

    template: Template
    graph: Stage
    quantizer: Quantizer
    half: HalfWriter
    float8: fp8.Float8Writer
    int4: int4.Int4Writer

    @cached_property
    def trainable(self) -> TrainableGraph:
        """The graph as torch operations."""
        return TrainableGraph(self.template, self.quantizer)

    def place(self, precisions: Mapping[str, str]) -> tuple[Placement, frozenset[str]]:
        """Returns the placement of Q/DQ and the fp16 nodes, for the precision of each layer."""
        placement = self.quantizer.place(self.layers_in("int8", precisions))
        return placement, self.half.place(self.layers_in("fp16", precisions), placement.tensors)

    def layers_in(self, name: str, precisions: Mapping[str, str]) -> set[str]:
        """Returns the layers of the graph that have a precision."""
        return {layer for layer, precision in precisions.items() if precision == name and layer in self.template.layers}


class ArtifactBuilder:
    """Writes the artifact of any candidate of one network.

    The dense network is exported once and its activation ranges are calibrated once; a candidate's file is that graph
    with sliced weights, Q/DQ and fp16 casts.

    Args:
        network: the dense network with its exits, in evaluation mode.
        calibration: images for calibration, `(n, c, h, w)`.
        runtime: the library that will run the artifact.
        fp32_in: the type that fp32 layers may run in.
        scheme: how layers are quantized to int8.
        confidence: the measure of an exit's confidence, a name in `staged.CONFIDENCES`.
        removable: paths of residual blocks that may be left out of a network.

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
        removable: Sequence[str] = (),
    ) -> None:
        self._confidence = confidence
        self._runtime = runtime
        self._scheme = scheme
        self._calibration = calibration[:_MEAN_IMAGES]
        self._properties = FP32_IN_METADATA[fp32_in]
        self._network, self._removable = network, tuple(removable)
        self._templates: dict[int | None, Template] = {}
        self._template = self._template_at(None)
        self._capabilities = runtime.capabilities()
        self._forms: dict[object, _Form] = {}
        self._dense = self._form(network)
        self._check_images = calibration[:2]
        refusal = self.disagreement(network)
        if refusal is not None:
            raise ExportError(f"the exported network answers as in torch, got another answer: {': '.join(refusal)}")
        self.ranges: Ranges = self.read_ranges(network, calibration)

    def _template_at(self, size: int | None) -> Template:
        """Returns the graph at an input size, which poolings depend on."""
        if size not in self._templates:
            image = torch.from_numpy(resized(self._calibration[:1], size))
            self._templates[size] = Template(self._network, image, self._removable)
        return self._templates[size]

    def _form(self, version: ExitNetwork | Candidate) -> _Form:
        """Returns the graph of a version, without the blocks that it lacks, at its input size."""
        key = version.removed_blocks, version.input_size
        if key not in self._forms:
            if len(self._forms) >= _MOST_FORMS:
                self._forms.clear()
            template = self._template_at(version.input_size)
            self._forms[key] = self._form_of(template.without(key[0]) if key[0] else template)
        return self._forms[key]

    def _form_of(self, template: Template) -> _Form:
        outputs = [OUTPUT, *(logits_name(name) for name in template.exit_names)]
        outputs += [gate_logits_name(block) for block in template.blocks]
        quantizer = Quantizer(
            template.nodes,
            template.layers,
            outputs,
            self._capabilities.weight_bits,
            self._capabilities.quantized_add,
            per_channel=self._scheme.weights == "per-channel",
            following={*FOLLOWING, *self._capabilities.int8_operators},
        )
        return _Form(
            template=template,
            graph=Stage(template.nodes, INPUT, tuple(outputs)),
            quantizer=quantizer,
            half=HalfWriter(template.nodes, template.layers),
            float8=fp8.Float8Writer(template.layers),
            int4=int4.Int4Writer(template.layers),
        )

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers of the dense network that have a precision, in the order in which they run."""
        return tuple(self._template.layers)

    @property
    def grid(self) -> tuple[int, str]:
        """The grid of int8 weights: the largest level, and the granularity of scales."""
        return self._dense.quantizer.weight_limit, self._scheme.weights

    def read_ranges(self, network: ExitNetwork, images: NDArray[np.float32]) -> Ranges:
        """Returns the range of every activation of a network of this structure, by the scheme.

        Ranges are calibrated on `images`, or follow from batch normalisation; then only the distribution of the input
        is taken from the images. The range of a skippable block's output spans the outputs with and without the block.

        Raises:
            QuantizationError: distributions cannot be propagated through an operator.
        """
        form, images = self._form(network), resized(images, network.input_size)
        template, names = form.template, form.quantizer.activations()
        if self._scheme.ranges == "batchnorm":
            spans = {name: moments.range for name, moments in self._moments(network, images).items()}
            for source, result in template.blocks.values():
                spans[result] = _union(spans[source], spans[result])
            return {tensor: spans[tensor] for tensor in names}
        weights = template.weights(network.state_dict())
        models = [template.file(form.graph, nodes, weights) for nodes in template.flows]
        ranges_by_model = [calibrated_ranges(model, names, images, self._scheme) for model in models]
        return {name: _union(*(ranges[name] for ranges in ranges_by_model)) for name in ranges_by_model[0]}

    def _moments(self, network: ExitNetwork, images: NDArray[np.float32]) -> dict[str, Moments]:
        form = self._form(network)
        return activation_moments(form.template, form.graph, network.state_dict(), images)

    def _input_means(self, network: ExitNetwork, weights: Arrays) -> Means:
        """Returns the mean of each layer's input for bias correction; empty if the scheme has none."""
        if self._scheme.bias_correction == "none":
            return {}
        form, images = self._form(network), resized(self._calibration, network.input_size)
        if self._scheme.bias_correction == "batchnorm":
            moments = self._moments(network, images)
            layers = [node for node in form.graph.nodes if node.op_type in ("Conv", "Gemm")]
            return {node.input[1]: moments[node.input[0]].channel_means for node in layers}
        model = form.template.file(form.graph, form.template.flows[-1], weights)
        return input_means(model, form.graph.nodes, images)

    def learn_rounding(
        self,
        network: ExitNetwork,
        candidate: Candidate,
        images: NDArray[np.float32],
        learning: Learning,
        ranges: Ranges | None = None,
        report: Report = lambda _done, _total: None,
    ) -> Grids:
        """Returns the quantized weights of the candidate's int8 layers, with rounding learned by AdaRound.

        Args:
            network: compressed and recovered, in evaluation mode.
            candidate: its precisions.
            images: calibration images, `(n, c, h, w)`.
            learning: the settings of AdaRound.
            ranges: of the activations; by default those of the dense network.
            report: called with the number of layers that are done and of all layers.
        """
        form = self._form(network)
        placement = self.int8_placement(network, candidate)
        weights = form.template.weights(network.state_dict())
        task = RoundingTask(form.template, form.graph, form.quantizer, placement, weights, ranges or self.ranges)
        return task.learn(resized(images, network.input_size), learning, report)

    def disagreement(self, network: ExitNetwork) -> tuple[str, str] | None:
        """Returns why the file of a sliced or shortened network differs from it in torch; None if the two agree.

        They are compared on two calibration images, so that a batch size fixed in the graph is noticed.
        """
        try:
            form, images = self._form(network), resized(self._check_images, network.input_size)
            weights = form.template.weights(network.state_dict())
            last, *exits = load(form.template.file(form.graph, form.graph.nodes, weights), 0)(images)
        except Exception as error:
            return "its exported graph does not run so", str(error).splitlines()[0]
        with torch.no_grad():
            expected = [logits.numpy() for logits in network(torch.from_numpy(self._check_images))]
        for logits, torch_logits in zip([*exits, last], expected, strict=True):
            difference = _difference(logits, torch_logits)
            if not difference <= _TOLERANCE:
                return "its exported graph answers otherwise", f"by {difference:.2g} of the largest logit"
        return None

    def written_precisions(self, network: ExitNetwork, candidate: Candidate) -> dict[str, str]:
        """Returns the precision in which each layer is written into the artifact.

        It is the candidate's, except for layers that the target would run no faster in 8 bits: those with fewer
        channels than it requires, grouped ones if it requires any number, and the last linear layers of exits if they
        are no faster in int8. Those are fp16 if the target has it, else fp32.
        """
        precisions = dict.fromkeys(self.layers, "fp32") | dict(candidate.precision)
        fallback = "fp16" if "fp16" in self._capabilities.precisions else "fp32"
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        float_heads = () if self._capabilities.int8_heads else self._template.exit_classifiers
        for layer, weight in self._form(network).template.layer_weights.items():
            is_float_head = precisions[layer] == "int8" and layer in float_heads
            is_8_bit = self._supports_8_bits(weight, shapes[weight]) and not is_float_head
            if precisions[layer] in ("int8", "fp8") and not is_8_bit:
                precisions[layer] = fallback
        return precisions

    def _supports_8_bits(self, weight: str, shape: tuple[int, ...]) -> bool:
        fewest = self._capabilities.int8_channels
        return fewest <= 1 or (weight not in self._template.grouped and min(shape[:2]) >= fewest)

    def boundaries(self, candidate: Candidate) -> int:
        """Returns the number of layers that read from a layer in another precision, by the candidate's precisions.

        Each costs a conversion. Layers that are only stored in 4 bits run in fp32. Heads of inactive exits and gates of
        blocks that always run are not deployed.
        """
        form = self._form(candidate)
        placement, fp16_nodes = form.place(candidate.precision)
        fp8_nodes = form.float8.place(form.layers_in("fp8", candidate.precision))
        others = dict.fromkeys(fp16_nodes, "fp16") | dict.fromkeys(fp8_nodes, "fp8")
        precisions = dict.fromkeys(placement.nodes, "int8") | others
        return form.quantizer.boundaries(precisions, _layout(form, candidate).nodes)

    def trainable(self, network: ExitNetwork | None = None) -> TrainableGraph:
        """Returns the graph of a version, by default the dense network, as torch operations that can be trained.

        Its images are resized already.

        Raises:
            QuantizationError: the graph has an operator without a gradient.
        """
        return self._form(network or self._network).trainable

    def check_trainable(self) -> None:
        """Checks that the dense network's graph can be trained: that it answers in torch as the network does.

        Raises:
            QuantizationError: it answers otherwise, or has an operator without a gradient.
        """
        network, images = self._network, torch.from_numpy(self._check_images)
        with torch.no_grad():
            features, last = network.run_trunk(images)
            heads = [head(feature) for head, feature in zip(network.exits.values(), features, strict=True)]
            found = self.trainable().logits(network.state_dict(), images)
        for logits, expected in zip(found, [*heads, last], strict=True):
            difference = _difference(logits.numpy(), expected.numpy())
            if not difference <= _TOLERANCE:
                raise QuantizationError(
                    "training in int8 runs a graph that answers as the network does, got another answer, by"
                    f" {difference:.2g} of the largest logit; leave [recovery.qat] out"
                )

    def int8_placement(self, network: ExitNetwork, candidate: Candidate) -> Placement:
        """Returns the placement of Q/DQ in the artifact of a network that is compressed to `candidate`."""
        return self._form(network).place(self.written_precisions(network, candidate))[0]

    def build(
        self, network: ExitNetwork, candidate: Candidate, ranges: Ranges | None = None, grids: Grids = NO_GRIDS
    ) -> Artifact:
        """Returns the artifact of a network that is compressed to `candidate`.

        Args:
            network: compressed and recovered, in evaluation mode.
            candidate: its precisions and thresholds.
            ranges: of the activations; by default those of the dense network.
            grids: weights that are quantized already, by AdaRound or QAT.

        Raises:
            QuantizationError: a weight of an fp16 layer exceeds fp16's range.
        """
        form = self._form(network)
        weights, ranges = form.template.weights(network.state_dict()), ranges or self.ranges
        precisions = self.written_precisions(network, candidate)
        placement, fp16_nodes = form.place(precisions)
        fp8_nodes, int4_nodes = (
            writer.place(form.layers_in(name, precisions))
            for name, writer in (("fp8", form.float8), ("int4", form.int4))
        )
        means = self._input_means(network, weights) if placement.nodes else {}
        files: list[bytes] = []
        layout = _layout(form, candidate)
        for stage in layout.stages:
            nodes, values = form.quantizer.write(stage, placement, weights, ranges, grids)
            nodes, values = corrected(nodes, values, means)
            required = ((fp8.OPSET, fp8_nodes), (int4.OPSET, int4_nodes))
            opset = max([OPSET, *(least for least, placed in required if any(node.name in placed for node in nodes))])
            nodes, values = form.float8.write(nodes, fp8_nodes, values, ranges)
            nodes, values = form.int4.write(nodes, int4_nodes, values)
            nodes, values = form.half.write(nodes, fp16_nodes, values, stage.outputs)
            # A file that is compiled for one shape has to declare the channels of its input.
            channels = output_channels(files[-1]) if files and not self._capabilities.dynamic_batch else {}
            nodes = nodes if opset == OPSET else fp8.in_opset(nodes, values)
            files.append(form.template.file(stage, nodes, values, channels, opset, self._properties))
        return Artifact(
            stages=tuple(files),
            deployed=deployed_stages(self._runtime, files, bool(layout.blocks)),
            exits=candidate.active_exits,
            thresholds=candidate.thresholds.confidences,
            precisions=_deployed_precisions(form, precisions, layout),
            boundaries=self.boundaries(replace(candidate, precision=precisions)),
            confidence=self._confidence,
            blocks=layout.blocks,
            steps=layout.steps_with_thresholds(candidate),
            input_size=candidate.input_size,
        )


def _layout(form: _Form, candidate: Candidate) -> Layout:
    return form.template.layout(candidate.active_exits, tuple(candidate.active_skips))


def _deployed_precisions(form: _Form, precisions: Mapping[str, str], layout: Layout) -> dict[str, str]:
    """Returns the precision of each deployed layer, by the name of its ONNX node.

    Heads of inactive exits, gates of blocks that always run and blocks that are left out are not deployed.
    """
    by_node = {node: precisions[layer] for layer, node in form.template.layers.items()}
    return {node: precision for node, precision in by_node.items() if node in layout.nodes}


def _union(*ranges: tuple[float, float]) -> tuple[float, float]:
    """Returns the smallest range that contains all of these."""
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _difference(logits: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Returns the largest difference relative to the largest expected logit; nan if the shapes differ."""
    if logits.shape != expected.shape:
        return np.nan
    return float(np.abs(logits - expected).max() / (np.abs(expected).max() or 1.0))
