"""Learned roundings: for which versions they are learned, and where they are kept."""

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
    """Rounds weights as the study says.

    Learning takes minutes, so it is done once for the dense network, all in int8, and what it comes to serves every
    version that has all channels. A pruned one is worth it only where it is fine-tuned on top of the search's recovery.

    Args:
        ground: where roundings are kept, and who is told.
        builder: of the artifacts.
        settings: of the study.
        images: for calibration, `(n, c, h, w)`.
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
        self._wanted = settings.rounding == "adaround"
        self._learning = Learning(settings.rounding_steps)
        self._images = images
        self._dense: Grids | None = None

    def learn(self, network: ExitNetwork, candidate: Candidate, ranges: Ranges, is_pruned: bool) -> Grids:
        """Returns the weights of a version's int8 layers, as they are rounded.

        Args:
            network: compressed and recovered.
            candidate: its precisions.
            ranges: of the activations.
            is_pruned: whether it lacks channels or weights.
        """
        if is_pruned:
            return self._kept(network, candidate, ranges)
        if self._dense is None:
            whole = replace(candidate, precision=uniform(self._builder.layers, "int8"))
            self._dense = self._kept(network, whole, ranges)
        return self._dense

    def is_due(self, candidate: Candidate, pruned: bool, tuned: bool) -> bool:
        """Returns whether a version's roundings are learned; otherwise its weights go to the nearest step."""
        return self._wanted and "int8" in candidate.precision.values() and (tuned or not pruned)

    def _kept(self, network: ExitNetwork, candidate: Candidate, ranges: Ranges) -> Grids:
        """Returns roundings that are learned now, or were for the same weights, precisions and ranges."""
        content = hashlib.sha256()
        for tensor in network.state_dict().values():
            content.update(tensor.numpy().tobytes())
        precisions = self._builder.written_precisions(network, candidate)
        learning = json.dumps(asdict(self._learning))
        what = (self._builder.grid, sorted(precisions.items()), sorted(ranges.items()), learning)
        file = self._context.file("adaround", content.hexdigest(), repr(what))
        if (known := _load(file)) is not None:
            return known
        found = self._builder.learn_rounding(
            network,
            candidate,
            self._images,
            self._learning,
            ranges,
            lambda done, total: self._context.say("Learning how to round weights", done, total),
        )
        save({name: (torch.from_numpy(g.values), torch.from_numpy(g.scale)) for name, g in found.items()}, file)
        return found


def _load(file: Path) -> Grids | None:
    if not file.is_file():
        return None
    try:
        content = torch.load(file, weights_only=True)
        return {name: QuantizedWeight(values.numpy(), scale.numpy()) for name, (values, scale) in content.items()}
    except Exception:  # a torn or foreign file is as good as none: it is made again
        return None
