"""What a study's target can run, and the space that it leaves."""

from collections.abc import Sequence
from typing import Any

import torch

from evaluators.accuracy import wilson
from evaluators.data import Splits
from evaluators.runtimes.base import Capabilities, Runtime, Target
from search.config.sections import MasksSection
from search.config.study import SkipsSection, Study, StudyError
from spaces.channels import SparsitySpace
from spaces.dimensions import Real
from spaces.dynamic.exit_network import ExitNetwork, is_of_gate
from spaces.dynamic.masks.base import masks_of
from spaces.joint import JointSpace
from spaces.patterns import TWO_OF_FOUR, PatternSpace, offered_patterns
from spaces.precision import PrecisionSpace
from spaces.pruning.criteria import CRITERIA
from spaces.pruning.criteria.base import Evidence
from spaces.pruning.groups import Groups
from spaces.thresholds import ThresholdSpace

FEW_SCORED = 500
"""Where versions are scored on fewer images, the search says how well they are told apart."""
EXAMPLE = 0.9
"""Intervals are told for this accuracy, because none is measured yet."""


def target_of(study: Study, runtime: Runtime) -> Target:
    """Returns the target that the study asks for, here.

    Raises:
        StudyError: its fp32 layers are wanted in what the device cannot run, or frames of a stream in batches.
    """
    wanted, device = study.target, runtime.device()
    if wanted.fp32_in not in ("fp32", *runtime.capabilities().fp32_in):
        able = {"tf32": "TensorRT on a GPU from Ampere on", "bf16": "OpenVINO on a CPU that multiplies bf16"}
        raise StudyError(
            f"target.fp32_in = {wanted.fp32_in!r} wants {able[wanted.fp32_in]}, got {wanted.runtime} on {device};"
            " leave it out"
        )
    if study.frames and wanted.batch != 1:
        raise StudyError(
            f"frames of a stream come one at a time, got target.batch = {wanted.batch};"
            " set it to 1, or leave [frames] out"
        )
    return Target(wanted.runtime, device, wanted.batch, wanted.threads, wanted.fp32_in)


def space_of(
    study: Study, network: ExitNetwork, groups: Groups, data: Splits, layers: tuple[str, ...], target: Runtime
) -> JointSpace:
    """Returns what may vary: what the study asks for and the target can run.

    Args:
        study: the question.
        network: the dense network with its exits and gates.
        groups: its channels.
        data: whose calibration images some criteria look at.
        layers: those with a precision.
        target: what runs them.
    """
    able = target.capabilities()
    steps = [able.channel_steps[precision] for precision in able.precisions]
    exits = network.exit_names if study.target.batch == 1 or able.dynamic_batch else ()
    evidence = Evidence(torch.from_numpy(data.calibration.images[:]), torch.from_numpy(data.calibration.labels))
    scores = CRITERIA[study.space.criterion](network, groups.free, evidence)
    sparsity = SparsitySpace(groups.free, scores, min(steps), study.space.keep_at_least, max(steps))
    precision = _precisions(study, layers, able)
    patterns = PatternSpace(offered_patterns(network, groups.free, min(steps), _patterns(study, target)))
    alone = not any(part.dimensions() for part in (sparsity, precision, patterns))
    return JointSpace(sparsity, precision, _gates(study, exits, network, alone), patterns)


def searched(study: Study) -> Study:
    """Returns the study without what it does not search: nothing is placed or trained for it then.

    Channels are all kept, and there are no exits, gates of blocks, masks or zeros. Frames of a stream stay what
    versions are scored on.
    """
    only, nothing = study.space.only, dict[str, Any]()
    space: dict[str, Any] = {} if "channels" in only else {"keep_at_least": 1.0}
    space |= {} if "patterns" in only else {"patterns": ()}
    parts = {
        "exits": study.exits.model_copy(update=nothing if "exits" in only else {"after": ()}),
        "skips": study.skips if "skips" in only else SkipsSection(),
        "masks": study.masks if "masks" in only else MasksSection(),
        "space": study.space.model_copy(update=space),
    }
    return study.model_copy(update=parts)


