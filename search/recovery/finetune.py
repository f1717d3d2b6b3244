"""Fine-tuning of one candidate, taught by the dense network."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from evaluators.quantization.int8 import Ranges
from search.config.study import FinetuneSection
from search.recovery.base import NO_PATTERNS, NO_RANGES, RecoveryContext, effort_of
from search.recovery.gradual_pruning import GradualPruning
from search.training.batchnorm import check_images, recovery_images, refresh_statistics
from search.training.distillation import all_logits, total_loss
from search.training.loop import Fitted, Report, TrainingBatches, fast_arithmetic, fit, load_weights, save
from spaces.dynamic.exit_network import ExitNetwork


class FinetuneRecovery:
    """Fine-tunes every candidate for itself, and keeps the weights by their channels."""

    trains_per_candidate: ClassVar[bool] = True
    shares_weights: ClassVar[bool] = False

    ranges: Ranges = NO_RANGES

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
        """Trains the network, unless these channels and patterns were trained before."""
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
    """Fine-tunes a network in place, or loads what an earlier call with the same arguments came to.

    Args:
        ground: what it is trained on.
        network: pruned.
        channels: which it has.
        settings: for how long and how.
        images: its batch statistics may be measured on them at the end.
        start: what was done to its weights before, as part of the content key.
        patterns: of zeros, by layer; they stay zero.
        source: what it is a slice of, where gradual pruning starts; the dense network where not given.

    Raises:
        DivergedError: the loss is not finite for the second time.
    """
    shape = repr(sorted(channels.items())) + (repr(sorted(patterns.items())) if patterns else "")
    file = context.file("finetune", start, shape, settings.model_dump_json())
    if load_weights(network, file):
        return Fitted()
    narrowing = None
    if settings.pruning == "gradual":
        narrowing = GradualPruning(source or context.network, patterns, channels, context.sparsity)
    elif patterns:
        narrowing = GradualPruning(network, patterns)
    batches = TrainingBatches(context.train, settings.batch, settings.seed, context.augment)
    done = finetune(
        network,
        context.network,
        batches,
        settings,
        file.with_suffix(".partial.pt"),
        lambda part, total: context.say("Fine-tuning a version", part, total),
        narrowing,
    )
    refresh_statistics(network, images, check_images(context.train, len(images)))
    save(network.state_dict(), file)
    return done


def finetune(
    network: ExitNetwork,
    teacher: ExitNetwork,
    batches: TrainingBatches,
    settings: FinetuneSection,
    checkpoint: Path | None = None,
    report: Report = lambda _done, _total: None,
    narrowing: GradualPruning | None = None,
) -> Fitted:
    """Trains a pruned network with its exits in place, on labels and on the dense network's answers.

    Args:
        network: pruned; batch norm learns its statistics along.
        teacher: the dense network, in evaluation mode.
        batches: the training set.
        settings: for how long, and how much the teacher counts.
        checkpoint: where each epoch is kept.
        report: told how far it is.
        narrowing: what learns instead, and ends up in `network`, whose batch statistics are to be measured then.

    Raises:
        DivergedError: the loss is not finite for the second time.
    """
    taught = settings.distillation > 0

    def step(images: Tensor, labels: Tensor, done: float, generator: torch.Generator) -> float:  # noqa: ARG001
        with fast_arithmetic():
            with torch.no_grad():
                answers = teacher.trunk(images).float() if taught else torch.empty(0)
            found = narrowing.logits(images, done) if narrowing else all_logits(network, images)
        loss = total_loss(found, answers, labels, settings.distillation, settings.temperature)
        loss.backward()
        return float(loss.detach())

    fitted = fit(narrowing.network if narrowing else network, step, batches, settings, checkpoint, report)
    if narrowing:
        narrowing.finish(network)
    return fitted
