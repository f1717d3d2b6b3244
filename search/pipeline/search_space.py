"""The search space of a study: what it asks for and its target supports."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evaluators.accuracy import wilson
from evaluators.data import Splits
from evaluators.runtimes.base import Capabilities, Runtime, Target
from search.config.sections import MasksSection
from search.config.study import SkipsSection, Study, StudyError
from search.pipeline.channel_steps import NOT_MEASURED, Widths, channel_steps
from spaces.channels import SparsitySpace
from spaces.depth import PREFIX, DepthSpace
from spaces.dimensions import Real
from spaces.dynamic.exit_network import ExitNetwork, is_of_gate
from spaces.dynamic.masks.base import masks_of
from spaces.input_size import OWN_SIZE, InputSizeSpace, Proof, automatic_sizes, usable_sizes
from spaces.joint import JointSpace
from spaces.patterns import TWO_OF_FOUR, PatternSpace, offered_patterns
from spaces.precision import PrecisionSpace
from spaces.pruning.criteria import CRITERIA
from spaces.pruning.criteria.base import Evidence
from spaces.pruning.groups import Groups
from spaces.thresholds import ThresholdSpace

FEW_SCORED = 500
"""With fewer scored images the search states how wide the interval of an accuracy is."""
FEW_CHOOSING = 100
"""With fewer images that choose thresholds the search says that these are worth little."""
EXAMPLE = 0.9
"""The accuracy that intervals are stated for while none is measured yet."""


def target_of(study: Study, runtime: Runtime) -> Target:
    """Returns the study's target on this machine.

    Raises:
        StudyError: the device lacks the number format of `fp32_in` or of `space.precision`, or frames of a stream are
            batched.
    """
    section = study.target
    device, capabilities = runtime.device(), runtime.capabilities()
    if section.fp32_in not in ("fp32", *capabilities.fp32_in):
        requirements = {"tf32": "TensorRT on a GPU from Ampere on", "bf16": "OpenVINO on a CPU that multiplies bf16"}
        raise StudyError(
            f"target.fp32_in = {section.fp32_in!r} wants {requirements[section.fp32_in]}, got {section.runtime} on"
            f" {device}; leave it out"
        )
    fixed = study.space.precision
    if fixed not in ("searched", *capabilities.precisions):
        raise StudyError(
            f"space.precision is one that {study.target.runtime} computes in, {' or '.join(capabilities.precisions)},"
            f" got {fixed!r}; leave it out to search it"
        )
    if study.frames and section.batch != 1:
        raise StudyError(
            f"frames of a stream come one at a time, got target.batch = {section.batch};"
            " set it to 1, or leave [frames] out"
        )
    return Target(section.runtime, device, section.batch, section.threads, section.fp32_in)


def build_space(
    study: Study,
    network: ExitNetwork,
    groups: Groups,
    depth: DepthSpace,
    input_size: InputSizeSpace,
    data: Splits,
    layers: tuple[str, ...],
    runtime: Runtime,
    widths: Widths = NOT_MEASURED,
) -> JointSpace:
    """Returns the search space: what the study asks for and the target supports.

    Args:
        study: what to search.
        network: the dense network with its exits and gates.
        groups: its channel groups.
        depth: its stages of blocks that can be left out.
        input_size: sizes of its input.
        data: the calibration images are used by some pruning criteria.
        layers: names of the layers with a precision.
        runtime: executes the versions.
        widths: of layers, as measured on the target; if empty, the runtime's own steps hold.
    """
    capabilities = runtime.capabilities()
    exits = network.exit_names if study.target.batch == 1 or capabilities.dynamic_batch else ()
    evidence = Evidence(torch.from_numpy(data.calibration.images[:]), torch.from_numpy(data.calibration.labels))
    scores = CRITERIA[study.space.criterion](network, groups.free, evidence)
    precision = _precision_space(study, layers, capabilities)
    steps = channel_steps(study, capabilities, precision, widths)
    minimum = study.space.keep_at_least
    sparsity = SparsitySpace(groups.free, scores, steps.finest, minimum, steps.widest, steps.least)
    patterns = PatternSpace(offered_patterns(network, groups.free, steps.finest, _supported_patterns(study, runtime)))
    others_vary = any(part.dimensions() for part in (sparsity, precision, patterns, depth, input_size))
    thresholds = _threshold_space(study, exits, network, others_vary)
    return JointSpace(sparsity, precision, thresholds, patterns, depth, input_size)


def input_sizes(study: Study, network: ExitNetwork, image: Tensor, proof: Proof) -> InputSizeSpace:
    """Returns the sizes that images may be resized to: those that the study asks for and the network runs at.

    Args:
        study: what to search.
        network: the dense network.
        image: one input, `(1, c, h, w)`.
        proof: returns why the exported network cannot be used at a size, or None.

    Raises:
        StudyError: the study names a size that the images cannot be resized to, or that the network does not run at.
    """
    sizes = asked_sizes(study, image.shape[1:])
    if not sizes:
        return OWN_SIZE
    usable = usable_sizes(network, image, sizes, proof)
    refused = sorted(set(sizes) - set(usable))
    if refused and study.space.sizes != "auto":
        raise StudyError(
            f"space.sizes are sizes at which the network runs and pools globally, got {refused[0]}; leave it out"
        )
    return InputSizeSpace(usable)


def asked_sizes(study: Study, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the sizes that a study asks for, as far as its images tell; none where it asks for none.

    Args:
        study: what to search.
        shape: of an image, `(c, h, w)`.

    Raises:
        StudyError: the images are not square, a size is larger than theirs, or masks are made for one size.
    """
    asked, (height, width) = study.space.sizes, shape[-2:]
    if "size" not in study.space.only or not asked:
        return ()
    if study.masks.method and "masks" in study.space.only:
        method = study.masks.method
        raise StudyError(
            f"masks are learnt at one size of images, got [masks] method = {method!r} beside space.sizes; leave one of"
            " them out"
        )
    if asked == "auto":
        return automatic_sizes(width)
    if height != width:
        raise StudyError(f"space.sizes are sizes of square images, got images of {height}x{width}; leave it out")
    if asked[-1] > width:
        raise StudyError(f"space.sizes are sizes below {width}, the images' own, got {asked[-1]}; leave it out")
    return asked


