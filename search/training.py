"""Training the dense network and the heads of its exits, once, with the result kept by content key."""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluators.data import LabelledImages, Splits
from search.cache import cache_folder
from search.objects import call, load, source_of
from search.progress import Progress
from search.recovery.fitting import Augment, Fitted, TrainingBatches, fast_arithmetic, fit, load_weights, save
from search.skipping import skip_blocks, train_gates_once, with_gates
from search.sources.models import Built
from search.study import ExitsSection, Study, TrainingSection
from spaces.cutpoints import CutPoints, check_cut_points, find_cut_points
from spaces.network import NO_GATES, ExitHead, ExitNetwork, feature_channels


def trained_network(study: Study, built: Built, data: Splits, progress: Progress) -> ExitNetwork:
    """Returns the study's dense network with its exits, in evaluation mode: trained now, loaded, or as it came.

    What is loaded was trained from the same model source, weights, data, settings and torch version.
    An interrupted training goes on from its last whole epoch.
    """
    trunk, training = built.network, built.training(study.training)
    augment: Augment | None = augmentation(study.data.augment) if study.data.augment else None
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
    trunk.eval()
    image = torch.zeros(1, *data.image_shape)
    places = exit_places(trunk, study.exits, data)  # one that cannot be is refused before anything is trained
    blocks = skip_blocks(trunk, study.skips, image)
    if training and not load_weights(trunk, trunk_file):
        train(trunk, data.train, training, augment, trunk_file.with_suffix(".partial.pt"), progress)
        save(trunk.state_dict(), trunk_file)
    gates: Mapping[str, nn.Module] = {}
    if blocks.gated:
        gated = with_gates(trunk, blocks, study.skips, image)
        key = _digest(key, study.skips.model_dump_json(), *blocks.gated)
        skips_file = folder / f"{study.name}-skips-{key}.pt"
        train_gates_once(
            gated,
            data.train,
            study.skips,
            augment,
            skips_file,
            lambda done, total: progress("Training the network with its gates, once", done, total),
        )
        gates = gated.gates
    network = with_exits(trunk, places.after, study.exits.grid, data, gates)
    exits_key = _digest(key, study.exits.model_dump_json(), *network.cut_points)
    exits_file = folder / f"{study.name}-exits-{exits_key}.pt"
    if network.cut_points and not load_weights(network.exits, exits_file):
        train_exits(network, data.train, study.exits, augment, training.seed if training else 0, progress)
        save(network.exits.state_dict(), exits_file)
    return network.eval()


def augmentation(reference: str) -> Augment:
    """Returns the function that a study names for varying its training images.

    Raises:
        UserCodeError: when it is called, if it fails.
    """
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


def with_exits(
    trunk: nn.Module, after: Sequence[str], grid: int, data: Splits, gates: Mapping[str, nn.Module] = NO_GATES
) -> ExitNetwork:
    """Returns the trunk with an untrained head behind each of some of its modules, and gates where it has them."""
    channels = feature_channels(trunk, after, torch.zeros(1, *data.image_shape))
    return ExitNetwork(trunk, after, [ExitHead(count, data.classes, grid) for count in channels], gates).eval()


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
            batches = TrainingBatches(data, 125, seed, augment if view else None, some)
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


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
