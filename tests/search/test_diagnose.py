"""A version that goes wrong is found out: by what, and at which layer; one that does not is left alone."""

import copy
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import NodeProto, helper, numpy_helper
from torch import nn

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.data import LabelledImages
from evaluators.diagnosis.comparison import Answered, Compared, Side, compare
from evaluators.diagnosis.evidence import Evidence, Finding
from evaluators.diagnosis.rules import find, is_chance
from evaluators.diagnosis.taps import norm_variances
from evaluators.runtimes.cpu import weight_bits
from evaluators.runtimes.onnxruntime_cpu import OnnxRuntime
from search.commands.diagnose import layer_table
from search.config.diagnosis_request import DiagnosisRequest
from search.pipeline.diagnosis import Diagnosis, diagnose
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork
from spaces.thresholds import Thresholds
from tests.helpers import zoo

CLASSES = 5
IMAGES = np.random.default_rng(0).normal(size=(96, 3, 8, 8)).astype(np.float32)


class Network:
    """A network of the zoo whose answers count as right, and its files in any precision."""

    def __init__(self, trunk: nn.Module) -> None:
        with torch.no_grad():  # no class is preferred, so that guessing is guessing
            trunk.classifier.bias -= trunk(torch.from_numpy(IMAGES)).nan_to_num(0, 0, 0).mean(0)
            labels = trunk(torch.from_numpy(IMAGES)).argmax(1).numpy()
        self.data = LabelledImages(IMAGES, labels)
        self.network = ExitNetwork(trunk, [], []).eval()
        self.builder = ArtifactBuilder(self.network, IMAGES, OnnxRuntime())
        self.exact = self.file("fp32")

    def file(self, precision: str) -> bytes:
        precisions = dict.fromkeys(self.builder.layers, precision)
        return self.builder.build(self.network, Candidate({}, precisions)).deployed[0]

    def compared(self, file: bytes) -> Compared:
        reference, version = (Side(name, OnnxRuntime(), (file,)) for name, file in (("fp32", self.exact), ("it", file)))
        return compare(reference, version, (self.exact,), self.data, CLASSES, lambda *_: None)

    def case(self, file: bytes, precision: str) -> Evidence:
        state = self.network.state_dict()
        return Evidence(
            reference="fp32",
            version=precision,
            compared=self.compared(file),
            has_fp16=precision == "fp16",
            has_8_bits=precision == "int8",
            targets=False,
            variances={name: state[name].numpy() for name in state if name.endswith("running_var")},
            norms=norm_variances(file),
        )

    def findings(self, file: bytes, precision: str) -> list[Finding]:
        return find(self.case(file, precision))


def the(findings: list[Finding], kind: str) -> Finding:
    (found,) = [finding for finding in findings if finding.kind == kind]
    assert found.text
    assert found.remedy
    return found


def alarms(findings: list[Finding]) -> set[str]:
    return {finding.kind for finding in findings if finding.alarm}


def without_shuffles(file: bytes) -> bytes:
    """Returns a file in which what comes behind each reshape, transpose, reshape is what came before."""
    model = onnx.load_from_string(file)
    makers = {name: node for node in model.graph.node for name in node.output}
    readers = {name: node for node in model.graph.node for name in node.input}
    rounding = ("QuantizeLinear", "DequantizeLinear")
    for node in [node for node in model.graph.node if node.op_type == "Transpose"]:
        before, behind = makers[node.input[0]], readers[node.output[0]]
        while before.op_type in rounding:
            before = makers[before.input[0]]
        while behind.op_type in rounding:
            behind = readers[behind.output[0]]
        if before.op_type == behind.op_type == "Reshape":
            behind.CopyFrom(helper.make_node("Identity", [before.input[0]], behind.output[:1], behind.name))
    return model.SerializeToString()


