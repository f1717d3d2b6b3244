"""Learned rounding of weights (AdaRound): the versions that it applies to, and its cache."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.quantization.adaround import Learning
from evaluators.quantization.int8 import Grids, QuantizedWeight, Ranges
from search.config.study import QuantizationSection
from search.recovery.base import RecoveryContext
from search.training.loop import save
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork
from spaces.precision import uniform


class LearnedRounding:
    """Learns the rounding of weights, if the study asks for it.

    It takes minutes, so it is done once for the dense network with all layers in int8, and the result is used by every
    unpruned version. For a pruned version it is done only if that is fine-tuned on top of the search's recovery.

    Args:
        context: with the cache folder and the progress callback.
        builder: of the artifacts.
        settings: of the study.
        images: calibration images, `(n, c, h, w)`.
    """

    def __init__(
        self,
        context: RecoveryContext,
        builder: ArtifactBuilder,
        settings: QuantizationSection,
        images: NDArray[np.float32],
    ) -> None:
        self._context = context
        self._builder = builder
        self._is_enabled = settings.rounding == "adaround"
        self._learning = Learning(settings.rounding_steps)
        self._images = images
        self._dense: Grids | None = None

    def learn(self, network: ExitNetwork, candidate: Candidate, ranges: Ranges, is_pruned: bool) -> Grids:
        """Returns the rounded weights of a version's int8 layers.

        Args:
            network: compressed and recovered.
            candidate: has its precisions.
            ranges: of the activations.
            is_pruned: whether it lacks channels or weights.
        """
        if is_pruned:
            return self._cached(network, candidate, ranges)
        if self._dense is None:
            all_int8 = replace(candidate, precision=uniform(self._builder.layers, "int8"))
            self._dense = self._cached(network, all_int8, ranges)
        return self._dense

    def applies(self, candidate: Candidate, is_pruned: bool, is_finetuned: bool) -> bool:
        """Returns whether the rounding of a version is learned; otherwise weights are rounded to the nearest."""
        return self._is_enabled and "int8" in candidate.precision.values() and (is_finetuned or not is_pruned)

    def _cached(self, network: ExitNetwork, candidate: Candidate, ranges: Ranges) -> Grids:
        """Returns rounded weights, learned now or cached for the same weights, precisions and ranges."""
        digest = hashlib.sha256()
        for tensor in network.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        precisions = self._builder.written_precisions(network, candidate)
        learning = json.dumps(asdict(self._learning))
        inputs = (self._builder.grid, sorted(precisions.items()), sorted(ranges.items()), learning)
        file = self._context.file("adaround", digest.hexdigest(), repr(inputs))
        if (cached := _load(file)) is not None:
            return cached
        grids = self._builder.learn_rounding(
            network,
            candidate,
            self._images,
            self._learning,
            ranges,
            lambda done, total: self._context.say("Learning how to round weights", done, total),
        )
        content = {name: (torch.from_numpy(grid.values), torch.from_numpy(grid.scale)) for name, grid in grids.items()}
        save(content, file)
        return grids


def _load(file: Path) -> Grids | None:
    if not file.is_file():
        return None
    try:
        content = torch.load(file, weights_only=True)
        return {name: QuantizedWeight(values.numpy(), scale.numpy()) for name, (values, scale) in content.items()}
    except Exception:  # a damaged or foreign file is replaced
        return None
