"""Elastic recovery: one training of shared weights, of which the weights of every candidate are a slice."""

import copy
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from search.config.study import ElasticSection
from search.recovery.base import RecoveryContext, effort_of
from search.recovery.batchnorm import BatchNormRecovery
from search.recovery.mixed_precision import MixedPrecision
from search.training.batchnorm import refresh_statistics
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
from spaces.channels import PREFIX, SparsitySpace
from spaces.depth import ALL_BLOCKS, DepthSpace, shortened
from spaces.dimensions import Integer
from spaces.dynamic.exit_network import ExitNetwork
from spaces.input_size import OWN_SIZE, InputSizeSpace, at_size

_VARIES = 1 / 3
"""Share of mild random candidates in which a dimension varies."""


class ElasticRecovery(BatchNormRecovery):
    """Trains shared weights once; a candidate then takes its slice and recomputes batch norm statistics."""

    trains_per_candidate: ClassVar[bool] = False
    shares_weights: ClassVar[bool] = True

    def __init__(self, context: RecoveryContext) -> None:
        super().__init__(context)
        settings = context.settings.elastic
        qat = context.settings.qat
        self.effort = f"elastic {effort_of(settings)}"
        self.source = copy.deepcopy(context.network)
        learner: nn.Module = self.source
        parts = [settings.model_dump_json()]
        mixed: MixedPrecision | None = None
        if qat is not None and context.int8 is not None:
            self.effort += f" with qat ({qat.quantizer})"
            learner = mixed = MixedPrecision(self.source, context.int8, qat.quantizer)
            parts += [context.int8.key, qat.quantizer]
        if context.depth.dimensions():
            parts.append(json.dumps(context.depth.description))
        if context.input_size.dimensions():
            parts.append(json.dumps(context.input_size.sizes))
        file = context.file("shared", *parts)
        if load_weights(learner, file):
            self.trained = fitted_of(file)
        else:
            self.trained = train_elastic(
                self.source,
                context.teacher,
                context.sparsity,
                context.batches(settings),
                settings,
                file.with_suffix(".partial.pt"),
                lambda part, total: context.say("Training shared weights, once", part, total),
                mixed,
                context.depth,
                context.input_size,
            )
            refresh_statistics(self.source, self._images, self._check)
            save_fitted(learner.state_dict(), self.trained, file)
        if mixed is not None:
            self.ranges = mixed.ranges()


@dataclass(frozen=True)
class Slice:
    """A candidate's network as a slice of the shared one.

    Args:
        network: with the candidate's widths; its own parameter values are not used.
        positions: for each of its parameters, the flat indices of its values in the shared parameter.
    """

    network: ExitNetwork
    positions: Mapping[str, Tensor]


class _WithDetachedExits(nn.Module):
    """Returns the logits of all exits and the trunk, for training."""

    def __init__(self, network: ExitNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        return all_logits(self.network, images)


class SharedWeights:
    """The dense network's weights, of which every candidate is a slice.

    Args:
        network: the dense network with its exits.
        sparsity: tells which channels a candidate keeps.
    """

    def __init__(self, network: ExitNetwork, sparsity: SparsitySpace) -> None:
        self.network = network
        self._sparsity = sparsity
        self._numbered = _numbered(network)
        self._slices: dict[object, Slice] = {}

    def slice(
        self,
        channels: Mapping[str, int],
        removed: Sequence[str] = (),
        size: int | None = None,
        keep: bool = False,
    ) -> Slice:
        """Returns the slice of the shared weights with these channels, without some blocks.

        Positions are read from a network whose values are their own flat indices, pruned like any other.

        Args:
            channels: kept per group.
            removed: paths of the blocks that are left out.
            size: of the input; None for the images' own.
            keep: whether to cache the slice.
        """
        key = tuple(sorted(channels.items())), tuple(removed), size
        if key in self._slices:
            return self._slices[key]
        numbers = shortened(self._sparsity.apply(self._numbered, channels), removed)
        positions = {name: value.detach().long().flatten() for name, value in numbers.named_parameters()}
        network = shortened(self._sparsity.apply(self.network, channels), removed).train()
        part = Slice(at_size(network, size), positions)
        if keep:
            self._slices[key] = part
        return part

    def weights(self, part: Slice) -> dict[str, Tensor]:
        """Returns the parameters of a slice, by name; gradients flow to the shared weights."""
        shapes = {name: value.shape for name, value in part.network.named_parameters()}
        return {
            name: parameter.flatten().index_select(0, part.positions[name]).view(shapes[name])
            for name, parameter in self.network.named_parameters()
            if name in part.positions
        }

    def logits(self, part: Slice, images: Tensor) -> list[Tensor]:
        """Returns the logits of each exit and of the trunk; gradients flow to the shared weights."""
        return logits_with(part.network, self.weights(part), images)


def logits_with(network: ExitNetwork, weights: Mapping[str, Tensor], images: Tensor) -> list[Tensor]:
    """Returns the logits of each exit and of the trunk of a network with its parameters replaced by `weights`."""
    named = {f"network.{name}": value for name, value in weights.items()}
    logits: list[Tensor] = functional_call(_WithDetachedExits(network), named, (images,))
    return logits


def _numbered(network: ExitNetwork) -> ExitNetwork:
    numbered = copy.deepcopy(network).double()  # exact up to 2**53 values
    with torch.no_grad():
        for parameter in numbered.parameters():
            parameter.copy_(torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape))
    return numbered