def without_fixed_dimensions(study: Study) -> Study:
    """Returns the study without the dimensions that `space.only` leaves out, so that nothing is trained for them.

    These keep all channels, and have no exits, block gates, masks or patterns of zeros. Versions are scored on frames
    of a stream in any case.
    """
    only = study.space.only
    unchanged: dict[str, Any] = {}
    space: dict[str, Any] = {} if "channels" in only else {"keep_at_least": 1.0}
    space |= {} if "patterns" in only else {"patterns": ()}
    parts = {
        "exits": study.exits.model_copy(update=unchanged if "exits" in only else {"after": ()}),
        "skips": study.skips if "skips" in only else SkipsSection(),
        "masks": study.masks if "masks" in only else MasksSection(),
        "space": study.space.model_copy(update=space),
    }
    return study.model_copy(update=parts)


def _precision_space(study: Study, layers: Sequence[str], capabilities: Capabilities) -> PrecisionSpace:
    """Returns the precisions that each layer may have; layers of gates keep the first, the reference."""
    fixed = study.space.precision
    reference = capabilities.precisions[:1]
    of_gates: dict[str, tuple[str, ...]] = dict.fromkeys(filter(is_of_gate, layers), reference)
    if fixed == "searched" and "precision" in study.space.only:
        storage = [precision for precision in study.space.storage if precision in capabilities.storage]
        return PrecisionSpace(layers, capabilities.precisions, of_gates, storage)
    same: tuple[str, ...] = reference if fixed == "searched" else (fixed,)
    return PrecisionSpace(layers, capabilities.precisions, dict.fromkeys(layers, same) | of_gates)


def _threshold_space(study: Study, exits: Sequence[str], network: ExitNetwork, others_vary: bool) -> ThresholdSpace:
    """Returns the thresholds of exits, gates, masks and frames that may vary.

    Thresholds of exits are searched, not solved, with frames of a stream, because these decide which images reach the
    exits; and if nothing else varies, because solved thresholds would leave a single version.
    """
    grid = study.space.lowest_threshold, study.space.threshold_step
    frames, skips = study.frames, network.skip_blocks
    masks = [mask.site.block for mask in masks_of(network) if mask.moves]
    if frames is None:
        solved = study.exits.thresholds == "solved" and bool(others_vary or skips or masks)
        return ThresholdSpace(exits, *grid, solved=solved, skips=skips, masks=masks)
    steps = max(round(frames.highest_threshold / frames.threshold_step), 1)
    highest = round(steps * frames.threshold_step, 6)
    dimension = Real(0.0, highest, frames.threshold_step) if "frames" in study.space.only else None
    return ThresholdSpace(exits, *grid, frames=dimension, skips=skips, masks=masks)


