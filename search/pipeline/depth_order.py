"""Which residual blocks each stage of a network leaves out first: measured once, and cached."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.data import LabelledImages
from evaluators.flops.evaluator import count_by_module
from search.config.cache import cache_folder
from search.config.progress import Progress
from spaces import cache
from spaces.depth import BlockStage, DepthSpace, find_stages, measurements, ordered_by_damage
from spaces.dynamic.exit_network import ExitNetwork

_STEP = "Measuring which blocks can go, once"
_MOST_IMAGES, _FEWEST_IMAGES = 128, 16
_FLOPS = 4e12
"""What all measurements together may cost; it decides how many images they have, on every machine alike."""


def depth_space(
    network: ExitNetwork,
    builder: ArtifactBuilder,
    calibration: LabelledImages,
    minimum: float,
    fingerprint: str,
    progress: Progress,
) -> DepthSpace:
    """Returns the stages of a network, with the order in which their blocks are left out.

    Args:
        network: the dense network, in evaluation mode.
        builder: exports it; a block is left out only if the file without it answers as torch does.
        calibration: images that damage is measured on.
        minimum: the smallest share of its blocks that a stage keeps.
        fingerprint: of the network's weights and the images.
        progress: called with the progress of the measurements.
    """
    image = torch.from_numpy(calibration.images[:1])
    stages = find_stages(network, image, builder.disagreement)
    if not stages:
        return DepthSpace(())
    images = _sample(calibration, _affordable(network, image, stages))
    content = json.dumps([asdict(stage) for stage in stages])
    file = cache_folder() / "depths" / f"{cache.key(fingerprint, content, str(len(images)), torch.__version__)}.json"
    known = _read(file)
    if known is None:
        known = ordered_by_damage(network, stages, images, lambda done, total: progress(_STEP, done, total))
        cache.write_atomically(file, json.dumps([asdict(stage) for stage in known]))
    return DepthSpace(known, minimum)


def _affordable(network: ExitNetwork, image: Tensor, stages: Sequence[BlockStage]) -> int:
    flops = sum(count_by_module(network.trunk, image).values())
    forwards = sum(measurements(len(stage.blocks)) for stage in stages)
    return int(np.clip(_FLOPS / max(flops * forwards, 1.0), _FEWEST_IMAGES, _MOST_IMAGES))


def _sample(data: LabelledImages, count: int) -> Tensor:
    """Returns a random sample of images, because a set may be sorted by class."""
    chosen = np.random.default_rng(0).permutation(len(data))[:count]
    return torch.from_numpy(data.images[chosen])


def _read(file: Path) -> list[BlockStage] | None:
    try:
        return [
            BlockStage(
                str(each["name"]), tuple(each["blocks"]), tuple(each["leaving"]), tuple(map(float, each["damage"]))
            )
            for each in json.loads(file.read_text(encoding="utf-8"))
        ]
    except (OSError, ValueError, TypeError, KeyError):  # missing or damaged: it is measured
        return None