def _precisions(study: Study, layers: Sequence[str], able: Capabilities) -> PrecisionSpace:
    """Returns the precision of each layer; those of gates keep the reference.

    Raises:
        StudyError: all layers are wanted in a precision that the target does not compute in.
    """
    fixed = study.space.precision
    if fixed not in ("searched", *able.precisions):
        raise StudyError(
            f"space.precision is one that {study.target.runtime} computes in, {' or '.join(able.precisions)},"
            f" got {fixed!r}; leave it out to search it"
        )
    held: dict[str, tuple[str, ...]] = dict.fromkeys(filter(is_of_gate, layers), able.precisions[:1])
    if fixed == "searched" and "precision" in study.space.only:
        return PrecisionSpace(
            layers, able.precisions, held, [each for each in study.space.storage if each in able.storage]
        )
    same: tuple[str, ...] = able.precisions[:1] if fixed == "searched" else (fixed,)
    return PrecisionSpace(layers, able.precisions, dict.fromkeys(layers, same) | held)


def _gates(study: Study, exits: Sequence[str], network: ExitNetwork, alone: bool) -> ThresholdSpace:
    """Returns the gates.

    Thresholds of exits are searched beside frames of a stream, which decide who reaches the exits; and where nothing
    else varies, because solved they would be one version.
    """
    grid = study.space.lowest_threshold, study.space.threshold_step
    frames, skips = study.frames, network.skip_blocks
    masks = [mask.site.block for mask in masks_of(network) if mask.moves]
    if frames is None:
        solved = study.exits.thresholds == "solved" and not (alone and not skips and not masks)
        return ThresholdSpace(exits, *grid, solved=solved, skips=skips, masks=masks)
    steps = max(round(frames.highest_threshold / frames.threshold_step), 1)
    highest = round(steps * frames.threshold_step, 6)
    varies = Real(0.0, highest, frames.threshold_step) if "frames" in study.space.only else None
    return ThresholdSpace(exits, *grid, frames=varies, skips=skips, masks=masks)


def runnable(study: Study, target: Runtime) -> Study:
    """Returns the study without gates of blocks where the target does not skip what they say."""
    able = target.capabilities()
    able_to = able.skips and (study.target.batch == 1 or able.dynamic_batch)
    return study if able_to else study.model_copy(update={"skips": SkipsSection()})


def _patterns(study: Study, target: Runtime) -> tuple[str, ...]:
    """Returns the study's patterns of zeros but for 2:4 where the target has no kernels for it."""
    able = target.capabilities().sparse_2_4
    return tuple(pattern for pattern in study.space.patterns if able or pattern != TWO_OF_FOUR)


def left_out(study: Study, runtime: Runtime, target: Target, space: JointSpace) -> list[str]:
    """Returns, in words, what of the study's wishes does not come true."""
    where = f"{target.device} has no {{}} in {target.runtime}"
    found = [
        f"{kind} storage is left out: {where.format('kernels that read it')}"
        for kind in study.space.storage
        if kind not in space.precision.storage
    ]
    if _patterns(study, runtime) != study.space.patterns:
        found = [f"pattern {TWO_OF_FOUR} is left out: {where.format('sparse kernels')}", *found]
    if runnable(study, runtime).skips != study.skips:
        found.append(f"[skips] is left out: {target.runtime} does not skip blocks at batch {target.batch}")
    if study.masks.method:
        found.append(
            f"[masks] save FLOPs only: {target.runtime} computes what is masked too, and the masks beside it;"
            " ask for FLOPs in --budget to use them"
        )
    if space.thresholds.exits and study.exits.thresholds == "solved" and not space.thresholds.solved:
        why = "frames of a stream decide who reaches them" if study.frames else "nothing else varies"
        found.append(f"thresholds of exits are searched, not solved: {why}")
    return found


def halves_told(choosing: int, scored: int) -> list[str]:
    """Returns, in words, what the validation images are for where some of them choose thresholds.

    Where few are left to score on, what that does to the interval of an accuracy is said, too.
    """
    counts = f"{choosing} of the validation images choose the exits' thresholds"
    found = [f"{counts}; every version is scored on the other {scored}"]
    if scored < FEW_SCORED:
        doubts = [points_known(count) for count in (scored, choosing + scored)]
        found.append(
            f"an accuracy of {EXAMPLE:.0%} is known to within {doubts[0]} points on {scored} images, to within"
            f" {doubts[1]} on all {choosing + scored}; more validation images or [exits] thresholds = 'searched', which"
            " scores on all of them, narrow it"
        )
    return found


def points_known(images: int) -> str:
    """Returns how far a true accuracy may lie from a measured one of 90%, in points at 95%, as text."""
    low, high = wilson(EXAMPLE, images)
    return f"{max(EXAMPLE - low, high - EXAMPLE) * 100:.1f}"
