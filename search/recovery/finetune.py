"""Fine-tuning of one candidate, with distillation from the dense network."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from evaluators.quantization.int8 import Ranges
from search.config.study import FinetuneSection
from search.recovery.base import NO_PATTERNS, NO_RANGES, RecoveryContext, effort_of, form_key
from search.recovery.gradual_pruning import GradualPruning
from search.training.batchnorm import check_images, recovery_images, refresh_statistics
from search.training.distillation import all_logits, total_loss
from search.training.loop import (
    Batch,
    Fitted,
    Report,
    TrainingBatches,
    fast_arithmetic,
    fit,
    fitted_of,
    load_weights,
    save_fitted,
)
from search.training.teacher import Teacher
from spaces.depth import shortened
from spaces.dynamic.exit_network import ExitNetwork
from spaces.input_size import at_size


class FinetuneRecovery:
    """Fine-tunes every candidate separately, and caches the weights by channels and patterns."""

    trains_per_candidate: ClassVar[bool] = True
    shares_weights: ClassVar[bool] = False

    ranges: Ranges = NO_RANGES
    trained = Fitted()

    def __init__(self, context: RecoveryContext) -> None:
        self.source = context.network
        self.effort = f"finetune {effort_of(context.settings.finetune)}"
        self._context = context
        self._images = recovery_images(context.train, context.settings.images)

    def recover(
        self,
        network: ExitNetwork,
        channels: Mapping[str, int],
        patterns: Mapping[str, str] = NO_PATTERNS,
    ) -> None:
        """Trains the network, or loads it if these channels and patterns were trained before."""
        finetune_kept(self._context, network, channels, self._context.settings.finetune, self._images, "", patterns)


def finetune_kept(
    context: RecoveryContext,
    network: ExitNetwork,
    channels: Mapping[str, int],
    settings: FinetuneSection,
    images: Tensor,
    start: str,
    patterns: Mapping[str, str] = NO_PATTERNS,
    source: ExitNetwork | None = None,
) -> Fitted:
    """Fine-tunes a network in place, or loads the cached result of an earlier call with the same arguments.

    Each round of the training is cached, so that one round more costs that round.

    Args:
        context: the dense network, the training images and the cache.
        network: pruned.
        channels: number of channels that it keeps, by group.
        settings: length and method of the training.
        images: for recomputing batch norm statistics at the end.
        start: earlier changes to its weights, as part of the cache key.
        patterns: of zeros, by layer; they stay zero.
        source: the network that it was pruned from, where gradual pruning starts; by default the dense one.

    Raises:
        DivergedError: the loss is not finite for the second time.
    """
    trained = Fitted()
    for each in settings.each_round():
        trained = trained + _round_kept(context, network, channels, each, images, start, patterns, source)
        start += each.model_dump_json()
    return trained


def _round_kept(
    context: RecoveryContext,
    network: ExitNetwork,
    channels: Mapping[str, int],
    settings: FinetuneSection,
    images: Tensor,
    start: str,
    patterns: Mapping[str, str],
    source: ExitNetwork | None,
) -> Fitted:
    """Fine-tunes a network for one round, or loads the cached result; see `finetune_kept`."""
    shape = repr(sorted(channels.items())) + (repr(sorted(patterns.items())) if patterns else "")
    shape += form_key(network)
    file = context.file("finetune", start, shape, settings.model_dump_json())
    if load_weights(network, file):
        return fitted_of(file)
    gradual = None
    if settings.pruning == "gradual":
        wide = shortened(copy.deepcopy(source or context.network), network.removed_blocks)
        wide = at_size(wide, network.input_size)
        gradual = GradualPruning(wide, patterns, channels, context.sparsity)
    elif patterns:
        gradual = GradualPruning(network, patterns)
    fitted = finetune(
        network,
        context.teacher,
        context.batches(settings),
        settings,
        file.with_suffix(".partial.pt"),
        lambda part, total: context.say("Fine-tuning a version", part, total),
        gradual,
    )
    refresh_statistics(network, images, check_images(context.train, len(images)))
    save_fitted(network.state_dict(), fitted, file)
    return fitted


def finetune(
    network: ExitNetwork,
    teacher: Teacher,
    batches: TrainingBatches,
    settings: FinetuneSection,
    checkpoint: Path | None = None,
    report: Report = lambda _done, _total: None,
    gradual: GradualPruning | None = None,
) -> Fitted:
    """Trains a pruned network with its exits in place, on labels and by distillation from the dense network.

    Args:
        network: pruned; its batch norm statistics are updated.
        teacher: the dense network.
        batches: the training set.
        settings: length of the training, and weight of the distillation.
        checkpoint: file that each epoch is saved to.
        report: called with the progress.
        gradual: trains a wider network instead, whose weights are copied into `network` at the end; batch norm
            statistics have to be recomputed then.

    Raises:
        DivergedError: the loss is not finite for the second time.
    """
    distills = settings.distillation > 0

    def step(batch: Batch) -> float:
        with fast_arithmetic():
            logits = gradual.logits(batch.images, batch.done) if gradual else all_logits(network, batch.images)
        answers = teacher.logits(batch) if distills else torch.empty(0)
        loss = total_loss(logits, answers, batch.labels, settings.distillation, settings.temperature)
        loss.backward()
        return float(loss.detach())

    fitted = fit(gradual.network if gradual else network, step, batches, settings, checkpoint, report)
    if gradual:
        gradual.finish(network)
    return fitted
