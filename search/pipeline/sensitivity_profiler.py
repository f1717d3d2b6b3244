"""How much each group of channels matters: loss and divergence at several widths of one group at a time."""

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
"""Loss and divergence are means over at most so many calibration images."""
WIDTHS = 6
"""So many widths of a group are tried at most, the dense one not counted."""
_BATCH = 64
_STEP = "Profiling the groups, once"


def widths(sparsity: SparsitySpace) -> dict[str, list[int]]:
    """Returns the widths that are tried of each group that has a choice: on offer, spread evenly, widest first."""
    found = {}
    for name, dimension in sparsity.dimensions().items():
        assert isinstance(dimension, Integer)
        steps = (dimension.high - dimension.low) // dimension.step
        chosen = {round(place) for place in np.linspace(0, steps, min(steps, WIDTHS) + 1)}
        found[name.removeprefix(PREFIX)] = [dimension.low + dimension.step * i for i in sorted(chosen, reverse=True)]
    return found


class Profiler:
    """Measures the sensitivity of every group that may shrink, or knows it from an earlier call.

    Recovery is the study's, but for `finetune`: training at every point would take hours, so there only the batch
    statistics are measured anew.
    """

    def __init__(self, pipeline: CompressionPipeline) -> None:
        trains = pipeline.study.recovery.level == "finetune"
        self._recovery: Recovery = (
            BatchNormRecovery(pipeline.compressor.context) if trains else pipeline.compressor.recovery
        )
        self._network, self._sparsity = pipeline.network, pipeline.space.sparsity
        self._images, self._labels = _shuffled(pipeline.data.calibration)
        self._tried = widths(self._sparsity)
        self._file = _file(pipeline, self._recovery.effort, self._tried)
        self._known = _read(self._file)

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that are profiled."""
        return tuple(self._tried)

    @property
    def _missing(self) -> list[str]:
        return [name for name in self._tried if self._known is None or name not in self._known.groups]

    @property
    def known(self) -> Profile | None:
        """The profile, where it has been measured as a whole; else None."""
        return self._known if not self._missing else None

    def expected_seconds(self) -> float:
        """Returns how long `run` is going to take: one point is tried where any is missing."""
        missing = self._missing
        if not missing:
            return 0.0
        begin = time.perf_counter()
        self._weigh({missing[0]: self._tried[missing[0]][-1]})
        return (time.perf_counter() - begin) * sum(len(self._tried[name]) - 1 for name in missing)

    def run(self, progress: Progress) -> Profile:
        """Returns the profile.

        Each group's figures are kept as soon as they are there: an interrupted call loses one group's at most.
        """
        missing = self._missing
        found = self._known or Profile(self._recovery.effort, len(self._images), self._weigh({})[1], ())
        for done, name in enumerate(missing):
            progress(_STEP, len(self._tried) - len(missing) + done, len(self._tried))
            found = replace(found, points=(*found.points, *self._points(name, self._tried[name])))
            cache.write_atomically(self._file, json.dumps(found.to_dict()))
        if missing:
            progress(_STEP, len(self._tried), len(self._tried))
        self._known = found
        return found

    @cached_property
    def _flops(self) -> ScaledFlops:
        return ScaledFlops(self._network, self._sparsity.groups, self._images[:1])

    @cached_property
    def _dense(self) -> Tensor:
        return _answers(self._network, self._images)

    def _points(self, name: str, counts: list[int]) -> list[Point]:
        """Returns the points of one group; at its full width the network is the one that was given."""
        dense = self._flops.count({})
        found = []
        for count in counts:
            loss, divergence = (0.0, 0.0) if count == counts[0] else self._weigh({name: count})
            share = self._flops.count({name: count}) / dense
            found.append(Point(name, count, count / counts[0], loss, divergence, share))
        return found

    def _weigh(self, channels: Mapping[str, int]) -> tuple[float, float]:
        """Returns the change of the loss and the divergence of a network that keeps these channels, in nats."""
        network = self._sparsity.apply(self._recovery.source, channels)
        self._recovery.recover(network, channels)
        answers = _answers(network, self._images)
        loss = F.nll_loss(answers, self._labels) - F.nll_loss(self._dense, self._labels)
        divergence = F.kl_div(answers, self._dense, reduction="batchmean", log_target=True)
        return float(loss), max(float(divergence), 0.0)


def _answers(network: ExitNetwork, images: Tensor) -> Tensor:
    """Returns the logarithms of the trunk's probabilities, `(n, classes)`."""
    with torch.no_grad():
        return torch.cat([F.log_softmax(network.trunk(batch), dim=1) for batch in images.split(_BATCH)])


def _shuffled(data: LabelledImages) -> tuple[Tensor, Tensor]:
    """Returns some images and their classes: the first of a sorted set would be of one class."""
    chosen = np.random.default_rng(0).permutation(len(data))[:IMAGES]
    return torch.from_numpy(data.images[chosen]), torch.from_numpy(data.labels[chosen])


def _file(pipeline: CompressionPipeline, effort: str, tried: Mapping[str, list[int]]) -> Path:
    """Returns where the profile of this network, at this effort, on these images and widths is kept."""
    settings = pipeline.study.recovery.model_dump_json(exclude={"final"})
    context = pipeline.compressor.context
    key = cache.key(context.key, effort, settings, str(IMAGES), json.dumps(tried))
    return context.folder / "profiles" / f"{key}.json"


def _read(file: Path) -> Profile | None:
    try:
        return Profile.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):  # none yet, or torn: it is measured
        return None