@pytest.fixture(scope="module")
def shuffling() -> Network:
    return Network(zoo.build("shuffle"))


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_a_lost_channel_shuffle_is_told_from_low_precision(shuffling, precision) -> None:
    whole = shuffling.file(precision)
    assert alarms(shuffling.findings(whole, precision)) == set()
    findings = shuffling.findings(without_shuffles(whole), precision)
    lost = the(findings, "permuted channels")
    assert findings[0] is lost
    assert lost.layer == "body.0 Reshape_1"
    assert lost.figure > 0.95
    assert "channel shuffle of 2 groups is missing" in lost.text
    chance = the(findings, "chance level")
    assert chance.alarm
    assert chance.figure < 0.4
    assert the(findings, "noisy layer").layer == "body.0 Reshape_1"


def test_swapped_channels_are_no_shuffle(shuffling) -> None:
    model = onnx.load_from_string(shuffling.exact)
    for tensor in model.graph.initializer:
        if tensor.name.startswith("trunk.stem.0."):
            value = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(value[[3, *range(1, 3), 0, *range(4, 16)]], tensor.name))
    found = the(shuffling.findings(model.SerializeToString(), "fp32"), "permuted channels")
    assert (found.layer, found.figure) == ("stem.0", pytest.approx(1, abs=1e-4))
    assert "shuffle of" not in found.text


