"""What a study's target can run, and the space that it leaves."""

from collections.abc import Sequence

import torch

from evaluators.data import Splits
from evaluators.target import Capabilities, Runtime, Target
from search.study import SkipsSection, Study, StudyError
from spaces.criteria import Evidence, criterion
from spaces.gates import GateSpace, is_of_gate
from spaces.groups import Groups
from spaces.joint import JointSpace
from spaces.masks.mask import masks_of
from spaces.network import ExitNetwork
from spaces.patterns import TWO_OF_FOUR, PatternSpace, offered_patterns
from spaces.precision import PrecisionSpace
from spaces.space import Real
from spaces.sparsity import SparsitySpace


def target_of(study: Study, library: Runtime) -> Target:
    """Returns the target that the study asks for, here.

    Raises:
        StudyError: its fp32 layers are wanted in what the device cannot run, or frames of a stream in batches.
    """
    wanted, device = study.target, library.device()
    if wanted.fp32_in not in ("fp32", *library.capabilities().fp32_in):
        able = {"tf32": "TensorRT on a GPU from Ampere on", "bf16": "OpenVINO on a CPU that multiplies bf16"}
        raise StudyError(
            f"target.{wanted.fp32_in} wants {able[wanted.fp32_in]}, got {wanted.runtime} on {device}; leave it out"
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
    scores = criterion(study.space.criterion)(network, groups.free, evidence)
    return JointSpace(
        SparsitySpace(groups.free, scores, min(steps), study.space.keep_at_least, max(steps)),
        _precisions(study, layers, able),
        _gates(study, exits, network),
        PatternSpace(offered_patterns(network, groups.free, min(steps), _patterns(study, target))),
    )


def _precisions(study: Study, layers: Sequence[str], able: Capabilities) -> PrecisionSpace:
    """Returns the precision of each layer; those of gates keep the reference."""
    storage = [each for each in study.space.storage if each in able.storage]
    held = dict.fromkeys(filter(is_of_gate, layers), able.precisions[:1])
    return PrecisionSpace(layers, able.precisions, held, storage)


def _gates(study: Study, exits: Sequence[str], network: ExitNetwork) -> GateSpace:
    """Returns the gates; beside frames of a stream, which decide who reaches the exits, all thresholds are searched."""
    grid = study.space.lowest_threshold, study.space.threshold_step
    frames, skips = study.frames, network.skip_blocks
    masks = [mask.site.block for mask in masks_of(network) if mask.moves]
    if frames is None:
        return GateSpace(exits, *grid, solved=study.exits.thresholds == "solved", skips=skips, masks=masks)
    steps = max(round(frames.highest_threshold / frames.threshold_step), 1)
    highest = round(steps * frames.threshold_step, 6)
    return GateSpace(exits, *grid, frames=Real(0.0, highest, frames.threshold_step), skips=skips, masks=masks)


def runnable(study: Study, target: Runtime) -> Study:
    """Returns the study without gates of blocks where the target does not skip what they say."""
    able = target.capabilities()
    able_to = able.skips and (study.target.batch == 1 or able.dynamic_batch)
    return study if able_to else study.model_copy(update={"skips": SkipsSection()})


def _patterns(study: Study, target: Runtime) -> tuple[str, ...]:
    """Returns the study's patterns of zeros but for 2:4 where the target has no kernels for it."""
    able = target.capabilities().sparse_2_4
    return tuple(pattern for pattern in study.space.patterns if able or pattern != TWO_OF_FOUR)


def left_out(study: Study, library: Runtime, target: Target, space: JointSpace) -> list[str]:
    """Returns, in words, what of the study's wishes does not come true."""
    where = f"{target.device} has no {{}} in {target.runtime}"
    found = [
        f"{kind} storage is left out: {where.format('kernels that read it')}"
        for kind in study.space.storage
        if kind not in space.precision.storage
    ]
    if _patterns(study, library) != study.space.patterns:
        found = [f"pattern {TWO_OF_FOUR} is left out: {where.format('sparse kernels')}", *found]
    if runnable(study, library).skips != study.skips:
        found.append(f"[skips] is left out: {target.runtime} does not skip blocks at batch {target.batch}")
    if study.masks.method:
        found.append(
            f"[masks] save FLOPs only: {target.runtime} computes what is masked too, and the masks beside it;"
            " ask for FLOPs in --budget to use them"
        )
    if space.gates.exits and study.exits.thresholds == "solved" and not space.gates.solved:
        found.append("thresholds of exits are searched, not solved: frames of a stream decide who reaches them")
    return found
