"""Sensitivity profile: loss and divergence when one group of channels at a time is pruned to several widths."""

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluators.data import LabelledImages
from evaluators.flops.pruned import ScaledFlops
from search.config.progress import Progress
from search.pipeline.pipeline import CompressionPipeline
from search.recovery.base import Recovery
from search.recovery.batchnorm import BatchNormRecovery
from search.results.sensitivity import Point, Profile
from spaces import cache
from spaces.channels import PREFIX, SparsitySpace
from spaces.dimensions import Integer
from spaces.dynamic.exit_network import ExitNetwork

IMAGES = 256
"""Calibration images, at most, that loss and divergence are averaged over."""
WIDTHS = 6
"""Widths per group, at most, besides the dense one."""
_BATCH = 64
_STEP = "Profiling the groups, once"


def widths(sparsity: SparsitySpace) -> dict[str, list[int]]:
    """Returns the profiled widths of each group that the space may prune: evenly spread, widest first."""
    counts = {}
    for name, dimension in sparsity.dimensions().items():
        assert isinstance(dimension, Integer)
        steps = (dimension.high - dimension.low) // dimension.step
        chosen = {round(step) for step in np.linspace(0, steps, min(steps, WIDTHS) + 1)}
        counts[name.removeprefix(PREFIX)] = [dimension.low + dimension.step * i for i in sorted(chosen, reverse=True)]
    return counts


class Profiler:
    """Measures the sensitivity of every group that may be pruned, or reads it from the cache.

    Each pruned network is recovered as the study says, except for `finetune`: training at every point would take hours,
    so only the batch norm statistics are recomputed then.
    """

    def __init__(self, pipeline: CompressionPipeline) -> None:
        trains = pipeline.study.recovery.level == "finetune"
        self._recovery: Recovery = (
            BatchNormRecovery(pipeline.compressor.context) if trains else pipeline.compressor.recovery
        )
        self._network, self._sparsity = pipeline.network, pipeline.space.sparsity
        self._images, self._labels = _shuffled(pipeline.data.calibration)
        self._widths = widths(self._sparsity)
        self._file = _file(pipeline, self._recovery.effort, self._widths)
        self._known = _read(self._file)

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the profiled groups."""
        return tuple(self._widths)

    @property
    def _missing(self) -> list[str]:
        return [name for name in self._widths if self._known is None or name not in self._known.groups]

    @property
    def known(self) -> Profile | None:
        """The profile if it is complete, else None."""
        return self._known if not self._missing else None

    def expected_seconds(self) -> float:
        """Returns the seconds that `run` will take, extrapolated from one point; 0 if the profile is complete."""
        missing = self._missing
        if not missing:
            return 0.0
        begin = time.perf_counter()
        self._damage({missing[0]: self._widths[missing[0]][-1]})
        return (time.perf_counter() - begin) * sum(len(self._widths[name]) - 1 for name in missing)

    def run(self, progress: Progress) -> Profile:
        """Returns the profile, measuring the groups that are missing.

        It is written after each group, so an interrupted call loses one group at most.
        """
        missing = self._missing
        profile = self._known or Profile(self._recovery.effort, len(self._images), self._damage({})[1], ())
        for done, name in enumerate(missing):
            progress(_STEP, len(self._widths) - len(missing) + done, len(self._widths))
            profile = replace(profile, points=(*profile.points, *self._points(name, self._widths[name])))
            cache.write_atomically(self._file, json.dumps(profile.to_dict()))
        if missing:
            progress(_STEP, len(self._widths), len(self._widths))
        self._known = profile
        return profile

    @cached_property
    def _flops(self) -> ScaledFlops:
        return ScaledFlops(self._network, self._sparsity.groups, self._images[:1])

    @cached_property
    def _dense_log_probabilities(self) -> Tensor:
        return _log_probabilities(self._network, self._images)

    def _points(self, name: str, counts: list[int]) -> list[Point]:
        """Returns the points of one group; at full width the network is the dense one, without recovery."""
        dense = self._flops.count({})
        points = []
        for count in counts:
            loss, divergence = (0.0, 0.0) if count == counts[0] else self._damage({name: count})
            share = self._flops.count({name: count}) / dense
            points.append(Point(name, count, count / counts[0], loss, divergence, share))
        return points

    def _damage(self, channels: Mapping[str, int]) -> tuple[float, float]:
        """Returns the change of the loss, and the divergence, of a network with these channels per group, in nats."""
        network = self._sparsity.apply(self._recovery.source, channels)
        self._recovery.recover(network, channels)
        log_probabilities = _log_probabilities(network, self._images)
        loss = F.nll_loss(log_probabilities, self._labels) - F.nll_loss(self._dense_log_probabilities, self._labels)
        divergence = F.kl_div(log_probabilities, self._dense_log_probabilities, reduction="batchmean", log_target=True)
        return float(loss), max(float(divergence), 0.0)


def _log_probabilities(network: ExitNetwork, images: Tensor) -> Tensor:
    """Returns the log-probabilities of the last classifier, `(n, classes)`."""
    with torch.no_grad():
        return torch.cat([F.log_softmax(network.trunk(batch), dim=1) for batch in images.split(_BATCH)])


def _shuffled(data: LabelledImages) -> tuple[Tensor, Tensor]:
    """Returns a random sample of images and labels, because a set may be sorted by class."""
    chosen = np.random.default_rng(0).permutation(len(data))[:IMAGES]
    return torch.from_numpy(data.images[chosen]), torch.from_numpy(data.labels[chosen])


def _file(pipeline: CompressionPipeline, effort: str, counts: Mapping[str, list[int]]) -> Path:
    """Returns the cache file of the profile of this network with this recovery, and these images and widths."""
    settings = pipeline.study.recovery.model_dump_json(exclude={"final"})
    context = pipeline.compressor.context
    key = cache.key(context.key, effort, settings, str(IMAGES), json.dumps(counts))
    return context.folder / "profiles" / f"{key}.json"


def _read(file: Path) -> Profile | None:
    try:
        return Profile.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):  # missing or damaged: it is measured
        return None