class Hot(nn.Module):
    """A network whose second convolution goes beyond 65504 and whose last one comes back."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cool, self.hot = zoo.conv(3, 8), nn.Conv2d(8, 8, 3, 1, 1)
        self.classifier = nn.Linear(8, CLASSES)
        self.hot.weight.data *= gain
        self.classifier.weight.data /= gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.relu(self.hot(self.cool(x))).mean((2, 3)))


def test_an_overflow_in_half_precision_is_named_and_is_none_in_others() -> None:
    hot = Network(Hot(1e5).eval())
    findings = hot.findings(hot.file("fp16"), "fp16")
    overflow = the(findings, "fp16 overflow")
    assert overflow.layer == "hot"
    assert overflow.alarm
    assert overflow.figure > 65504
    assert "65504" in overflow.text
    assert the(findings, "not finite").layer == "hot"
    assert not the(hot.findings(hot.file("int8"), "int8"), "fp16 overflow").alarm
    mild = Network(Hot(100.0).eval())
    assert alarms(mild.findings(mild.file("fp16"), "fp16")) == set()


def test_what_is_not_finite_is_laid_to_whom_it_belongs() -> None:
    broken = Network(Hot(1.0).eval())
    model = onnx.load_from_string(broken.exact)
    (bias,) = [tensor for tensor in model.graph.initializer if tensor.name == "trunk.hot.bias"]
    value = numpy_helper.to_array(bias).copy()
    value[2] = np.inf
    bias.CopyFrom(numpy_helper.from_array(value, bias.name))
    found = the(broken.findings(model.SerializeToString(), "fp32"), "not finite")
    assert (found.layer, found.figure) == ("hot", 96 * 8 * 8)
    assert "already" not in found.text
    reversed_roles = copy.copy(broken)
    reversed_roles.exact = model.SerializeToString()
    before = the(reversed_roles.findings(broken.exact, "fp32"), "not finite")
    assert "already in fp32" in before.text
    assert before.layer == "hot"


def test_a_running_variance_that_half_cannot_hold() -> None:
    trunk = zoo.build("concat")  # its first norm is folded, the others come before their convolutions
    trunk.stem[1].running_var[3] = 1e-9
    trunk.body.norms[1].running_var[:2] = 1e-9
    network = Network(trunk)
    findings = network.findings(network.exact, "fp32")
    found = [finding for finding in findings if finding.kind == "vanishing variance"]
    assert [finding.figure for finding in found] == pytest.approx([1e-9, 1e-9])
    unfolded, folded = found
    assert "2 running variances of body.norms.1" in unfolded.text
    assert "would make them 0" in unfolded.text
    assert not unfolded.alarm
    assert "1 running variances of stem.1" in folded.text
    assert "none is lost" in folded.text
    model = onnx.load_from_string(network.exact)
    (variance,) = [tensor for tensor in model.graph.initializer if tensor.name == "trunk.body.norms.1.running_var"]
    halved = numpy_helper.from_array(numpy_helper.to_array(variance).astype(np.float16), variance.name)
    variance.CopyFrom(halved)
    norms = norm_variances(model.SerializeToString())
    in_half = find(replace(network.case(network.exact, "fp16"), norms=norms))
    assert in_half[0].kind == "vanishing variance"
    assert "fp16 makes them 0" in in_half[0].text


def test_dead_channels_are_counted_and_those_that_fall_silent_too() -> None:
    trunk = Hot(1.0)
    trunk.cool[1].weight.data[:3] = 0
    trunk.cool[1].bias.data[:3] = -1.0  # zero behind the ReLU
    trunk.cool[1].weight.data[4] = 1e-4
    trunk.cool[1].bias.data[4] = 1e-3
    network = Network(trunk.eval())
    findings = network.findings(network.file("int8"), "int8")
    dead, silent = the(findings, "dead channels"), the(findings, "silenced channels")
    assert (dead.layer, dead.figure, dead.alarm) == ("cool.0", 3, False)
    assert (silent.layer, silent.figure, silent.alarm) == ("cool.0", 1, False)


@pytest.mark.skipif(weight_bits() < 8, reason="weights of 7 bits are noisy here before one layer is made coarse")
def test_a_coarse_layer_is_the_first_below_20_db() -> None:
    network = Network(zoo.build("grouped"))
    assert alarms(network.findings(network.file("int8"), "int8")) == set()
    model = onnx.load_from_string(network.file("int8"))
    for tensor in model.graph.initializer:
        if tensor.name == "trunk.body.1.0.weight/q":
            value = numpy_helper.to_array(tensor)
            coarse = (np.rint(value / 64.0) * 64).clip(-127, 127)
            tensor.CopyFrom(numpy_helper.from_array(coarse.astype(value.dtype), tensor.name))
    findings = network.findings(model.SerializeToString(), "int8")
    noisy = the(findings, "noisy layer")
    assert (noisy.layer, noisy.alarm) == ("body.1.0", True)
    assert noisy.figure < 20
    assert "[quantization]" in noisy.remedy


def test_a_noisy_input_is_told_from_a_noisy_layer() -> None:
    network = Network(zoo.build("grouped"))
    case = network.case(network.file("int8"), "int8")
    sqnr = {"stem.0": 30.0, "body.0.0": 21.0, "body.1.0": 19.5, "body.2.0": 19.0, "classifier": 25.0}
    inputs = dict(zip(sqnr, [np.inf, *sqnr.values()], strict=False))
    layers = tuple(replace(each, sqnr_db=sqnr[each.name], input_db=inputs[each.name]) for each in case.layers)
    noisy = the(find(replace(case, compared=replace(case.compared, layers=layers))), "noisy layer")
    assert noisy.layer == "body.1.0"
    assert "body.0.0 adds the most noise" in noisy.text


@pytest.mark.parametrize(("right", "images", "classes", "guessed"), [(10, 100, 10, True), (16, 100, 10, True)])
@pytest.mark.parametrize("more", [0, 1])
def test_chance_ends_two_standard_deviations_above_guessing(right, images, classes, guessed, more) -> None:
    answered = Answered(images, classes, 90, right, 10, None)
    assert is_chance(right, answered) is guessed
    assert not is_chance(17 + more, answered)


def test_an_untrained_reference_is_no_alarm(shuffling) -> None:
    case = shuffling.case(shuffling.file("int8"), "int8")
    guessing = replace(case.compared.answered, before=19, right=18)
    found = the(find(replace(case, compared=replace(case.compared, answered=guessing))), "chance level")
    assert not found.alarm
    assert "trained" in found.remedy


def test_two_targets_that_differ_by_more_than_03_points_name_a_layer(shuffling) -> None:
    case = replace(shuffling.case(shuffling.file("int8"), "int8"), targets=True)
    answered = case.compared.answered
    near = replace(answered, images=1000, before=901, right=898)
    far = replace(answered, images=1000, before=901, right=890)
    assert find(replace(case, compared=replace(case.compared, answered=near))) == find(
        replace(case, targets=False, compared=replace(case.compared, answered=near))
    )
    found = the(find(replace(case, compared=replace(case.compared, answered=far))), "targets differ")
    assert found.alarm
    assert found.layer == case.noisiest().name
    assert "1.10 points worse" in found.text


def test_a_file_of_another_exporter_is_compared_by_name_and_one_without_names_by_its_logits(
    shuffling, tmp_path
) -> None:
    file = tmp_path / "their.onnx"
    trunk = shuffling.network.trunk
    torch.onnx.export(trunk, (torch.from_numpy(IMAGES[:1]),), str(file), dynamo=False, dynamic_axes={"input": {0: "n"}},
                      input_names=["input"], output_names=["scores"])  # fmt: skip
    compared = shuffling.compared(file.read_bytes())
    assert {"stem.0", "body.1.branch.2.0", "body.1 Reshape_1", "classifier"} <= {each.name for each in compared.layers}
    assert min(each.sqnr_db for each in compared.layers) > 80
    model = onnx.load(str(file))
    for index, node in enumerate(model.graph.node):
        _rename(model.graph.node[index:], list(node.output), f"t{index}")
    model.graph.output[0].name = f"t{len(model.graph.node) - 1}.0"
    anonymous = shuffling.compared(model.SerializeToString())
    assert [each.name for each in anonymous.layers] == ["classifier"]
    assert "stem.0" in anonymous.unmatched
    assert anonymous.answered.same == len(IMAGES)


def _rename(nodes: list[NodeProto], names: list[str], prefix: str) -> None:
    renamed = {name: f"{prefix}.{index}" for index, name in enumerate(names)}
    for node in nodes:
        for field in (node.input, node.output):
            field[:] = [renamed.get(name, name) for name in field]


def test_a_network_with_exits_is_compared_in_all_of_its_stages(pipeline) -> None:
    dense = pipeline.space.dense()
    thresholds = Thresholds(dict.fromkeys(dense.thresholds.exits, 0.9))
    open_exits = Candidate(dense.channels, dict.fromkeys(dense.precision, "int8"), thresholds)
    artifact = pipeline.builder.build(pipeline.network, open_exits)
    exact = pipeline.builder.build(pipeline.network, replace(open_exits, precision={}))
    assert len(artifact.stages) > 1
    sides = [Side(name, pipeline.runtime, item.deployed) for name, item in (("fp32", exact), ("int8", artifact))]
    compared = compare(*sides, exact.stages, pipeline.data.validation, pipeline.data.classes, lambda *_: None)
    assert compared.unmatched == ()
    assert set(pipeline.builder.layers) <= {layer.name for layer in compared.layers}
    closed = diagnose(pipeline, DiagnosisRequest(images=80), None, lambda *_: None).compared
    at_the_end = [next(layer for layer in each.layers if layer.name == "classifier") for each in (compared, closed)]
    assert at_the_end[0].sqnr_db == pytest.approx(at_the_end[1].sqnr_db, abs=1.0)
    found = Diagnosis("fp32", "int8", "here", (), compared, ())
    noisy = [layer for layer in compared.layers if np.isfinite(layer.sqnr_db)]
    half = replace(compared, layers=(replace(compared.layers[0], name="exact", sqnr_db=np.inf), *noisy[:3]))
    table = layer_table(replace(found, compared=half))
    assert "exact" not in list(table.columns[0].cells)
    assert table.row_count == 3
    assert str(table.title) == "all tensors that differ; 1 more is exact"
    assert open_exits.active_exits == tuple(dense.thresholds.exits)
