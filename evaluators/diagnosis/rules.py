"""Rules that turn the error statistics of a comparison into findings, one for each kind of fault."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from evaluators.diagnosis.comparison import Answered
from evaluators.diagnosis.evidence import LOW_DB, Evidence, Finding, ratio
from evaluators.diagnosis.tensor_errors import TensorErrors

EXPLAINS = 0.9
"""A permutation of channels is reported if it explains this share of the squared error."""
LARGEST_HALF = float(np.finfo(np.float16).max)
"""65504, the largest number in fp16."""
SMALLEST_HALF = float(np.finfo(np.float16).smallest_subnormal)
"""6e-8, the smallest number above 0 in fp16."""
SAME_POINTS = 0.3
"""Difference in accuracy of one file on two targets, in points, up to which they count as equal."""


def find(case: Evidence) -> list[Finding]:
    """Returns all findings, the most important first: alarms before notes."""
    findings = [finding for rule in _RULES for finding in rule(case)]
    return sorted(findings, key=lambda finding: not finding.alarm)


def _permuted(case: Evidence) -> list[Finding]:
    permuted = [layer for layer in case.layers if _is_permuted(layer)]
    if not permuted:
        return []
    layer, permutation = permuted[0], permuted[0].permutation
    assert permutation is not None
    text = (
        f"the channels of {layer.name} are in another order: a permutation explains {permutation.explained:.1%} of its"
        f" error ({ratio(layer.sqnr_db)})"
    )
    groups = permutation.groups
    if groups is not None:
        inverse = layer.channels // groups
        text += f"; a channel shuffle of {groups} groups is missing, or one of {inverse} groups was added"
    remedy = (
        "write the shuffle as a Gather with constant indices or as a 1x1 convolution, or keep its nodes in fp32; or try"
        " another version of the exporter or of the runtime"
    )
    return [Finding("permuted channels", True, layer.name, permutation.explained, text, remedy)]


def _is_permuted(layer: TensorErrors) -> bool:
    order = layer.permutation
    return order is not None and not order.is_identity and order.explained >= EXPLAINS


def _overflow(case: Evidence) -> list[Finding]:
    beyond = [layer for layer in case.layers if layer.largest > LARGEST_HALF]
    if not beyond:
        return []
    layer = max(beyond, key=lambda each: each.largest)
    rest = f"; {len(beyond) - 1} more tensors exceed it" if len(beyond) > 1 else ""
    text = (
        f"{beyond[0].name} is the first tensor that exceeds fp16's range: its largest value is"
        f" {beyond[0].largest:.3g}, that of fp16 is {LARGEST_HALF:.0f}{rest}"
    )
    if case.has_fp16:
        remedy = "keep these layers in fp32, or scale the weights before them down and those behind them up"
    else:
        remedy = "nothing is wrong as long as they are not run in fp16"
    return [Finding("fp16 overflow", case.has_fp16, beyond[0].name, layer.largest, text, remedy)]


def _not_finite(case: Evidence) -> list[Finding]:
    before = next((layer for layer in case.layers if layer.not_finite_before), None)
    if before is not None:
        text = f"{before.name} has {before.not_finite_before} values that are not finite already in {case.reference}"
        remedy = "check the network's weights and the images: no version of it can be right"
        return [Finding("not finite", True, before.name, before.not_finite_before, text, remedy)]
    first = next((layer for layer in case.layers if layer.not_finite), None)
    if first is None:
        return []
    text = (
        f"{first.name} is the first tensor with values that are infinite or not a number:"
        f" {first.not_finite} in {case.version}"
    )
    remedy = "keep it in fp32, and check whether its range and its weights fit the precision"
    return [Finding("not finite", True, first.name, first.not_finite, text, remedy)]


def _chance(case: Evidence) -> list[Finding]:
    answered = case.compared.answered
    if is_chance(answered.before, answered):
        text = (
            f"{case.reference} itself classifies {answered.before} of {answered.images} images correctly, which is"
            f" chance level for {answered.classes} classes"
        )
        remedy = "check that the network is trained; until then compare the layers' errors, not the accuracies"
        return [Finding("chance level", False, "", answered.before / answered.images, text, remedy)]
    if not is_chance(answered.right, answered):
        return []
    only = f"; it predicts class {answered.only} for every image" if answered.only is not None else ""
    text = (
        f"accuracy is at chance level: {case.version} classifies {answered.right} of {answered.images} images correctly"
        f" ({case.reference}: {answered.before}), as guessing among {answered.classes} classes would{only}"
    )
    remedy = "rounding alone hardly ever does that to a network; look for the first layer that is wrong"
    return [Finding("chance level", True, "", answered.right / answered.images, text, remedy)]


def is_chance(right: int, answered: Answered) -> bool:
    """Returns whether a number of correct answers is at most two standard deviations above that of guessing."""
    guess = 1 / answered.classes
    return right <= answered.images * guess + 2 * float(np.sqrt(answered.images * guess * (1 - guess)))


def _two_targets(case: Evidence) -> list[Finding]:
    answered = case.compared.answered
    points = (answered.right - answered.before) / answered.images * 100
    if not case.targets or abs(points) <= SAME_POINTS:
        return []
    layer = case.noisiest()
    text = (
        f"the same file is {abs(points):.2f} points {'better' if points > 0 else 'worse'} on {case.version} than on"
        f" {case.reference}; they diverge at {layer.name}, from {ratio(layer.input_db)} at its input"
        f" to {ratio(layer.sqnr_db)} at its output"
    )
    remedy = "trust neither before the layer is understood; try it in fp32, and newer versions of both runtimes"
    return [Finding("targets differ", True, layer.name, points, text, remedy)]


def _noisy(case: Evidence) -> list[Finding]:
    layer = case.first_low()
    if layer is None:
        return []
    low = sum(each.sqnr_db < LOW_DB for each in case.layers)
    noisiest = case.noisiest()
    text = (
        f"{layer.name} is the first tensor below {LOW_DB:.0f} dB: {ratio(layer.sqnr_db)}, cosine {layer.cosine:.4f},"
        f" with {ratio(layer.input_db)} at its input; {low} of {len(case.layers)} tensors are below"
    )
    if noisiest is not layer:
        text += f"; of the tensors up to it, {noisiest.name} adds the most noise ({ratio(noisiest.own_db)})"
    if case.has_8_bits:
        remedy = (
            'try [quantization] calibrator = "percentile" or equalize = true, or leave the layer in fp16 or fp32, and'
            " compare again"
        )
    else:
        remedy = "leave the layer in fp32 and compare again"
    return [Finding("noisy layer", True, layer.name, layer.sqnr_db, text, remedy)]


def _vanishing(case: Evidence) -> list[Finding]:
    return [*_unfolded(case), *_folded(case)]


def _unfolded(case: Evidence) -> list[Finding]:
    """Returns the finding on batch norms that are not folded, whose variances fp16 rounds to 0."""
    lost = {name: _vanished(values) for name, values in case.norms.items()}
    names = [name for name, count in lost.items() if count]
    if not names:
        return []
    in_half = any(case.norms[name].dtype == np.float16 for name in names)
    first, count = _norm(names[0]), lost[names[0]]
    text = (
        f"{count} running variances of {first} are below fp16's smallest number ({SMALLEST_HALF:.0e}), and it is not"
        f" folded into a layer: fp16 {'makes' if in_half else 'would make'} them 0{_more(names)}"
    )
    remedy = "fold batch norm into its convolution before the export, or keep it in fp32"
    return [Finding("vanishing variance", in_half, first, _smallest(case.norms[names[0]]), text, remedy)]


def _folded(case: Evidence) -> list[Finding]:
    """Returns the finding on folded batch norms: no variance becomes 0, but weights may become large."""
    lost = {name: _vanished(values) for name, values in case.variances.items() if name not in case.norms}
    names = [name for name, count in lost.items() if count]
    if not names:
        return []
    first = _norm(names[0])
    smallest = _smallest(case.variances[names[0]])
    text = (
        f"{lost[names[0]]} running variances of {first} are below fp16's smallest number, down to {smallest:.1e}; it is"
        f" folded into its layer in fp32, so none is lost{_more(names)}"
    )
    remedy = (
        "such channels hardly varied in training, and folding makes their weights large: prune them, or quantize"
        " weights per channel"
    )
    return [Finding("vanishing variance", False, first, smallest, text, remedy)]


def _vanished(variances: NDArray[np.generic]) -> int:
    return int((variances.astype(np.float64) < SMALLEST_HALF).sum())


def _smallest(variances: NDArray[np.generic]) -> float:
    return float(variances.astype(np.float64).min())


def _norm(name: str) -> str:
    return name.removesuffix(".running_var").removeprefix("trunk.")


def _more(names: Sequence[str]) -> str:
    return f"; the same holds for {len(names) - 1} more batch norms" if len(names) > 1 else ""


def _died(case: Evidence) -> list[Finding]:
    layers = [layer for layer in case.until_low() if layer.died and not layer.not_finite]
    if not layers:
        return []
    worst = max(layers, key=lambda layer: layer.died / layer.channels)
    text = (
        f"constant in {case.version} but not in {case.reference}: {worst.died} of {worst.channels} channels of"
        f" {worst.name}, which vary by less than one quantization step; {len(layers)} tensors have such channels"
    )
    if case.has_8_bits:
        remedy = "equalize the channels' ranges ([quantization] equalize = true), or give the layer a higher precision"
    else:
        remedy = "give the layer a higher precision"
    return [Finding("silenced channels", False, worst.name, worst.died, text, remedy)]


def _dead(case: Evidence) -> list[Finding]:
    layers = [layer for layer in case.layers if layer.dead]
    if not layers:
        return []
    worst = max(layers, key=lambda layer: layer.dead / layer.channels)
    total, channels = sum(layer.dead for layer in layers), sum(layer.channels for layer in case.layers)
    text = (
        f"{total} of {channels} channels are constant over these images, already in {case.reference}: most in"
        f" {worst.name}, {worst.dead} of {worst.channels}"
    )
    remedy = (
        "they cost time and carry no information; cut, they take a constant from the next layer, which new batch"
        " statistics make up for where a batch norm follows, and training elsewhere"
    )
    return [Finding("dead channels", False, worst.name, worst.dead, text, remedy)]


_RULES: Sequence[Callable[[Evidence], list[Finding]]] = (
    _permuted,
    _overflow,
    _not_finite,
    _two_targets,
    _chance,
    _noisy,
    _vanishing,
    _died,
    _dead,
)
"""The rules, those that explain most first."""
