"""Quantization-aware training of one version: weights and the steps of their grids learn together.

Only layers in int8 are rounded; layers in other precisions train in float.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from evaluators.graph.template import TRANSPOSED
from evaluators.quantization.int8 import NO_GRIDS, Grids, Placement, Ranges
from evaluators.quantization.trainable_graph import Rounding, TrainableGraph
from search.config.registries import QUANTIZERS
from search.config.study import QatSection
from search.recovery.base import NO_PATTERNS, NO_RANGES, QatContext, RecoveryContext
from search.recovery.quantizers.base import Method
from search.training.distillation import total_loss
from search.training.loop import Fitted, Report, TrainingBatches, fast_arithmetic, fit, load_weights, save
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork
from spaces.patterns import layer_weights


@dataclass(frozen=True)
class Learned:
    """What a file takes over from a training that felt int8.

    Args:
        ranges: of activations.
        grids: weights on their grids.
    """

    ranges: Ranges
    grids: Grids


NOT_TRAINED = Learned(NO_RANGES, NO_GRIDS)
"""No training felt int8."""


class Int8Network(nn.Module):
    """A network and the quantizers of its int8 tensors, which run as the file will.

    Batch normalisation is folded with its running statistics, which rest; its scales and shifts learn.

    Args:
        network: pruned or not, in evaluation mode; its weights learn in place.
        graph: the exported graph.
        placement: where Q/DQ goes.
        quantizer: a method of `QUANTIZERS`.
        ranges: of the activations before training.
        patterns: of zeros, by layer; weights that are zero stay zero.
    """

    def __init__(
        self,
        network: ExitNetwork,
        graph: TrainableGraph,
        placement: Placement,
        quantizer: str,
        ranges: Ranges,
        patterns: Mapping[str, str] = NO_PATTERNS,
    ) -> None:
        super().__init__()
        self.network = network
        self._graph = graph
        self._tensors = graph.rounded_tensors(placement)
        made: Method = QUANTIZERS[quantizer]()
        origins = sorted(set(self._tensors.values()))
        # Modules are registered by number: tensors' names have dots.
        self._steps = {name: made.activation(*ranges[name]) for name in origins}
        self._weights = {
            name: made.weight(self._folded(name), axis, graph.weight_limit, graph.per_channel)
            for name, axis in graph.rounded_weights(placement).items()
        }
        self.activations = nn.ModuleList(self._steps.values())
        self.weights = nn.ModuleList(self._weights.values())
        paths = layer_weights(network, patterns).values()
        self._kept = {path: (network.get_parameter(path) != 0).float() for path in paths}

    def _folded(self, name: str) -> Tensor:
        return self._graph.folded_weight(name, self.network.state_dict())

    def begin(self) -> None:
        """Brings the weights to where their quantizers want training to begin."""
        for name, quantizer in self._weights.items():
            folded = self._folded(name)
            factor = torch.where(folded == 0, 1.0, quantizer.start(folded) / folded)
            weight = self.network.get_parameter(name.removesuffix(TRANSPOSED))
            weight.data.mul_(factor.T if name.endswith(TRANSPOSED) else factor)

    def logits(self, images: Tensor) -> list[Tensor]:
        """Returns the logits of each exit and of the trunk, in fp32; the exits' gradients end at their heads."""
        state = self.network.state_dict(keep_vars=True)
        state |= {path: state[path] * kept for path, kept in self._kept.items()}
        tensors = {name: self._steps[origin] for name, origin in self._tensors.items()}
        return self._graph.logits(state, images, Rounding(tensors, self._weights))

    def learned(self) -> Learned:
        """Returns what a file takes over, besides the network's own weights."""
        return Learned(
            {name: step.range() for name, step in self._steps.items()},
            {name: quantizer.grid(self._folded(name)) for name, quantizer in self._weights.items()},
        )


def train_int8(
    learner: Int8Network,
    teacher: ExitNetwork,
    batches: TrainingBatches,
    settings: QatSection,
    checkpoint: Path | None = None,
    report: Report = lambda _done, _total: None,
) -> Fitted:
    """Trains a network and its quantizers in place, on labels and on the dense network's answers.

    Args:
        learner: the network with its quantizers.
        teacher: the dense network in fp32, in evaluation mode.
        batches: the training set.
        settings: for how long, and how much the teacher counts.
        checkpoint: where each epoch is kept.
        report: told how far it is.

    Raises:
        DivergedError: the loss is not finite for the second time.
    """
    taught = settings.distillation > 0
    learner.begin()

    def step(images: Tensor, labels: Tensor, done: float, generator: torch.Generator) -> float:  # noqa: ARG001
        with fast_arithmetic():
            with torch.no_grad():
                answers = teacher.trunk(images).float() if taught else torch.empty(0)
            found = learner.logits(images)
        loss = total_loss(found, answers, labels, settings.distillation, settings.temperature)
        loss.backward()
        return float(loss.detach())

    return fit(learner, step, batches, settings, checkpoint, report)


def train_int8_kept(
    context: RecoveryContext,
    int8: QatContext,
    network: ExitNetwork,
    candidate: Candidate,
    settings: QatSection,
    start: str,
) -> Learned:
    """Trains a version in its own precisions in place, or loads what an earlier call with the same arguments came to.

    Args:
        ground: what it is trained on.
        int8: how int8 is felt.
        network: compressed as `candidate` says, and recovered in float.
        candidate: its precisions and patterns.
        settings: for how long and how.
        start: what was done to its weights before, as part of the content key.

    Raises:
        DivergedError: the loss is not finite for the second time.
    """
    placement = int8.builder.int8_placement(network, candidate)
    places = repr((sorted(placement.nodes), sorted(placement.tensors)))
    shape = repr((sorted(candidate.channels.items()), sorted(candidate.patterns.items())))
    file = context.file("qat", start, int8.key, shape, places, settings.model_dump_json())

    def learner(ranges: Ranges) -> Int8Network:
        return Int8Network(network, int8.graph, placement, settings.quantizer, ranges, candidate.patterns)

    found = learner(int8.builder.ranges)
    if not load_weights(found, file):
        found = learner(int8.builder.read_ranges(network, int8.calibration))
        batches = TrainingBatches(context.train, settings.batch, settings.seed, context.augment)
        train_int8(
            found,
            context.network,
            batches,
            settings,
            file.with_suffix(".partial.pt"),
            lambda part, total: context.say("Training a version in int8", part, total),
        )
        save(found.state_dict(), file)
    return found.learned()