def train_elastic(
    network: ExitNetwork,
    teacher: Teacher,
    sparsity: SparsitySpace,
    batches: TrainingBatches,
    settings: ElasticSection,
    checkpoint: Path | None = None,
    report: Report = lambda _done, _total: None,
    mixed: MixedPrecision | None = None,
    depth: DepthSpace = ALL_BLOCKS,
    input_size: InputSizeSpace = OWN_SIZE,
) -> Fitted:
    """Trains shared weights in place so that their slices are accurate.

    Every step trains random candidates, every other one near the dense network, by distillation from that, which keeps
    its own weights: a step then costs half, and its answers do not get worse while the shared weights change. A
    candidate then only needs its slice and recomputed batch norm statistics.
    Source: Cai et al., Once-for-All, 2020 (a teacher of its own, channels sorted by importance); Yu & Huang,
    Universally Slimmable Networks, 2019 (several candidates in a step).

    Args:
        network: starts from trained weights.
        teacher: the dense network as it was.
        sparsity: the widths that candidates have.
        batches: the training set.
        settings: length of the training, and number of random candidates per step.
        checkpoint: file that each epoch is saved to.
        report: called with the progress.
        mixed: trains the whole network in int8 as well, and the random candidates in random precisions; all in fp32 if
            None.
        depth: the blocks that candidates may lack.
        input_size: the sizes of their input.

    Raises:
        DivergedError: the loss is not finite for the second time.
    """
    shared = SharedWeights(network, sparsity)
    whole = {group.name: group.channels for group in sparsity.groups}

    def learn(part: Slice, int8: Collection[str], batch: Batch, answers: Tensor) -> float:
        with fast_arithmetic():
            if mixed is None:
                logits = shared.logits(part, batch.images)
            else:
                logits = mixed.logits(part.network, shared.weights(part), int8, batch.images)
        loss = total_loss(logits, answers, batch.labels, settings.distillation, settings.temperature)
        loss.backward()
        return float(loss.detach())

    def step(batch: Batch) -> float:
        answers = teacher.logits(batch)
        parts = [
            shared.slice(*random_form(sparsity, depth, input_size, batch.generator, is_mild=number % 2 == 0))
            for number in range(settings.random_candidates)
        ]
        if mixed is None:
            return sum(learn(part, (), batch, answers) for part in parts)
        parts.insert(0, shared.slice(whole, keep=True))
        layers = mixed.choices(len(parts), batch.generator)
        return sum(learn(part, int8, batch, answers) for part, int8 in zip(parts, layers, strict=True))

    return fit(network if mixed is None else mixed, step, batches, settings, checkpoint, report)


def random_form(
    sparsity: SparsitySpace,
    depth: DepthSpace,
    input_size: InputSizeSpace,
    generator: torch.Generator,
    is_mild: bool,
) -> tuple[dict[str, int], tuple[str, ...], int | None]:
    """Returns the channels, the blocks left out and the input size of a random candidate.

    Args:
        sparsity: the widths that it may have.
        depth: the blocks that it may lack.
        input_size: the sizes that its input may have.
        generator: of random numbers.
        is_mild: whether each of the three stays as in the dense network in two thirds of all cases, so that nothing is
            left out in every third. Candidates that lack something of everything are most of the space, but few of
            those that a moderate limit asks for.
    """
    channels, removed = random_channels(sparsity, generator), random_depth(depth, generator)
    size = random_size(input_size, generator)
    if not is_mild:
        return channels, removed, size
    narrow, short, small = (torch.rand(3, generator=generator) < _VARIES).tolist()
    whole = {group.name: group.channels for group in sparsity.groups}
    return channels if narrow else whole, removed if short else (), size if small else None


def random_channels(sparsity: SparsitySpace, generator: torch.Generator) -> dict[str, int]:
    """Returns random channels per group, around a random share for the whole network.

    Independent draws per group would hardly ever make a network that is narrow, or wide, throughout.
    """
    middle = float(torch.rand((), generator=generator))
    channels = {group.name: group.channels for group in sparsity.groups}
    for name, dimension in sparsity.dimensions().items():
        if isinstance(dimension, Integer):
            channels[name.removeprefix(PREFIX)] = _around(middle, dimension, generator)
    return channels


def random_depth(depth: DepthSpace, generator: torch.Generator) -> tuple[str, ...]:
    """Returns the blocks that a random network lacks, with depths around a random share for the whole network."""
    if not depth.dimensions():  # nothing is drawn, so that trainings without this dimension stay as they were
        return ()
    middle = float(torch.rand((), generator=generator))
    kept = {name: _around(middle, stage, generator) for name, stage in depth.dimensions().items()}
    return depth.removed(depth.read(kept))


def random_size(sizes: InputSizeSpace, generator: torch.Generator) -> int | None:
    """Returns a random input size; None for the images' own."""
    if not sizes.dimensions():
        return None
    chosen = int(torch.randint(len(sizes.sizes), (), generator=generator))
    return None if chosen == len(sizes.sizes) - 1 else sizes.sizes[chosen]


def _around(middle: float, dimension: Integer, generator: torch.Generator) -> int:
    """Returns a random step of a dimension near a share of its range."""
    share = middle + 0.5 * (float(torch.rand((), generator=generator)) - 0.5)
    steps = (dimension.high - dimension.low) // dimension.step
    return dimension.low + dimension.step * round(min(max(share, 0), 1) * steps)
