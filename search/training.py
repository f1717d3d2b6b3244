"""Training the dense network and the heads of its exits, once, with the result kept by content key."""

import hashlib
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import platformdirs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluators.data import LabelledImages, Splits
from search.objects import resolve, source_of
from search.recovery.fitting import Augment, Fitted, TrainingBatches, fast_arithmetic, fit, load_weights, save
from search.study import ExitsSection, Study, StudyError, TrainingSection
from spaces.network import ExitHead, ExitNetwork, feature_channels


class Progress(Protocol):
    """Shows how far a long step is."""

    def __call__(self, step: str, done: int, total: int) -> None:
        """Reports that `done` of `total` parts of `step` are finished."""
        ...


def cache_folder() -> Path:
    """Returns the folder for trained networks: `$DEPLOYFRONT_CACHE`, or the user's cache directory."""
    return Path(os.environ.get("DEPLOYFRONT_CACHE") or platformdirs.user_cache_path("deployfront"))


def trained_network(study: Study, data: Splits, progress: Progress) -> ExitNetwork:
    """Returns the study's dense network with its exits, in evaluation mode, trained now or loaded.

    What is loaded was trained from the same model source, data, settings and torch version.
    An interrupted training goes on from its last whole epoch.
    """
    trunk: nn.Module = _seeded(study.training.seed, resolve(study.model.factory))
    augment: Augment | None = resolve(study.data.augment) if study.data.augment else None
    folder = cache_folder()
    key = _digest(
        source_of(resolve(study.model.factory)),
        source_of(augment) if augment else "",
        study.training.model_dump_json(),
        data.train.digest,
        torch.__version__,
        platform.machine(),
    )
    trunk_file = folder / f"{study.name}-{key}.pt"
    if not load_weights(trunk, trunk_file):
        train(trunk, data.train, study.training, augment, trunk_file.with_suffix(".partial.pt"), progress)
        save(trunk.state_dict(), trunk_file)
    trunk.eval()
    network = with_exits(trunk, study.exits, data)
    exits_file = folder / f"{study.name}-exits-{_digest(key, study.exits.model_dump_json())}.pt"
    if study.exits.after and not load_weights(network.exits, exits_file):
        train_exits(network, data.train, study.exits, augment, study.training.seed, progress)
        save(network.exits.state_dict(), exits_file)
    return network.eval()


def with_exits(trunk: nn.Module, exits: ExitsSection, data: Splits) -> ExitNetwork:
    """Returns the trunk with an untrained head at each of the study's exits.

    Raises:
        StructureError: an exit sits after no module, or after one that gives no feature map.
    """
    image = torch.zeros(1, *data.image_shape)
    channels = feature_channels(trunk, exits.after, image)
    return ExitNetwork(trunk, exits.after, [ExitHead(count, data.classes, exits.grid) for count in channels]).eval()


def train(
    network: nn.Module,
    data: LabelledImages,
    settings: TrainingSection,
    augment: Augment | None,
    checkpoint: Path,
    progress: Progress,
) -> Fitted:
    """Trains a classifier in place on the cross-entropy; an interrupted training goes on from its last whole epoch.

    Raises:
        DivergedError: the loss is not finite for the second time.
    """

    def step(images: Tensor, labels: Tensor, done: float, generator: torch.Generator) -> float:  # noqa: ARG001
        with fast_arithmetic():
            logits = network(images).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
        loss.backward()
        return float(loss.detach())

    batches = TrainingBatches(data, settings.batch, settings.seed, augment)
    return fit(
        network,
        step,
        batches,
        settings,
        checkpoint,
        lambda done, total: progress("Training the dense network, once", done, total),
    )


def train_exits(
    network: ExitNetwork,
    data: LabelledImages,
    exits: ExitsSection,
    augment: Augment | None,
    seed: int,
    progress: Progress,
) -> None:
    """Trains the heads on the frozen trunk, whose features are computed once per augmentation.

    Source: Kaya et al., Shallow-Deep Networks, 2019, IC-only training.
    """
    views = 4
    torch.manual_seed(seed)
    features: list[list[Tensor]] = [[] for _ in network.exit_names]
    labels: list[Tensor] = []
    with torch.no_grad():
        for view in range(views):
            progress("Training the exits, once", view, views + 1)
            batches = TrainingBatches(data, 125, seed, augment if view else None)
            for images, classes in batches.epoch(view):
                for collected, feature in zip(features, network.run_trunk(images)[0], strict=True):
                    # A head begins by pooling, so what it sees of a feature map is small.
                    collected.append(F.adaptive_avg_pool2d(feature, exits.grid))
                labels.append(classes)
    targets = torch.cat(labels)
    for head, collected in zip(network.exits.values(), features, strict=True):
        _fit_head(head, torch.cat(collected), targets, exits, seed)
    progress("Training the exits, once", views + 1, views + 1)


def _fit_head(head: nn.Module, features: Tensor, labels: Tensor, exits: ExitsSection, seed: int) -> None:
    optimizer = torch.optim.AdamW(head.parameters(), exits.learning_rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    steps = exits.epochs * len(labels) // 250
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps):
        chosen = torch.randint(len(labels), (250,), generator=generator)
        loss = F.cross_entropy(head(features[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _seeded(seed: int, factory: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(seed)
    try:
        made = factory()
    except Exception as error:
        raise StudyError(f"a model factory returns a network, got {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise StudyError(f"a model factory returns a torch.nn.Module, got {type(made).__name__}")
    return made


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