def without_unsupported_gates(study: Study, runtime: Runtime) -> Study:
    """Returns the study without block gates if the target cannot skip blocks."""
    capabilities = runtime.capabilities()
    can_skip = capabilities.skips and (study.target.batch == 1 or capabilities.dynamic_batch)
    return study if can_skip else study.model_copy(update={"skips": SkipsSection()})


def _supported_patterns(study: Study, runtime: Runtime) -> tuple[str, ...]:
    """Returns the study's patterns of zeros, without 2:4 if the target has no sparse kernels."""
    has_kernels = runtime.capabilities().sparse_2_4
    return tuple(pattern for pattern in study.space.patterns if has_kernels or pattern != TWO_OF_FOUR)


def unsupported_options(study: Study, runtime: Runtime, target: Target, space: JointSpace) -> list[str]:
    """Returns remarks on options of the study that the target or the network does not support."""
    where = f"{target.device} has no {{}} in {target.runtime}"
    remarks = [
        f"{kind} storage is left out: {where.format('kernels that read it')}"
        for kind in study.space.storage
        if kind not in space.precision.storage
    ]
    if _supported_patterns(study, runtime) != study.space.patterns:
        remarks = [f"pattern {TWO_OF_FOUR} is left out: {where.format('sparse kernels')}", *remarks]
    if without_unsupported_gates(study, runtime).skips != study.skips:
        remarks.append(f"[skips] is left out: {target.runtime} does not skip blocks at batch {target.batch}")
    if study.masks.method:
        remarks.append(
            f"[masks] save FLOPs only: {target.runtime} computes what is masked too, and the masks beside it;"
            " ask for FLOPs in --budget to use them"
        )
    if space.thresholds.exits and study.exits.thresholds == "solved" and not space.thresholds.solved:
        reason = "frames of a stream decide who reaches them" if study.frames else "nothing else varies"
        remarks.append(f"thresholds of exits are searched, not solved: {reason}")
    if "depth" in study.space.only and study.space.keep_blocks_at_least < 1 and not space.depth.stages:
        remarks.append(
            "depth is no dimension: the network has no residual blocks that return their input's shape, with weights of"
            " their own, without which its file answers as torch does"
        )
    if study.space.sizes == "auto" and "size" in study.space.only and not space.input_size.dimensions():
        remarks.append("input size is no dimension: images are not square, or the network runs at their own size only")
    return remarks


def space_line(space: JointSpace) -> str:
    """Returns what else may vary, in a sentence: blocks that can be left out, and sizes of the input."""
    fewest = {name.removeprefix(PREFIX): blocks.low for name, blocks in space.depth.dimensions().items()}
    able = sum(len(stage.blocks) - fewest[stage.name] for stage in space.depth.stages if stage.name in fewest)
    depth = "No residual block is left out"
    if able:
        blocks, stages = _counted(able, "residual block"), _counted(len(fewest), "stage")
        depth = f"{blocks} in {stages} can be left out"
    sizes = space.input_size.sizes if space.input_size.dimensions() else ()
    return f"{depth}{f'; images of {_listed(sizes)} pixels' if sizes else ''}."


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _listed(sizes: Sequence[int]) -> str:
    *others, last = map(str, sizes)
    return f"{', '.join(others)} or {last}"


def split_remarks(choosing: int, scored: int) -> list[str]:
    """Returns remarks on how many validation images choose thresholds and how many score versions.

    If few are left to score on, a second remark tells how wide the interval of an accuracy is.
    """
    counts = f"{choosing} of the validation images choose the exits' thresholds"
    remarks = [f"{counts}; every version is scored on the other {scored}"]
    if choosing < FEW_CHOOSING:
        remarks.append(f"thresholds that {choosing} images choose hold for hardly any others; raise [exits] choose_on")
    if scored < FEW_SCORED and half_interval(scored) != half_interval(choosing + scored):
        widths = [half_interval(count) for count in (scored, choosing + scored)]
        remarks.append(
            f"an accuracy of {EXAMPLE:.0%} is known to within {widths[0]} points on {scored} images, to within"
            f" {widths[1]} on all {choosing + scored}; more validation images, a lower [exits] choose_on, or"
            " thresholds = 'searched', which scores on all of them, narrow it"
        )
    return remarks


def half_interval(images: int) -> str:
    """Returns the half-width of the 95% interval of an accuracy of 90% on so many images, in points, as text."""
    low, high = wilson(EXAMPLE, images)
    return f"{max(EXAMPLE - low, high - EXAMPLE) * 100:.1f}"
