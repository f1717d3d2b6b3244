"""Quantization-aware training of one version: weights and quantization steps are trained together.

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
from search.recovery.base import NO_PATTERNS, NO_RANGES, QatContext, RecoveryContext, form_key
from search.recovery.quantizers.base import Method
from search.training.distillation import total_loss
from search.training.loop import Batch, Fitted, Report, TrainingBatches, fast_arithmetic, fit, load_weights, save
from search.training.teacher import Teacher
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork, resized
from spaces.patterns import layer_weights


@dataclass(frozen=True)
class Learned:
    """What an export takes over from a quantization-aware training.

    Args:
        ranges: of activations.
        grids: quantized weights.
    """

    ranges: Ranges
    grids: Grids


NOT_TRAINED = Learned(NO_RANGES, NO_GRIDS)
"""There was no quantization-aware training."""


class Int8Network(nn.Module):
    """A network with fake quantization of its int8 tensors, as in the exported file.

    Batch norm is folded with its running statistics, which stay fixed; its scales and shifts are trained.

    Args:
        network: in evaluation mode; its weights are trained in place.
        graph: the exported graph in torch.
        placement: of the Q/DQ nodes.
        quantizer: one of `QUANTIZERS`.
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
        method: Method = QUANTIZERS[quantizer]()
        origins = sorted(set(self._tensors.values()))
        # Modules are registered by number, because names of tensors contain dots.
        self._steps = {name: method.activation(*ranges[name]) for name in origins}
        self._weights = {
            name: method.weight(self._folded(name), axis, graph.weight_limit, graph.per_channel)
            for name, axis in graph.rounded_weights(placement).items()
        }
        self.activations = nn.ModuleList(self._steps.values())
        self.weights = nn.ModuleList(self._weights.values())
        paths = layer_weights(network, patterns).values()
        self._kept = {path: (network.get_parameter(path) != 0).float() for path in paths}

    def _folded(self, name: str) -> Tensor:
        return self._graph.folded_weight(name, self.network.state_dict())

    def begin(self) -> None:
        """Sets the weights to the values that their quantizers start training with."""
        for name, quantizer in self._weights.items():
            folded = self._folded(name)
            factor = torch.where(folded == 0, 1.0, quantizer.start(folded) / folded)
            weight = self.network.get_parameter(name.removesuffix(TRANSPOSED))
            weight.data.mul_(factor.T if name.endswith(TRANSPOSED) else factor)

    def logits(self, images: Tensor) -> list[Tensor]:
        """Returns the logits of each exit and of the trunk, in fp32; gradients of exits stop at their heads."""
        state = self.network.state_dict(keep_vars=True)
        state |= {path: state[path] * kept for path, kept in self._kept.items()}
        tensors = {name: self._steps[origin] for name, origin in self._tensors.items()}
        images = resized(images, self.network.input_size)
        return self._graph.logits(state, images, Rounding(tensors, self._weights))

    def learned(self) -> Learned:
        """Returns what an export takes over, besides the network's own weights."""
        return Learned(
            {name: step.range() for name, step in self._steps.items()},
            {name: quantizer.grid(self._folded(name)) for name, quantizer in self._weights.items()},
        )


def train_int8(
    learner: Int8Network,
    teacher: Teacher,
    batches: TrainingBatches,
    settings: QatSection,
    checkpoint: Path | None = None,
    report: Report = lambda _done, _total: None,
) -> Fitted:
    """Trains a network and its quantizers in place, on labels and by distillation from the dense network.

    Args:
        learner: the network with its quantizers.
        teacher: the dense network in fp32.
        batches: the training set.
        settings: length of the training, and weight of the distillation.
        checkpoint: file that each epoch is saved to.
        report: called with the progress.

    Raises:
        DivergedError: the loss is not finite for the second time.
    """
    distills = settings.distillation > 0
    learner.begin()

    def step(batch: Batch) -> float:
        with fast_arithmetic():
            logits = learner.logits(batch.images)
        answers = teacher.logits(batch) if distills else torch.empty(0)
        loss = total_loss(logits, answers, batch.labels, settings.distillation, settings.temperature)
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
    """Trains a version in its own precisions in place, or loads the cached result of an earlier call.

    Args:
        context: the dense network, the training images and the cache.
        int8: what quantization-aware training needs.
        network: the candidate's, pruned and recovered in float.
        candidate: has its precisions and patterns.
        settings: length and method of the training.
        start: earlier changes to its weights, as part of the cache key.

    Raises:
        DivergedError: the loss is not finite for the second time.
    """
    placement = int8.builder.int8_placement(network, candidate)
    places = repr((sorted(placement.nodes), sorted(placement.tensors)))
    shape = repr((sorted(candidate.channels.items()), sorted(candidate.patterns.items())))
    shape += form_key(network)
    file = context.file("qat", start, int8.key, shape, places, settings.model_dump_json())

    def learner(ranges: Ranges) -> Int8Network:
        graph = int8.builder.trainable(network)
        return Int8Network(network, graph, placement, settings.quantizer, ranges, candidate.patterns)

    # A shortened network may round tensors that the dense one does not; ranges that are loaded replace these.
    known = int8.builder.read_ranges(network, int8.calibration) if form_key(network) else int8.builder.ranges
    int8_network = learner(known)
    if not load_weights(int8_network, file):
        int8_network = learner(int8.builder.read_ranges(network, int8.calibration))
        train_int8(
            int8_network,
            context.teacher,
            context.batches(settings),
            settings,
            file.with_suffix(".partial.pt"),
            lambda part, total: context.say("Training a version in int8", part, total),
        )
        save(int8_network.state_dict(), file)
    return int8_network.learned()
