"""Training the dense network and the heads of its exits, once, with the result kept by content key."""

import hashlib
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from evaluators.data import LabelledImages, Splits
from search.cache import cache_folder
from search.objects import call, load, source_of
from search.progress import Progress
from search.sources.models import Built
from search.study import ExitsSection, Study, TrainingSection
from spaces.cutpoints import CutPoints, check_cut_points, find_cut_points
from spaces.network import ExitHead, ExitNetwork, feature_channels

Augment = Callable[[Tensor, torch.Generator], Tensor]


def trained_network(study: Study, built: Built, data: Splits, progress: Progress) -> ExitNetwork:
    """Returns the study's dense network with its exits, in evaluation mode: trained now, loaded, or as it came.

    What is loaded was trained from the same model source, weights, data, settings and torch version.
    An interrupted training goes on from its last whole epoch.
    """
    trunk, training = built.network, built.training(study.training)
    augment: Augment | None = _augment(study.data.augment) if study.data.augment else None
    folder = cache_folder()
    key = _digest(
        built.key,
        source_of(load(study.data.augment)) if study.data.augment else "",
        training.model_dump_json() if training else "",
        data.train.digest,
        torch.__version__,
        platform.machine(),
    )
    trunk_file = folder / f"{study.name}-{key}.pt"
    if training and not _load(trunk, trunk_file):
        train(trunk, data.train, training, augment, trunk_file.with_suffix(".partial.pt"), progress)
        _save(trunk.state_dict(), trunk_file)
    trunk.eval()
    network = with_exits(trunk, study.exits, data)
    exits_key = _digest(key, study.exits.model_dump_json(), *network.cut_points)
    exits_file = folder / f"{study.name}-exits-{exits_key}.pt"
    if network.cut_points and not _load(network.exits, exits_file):
        train_exits(network, data.train, study.exits, augment, training.seed if training else 0, progress)
        _save(network.exits.state_dict(), exits_file)
    return network.eval()


def _augment(reference: str) -> Augment:
    function = load(reference)
    return lambda images, generator: call(lambda: function(images, generator), "augment returns images")


def exit_places(trunk: nn.Module, exits: ExitsSection, data: Splits) -> CutPoints:
    """Returns where the study's exits sit: where it says, or else where cut points are found for them.

    Raises:
        StructureError: an exit sits after no module, after one that gives no feature map, or where it is bypassed.
    """
    image = torch.zeros(1, *data.image_shape)
    if exits.after is None:
        return find_cut_points(trunk, image, exits.shares)
    feature_channels(trunk, exits.after, image)
    return check_cut_points(trunk, image, exits.after)


def with_exits(trunk: nn.Module, exits: ExitsSection, data: Splits) -> ExitNetwork:
    """Returns the trunk with an untrained head at each of the study's exits.

    Raises:
        StructureError: an exit sits where it cannot.
    """
    after = exit_places(trunk, exits, data).after
    channels = feature_channels(trunk, after, torch.zeros(1, *data.image_shape))
    return ExitNetwork(trunk, after, [ExitHead(count, data.classes, exits.grid) for count in channels]).eval()


def train(
    network: nn.Module,
    data: LabelledImages,
    settings: TrainingSection,
    augment: Augment | None,
    checkpoint: Path,
    progress: Progress,
) -> None:
    """Trains a classifier in place: SGD with Nesterov momentum, one-cycle learning rate, cross-entropy.

    After every epoch all that is needed to go on is kept in `checkpoint`, which is removed at the end.
    """
    steps = max(len(data) // settings.batch, 1)
    optimizer = torch.optim.SGD(
        network.parameters(), settings.learning_rate, 0.9, weight_decay=settings.weight_decay, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.epochs * steps
    )
    parts: dict[str, Any] = {"network": network, "optimizer": optimizer, "schedule": schedule}
    start = _resume(parts, checkpoint)
    network.train()
    for epoch in range(start, settings.epochs):
        progress("Training the dense network, once", epoch, settings.epochs)
        for images, labels in _batches(data, settings.batch, settings.seed + epoch, augment):
            loss = F.cross_entropy(network(images), labels, label_smoothing=settings.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        _save({"epoch": epoch + 1, **{name: part.state_dict() for name, part in parts.items()}}, checkpoint)
    progress("Training the dense network, once", settings.epochs, settings.epochs)
    checkpoint.unlink(missing_ok=True)
    network.eval()


def train_exits(
    network: ExitNetwork,
    data: LabelledImages,
    exits: ExitsSection,
    augment: Augment | None,
    seed: int,
    progress: Progress,
) -> None:
    """Trains the heads on the frozen trunk, whose features are computed once per augmentation.

    At most `exits.images` random images take part: the features of all are in memory together.
    Source: Kaya et al., Shallow-Deep Networks, 2019, IC-only training.
    """
    views = 4 if augment else 1
    some = np.random.default_rng(seed).permutation(len(data))[: exits.images]
    torch.manual_seed(seed)
    features: list[list[Tensor]] = [[] for _ in network.exit_names]
    labels: list[Tensor] = []
    with torch.no_grad():
        for view in range(views):
            progress("Training the exits, once", view, views + 1)
            for images, classes in _batches(data, 125, seed + view, augment if view else None, some):
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


def _batches(
    data: LabelledImages, size: int, seed: int, augment: Augment | None, some: NDArray[np.int64] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Returns whole batches in random order: of all images, or of `some`; few images are one batch."""
    those = np.arange(len(data)) if some is None else some
    order = np.random.default_rng(seed).permutation(those)
    size = min(size, len(order))
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(order) - size + 1, size):
        chosen = order[start : start + size]
        images = torch.from_numpy(data.images[chosen])
        yield augment(images, generator) if augment else images, torch.from_numpy(data.labels[chosen])


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _load(module: nn.Module, file: Path) -> bool:
    """Returns whether `file` was there and fitted."""
    try:
        module.load_state_dict(torch.load(file, weights_only=True))
    except FileNotFoundError:
        return False
    except Exception:  # a torn or foreign file is as good as none: it is made again
        return False
    return True


def _resume(parts: dict[str, Any], checkpoint: Path) -> int:
    """Returns the epoch to go on with, after loading what a checkpoint holds."""
    try:
        state = torch.load(checkpoint, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except Exception:  # none, or torn by the crash that it is there for
        return 0
    return int(state["epoch"])


def _save(content: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    torch.save(content, partial)
    partial.replace(file)
