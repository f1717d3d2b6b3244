"""Trains the dense network with its gates, masks and exits once, and caches the result by content key."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluators.data import LabelledImages, Splits
from evaluators.graph.exporter import ExportError
from evaluators.graph.template import Template
from search.config.cache import cache_folder
from search.config.progress import Progress
from search.config.study import ExitsSection, Study, StudyError, TrainingSection
from search.loading.models import BuiltModel
from search.loading.user_code import call, load, source_of
from search.training.block_gates import skip_blocks, train_gates_once, with_gates
from search.training.exit_heads import train_exits
from search.training.loop import (
    VERSION,
    Augment,
    Batch,
    Fitted,
    TrainingBatches,
    fast_arithmetic,
    fit,
    load_weights,
    save,
)
from search.training.masks import train_masks_once, with_masks
from spaces import cache
from spaces.dynamic.cut_points import CutPoints, check_cut_points, find_cut_points
from spaces.dynamic.exit_network import HEADS, NO_GATES, ExitNetwork, feature_channels
from spaces.errors import StructureError

UNCUT = "the exported network cannot be cut there"
"""Why an automatic exit is left out although the network in torch allows it."""


def trained_network(
    study: Study, built: BuiltModel, data: Splits, progress: Progress, places: CutPoints | None = None
) -> ExitNetwork:
    """Returns the study's dense network with its exits, in evaluation mode: trained now, cached, or as loaded.

    Cached weights are of the same model source, weights, data, settings and torch version. An interrupted training
    resumes from its last complete epoch. Automatic exits at which the exported graph cannot be cut are left out.

    Args:
        study: what to search.
        built: the network as loaded.
        data: its training and calibration images are used.
        progress: called with the progress of long steps.
        places: of the exits; they are searched if None.
    """
    trunk = trained_trunk(study, built, data, progress)
    training = built.training(study.training)
    augment: Augment | None = augmentation(study.data.augment) if study.data.augment else None
    folder = cache_folder()
    key = _trunk_key(study, built, data)
    image = torch.zeros(1, *data.image_shape)
    places = places or exit_places(trunk, study.exits, data)
    blocks = skip_blocks(trunk, study.skips, image)
    if study.masks.method:
        key = cache.key(key, study.masks.model_dump_json())
        file = folder / f"{study.name}-masks-{key}.pt"
        trunk = _with_trained_masks(trunk, study, data, augment, file, progress)
    gates: Mapping[str, nn.Module] = {}
    if blocks.gated:
        key = cache.key(key, study.skips.model_dump_json(), *blocks.gated)
        gated = with_gates(trunk, blocks, study.skips, image)
        train_gates_once(gated, data, study.skips, augment, folder / f"{study.name}-skips-{key}.pt", progress)
        gates = gated.gates
    exits = _with_weights_of(study.exits, places)
    seed = training.seed if training else 0
    torch.manual_seed(seed)  # the same initial heads, whether the trunk was trained in this process or cached
    network = with_exits(trunk, places.after, exits, data, gates)
    settings = study.exits.model_dump_json(exclude={"thresholds", "confidence"})
    exits_key = cache.key(key, settings, data.calibration.digest, *network.cut_points)
    exits_file = folder / f"{study.name}-exits-{exits_key}.pt"
    trained: nn.Module = network if study.exits.training == "joint" else network.exits
    if network.cut_points and not load_weights(trained, exits_file):
        exportable = _exportable(network, places, image, exits.after is not None)
        if exportable.after != places.after:
            return trained_network(study, built, data, progress, exportable)
        train_exits(network, data, exits, augment, seed, exits_file.with_suffix(".partial.pt"), progress)
        save(trained.state_dict(), exits_file)
    return network.eval()


def trained_trunk(study: Study, built: BuiltModel, data: Splits, progress: Progress) -> nn.Module:
    """Returns the study's dense network without exits, in evaluation mode: trained now, cached, or as loaded.

    Impossible exits and blocks are refused before anything is trained.
    """
    trunk = built.network.eval()
    training = built.training(study.training)
    with torch.random.fork_rng(devices=()):  # chance in the training, such as dropout, stays as it was
        _check_parts(trunk, study, data)
    file = cache_folder() / f"{study.name}-{_trunk_key(study, built, data)}.pt"
    if training and not load_weights(trunk, file):
        augment: Augment | None = augmentation(study.data.augment) if study.data.augment else None
        train(trunk, data.train, training, augment, file.with_suffix(".partial.pt"), progress)
        save(trunk.state_dict(), file)
    return trunk


def _check_parts(trunk: nn.Module, study: Study, data: Splits) -> None:
    """Checks that the exits, gates and masks that a study asks for can be added to its network.

    Raises:
        StudyError: two of them exclude each other, or the exits have another number of weights.
        StructureError: one of them is asked for where there is no place for it.
    """
    if study.masks.method and study.skips.blocks:
        raise StudyError("blocks have masks or may be skipped, got [masks] and [skips]; leave one of them out")
    if study.masks.method and study.exits.training == "joint":
        raise StudyError(
            "exits behind masks are trained on the frozen trunk, got [exits] training = 'joint'; leave it out"
        )
    image = torch.zeros(1, *data.image_shape)
    places = exit_places(trunk, study.exits, data)
    with_exits(trunk, places.after, _with_weights_of(study.exits, places), data)
    skip_blocks(trunk, study.skips, image)
    if study.masks.method:
        with_masks(trunk, study.masks, image)


def _trunk_key(study: Study, built: BuiltModel, data: Splits) -> str:
    training = built.training(study.training)
    return cache.key(
        built.key,
        source_of(load(study.data.augment)) if study.data.augment else "",
        training.model_dump_json() if training else "",
        data.train.digest,
        torch.__version__,
        platform.machine(),
        VERSION,
    )


def _with_trained_masks(
    trunk: nn.Module, study: Study, data: Splits, augment: Augment | None, file: Path, progress: Progress
) -> nn.Module:
    masked = with_masks(trunk, study.masks, torch.from_numpy(data.calibration.images[:1]))
    train_masks_once(masked, trunk, data, study.masks, augment, file, progress)
    return masked


def augmentation(reference: str) -> Augment:
    """Returns the study's function that augments training images.

    Raises:
        UserCodeError: when it is called, if it fails.
    """
    function = load(reference)
    return lambda images, generator: call(lambda: function(images, generator), "augment returns images")


def exit_places(trunk: nn.Module, exits: ExitsSection, data: Splits) -> CutPoints:
    """Returns the places of the study's exits: those that it names, or else cut points that are found for them.

    Raises:
        StructureError: a place is no module, gives no feature map, or is bypassed by another path.
    """
    image = torch.zeros(1, *data.image_shape)
    if exits.after is None:
        return find_cut_points(trunk, image, exits.shares)
    feature_channels(trunk, exits.after, image)
    return check_cut_points(trunk, image, exits.after)


def _exportable(network: ExitNetwork, places: CutPoints, image: Tensor, are_named: bool) -> CutPoints:
    """Returns the places at which the exported graph can be cut; if not at all, those that work one by one.

    Raises:
        ExportError: the network cannot be exported, even without exits.
        StructureError: the study names the places, and the graph cannot be cut at one of them.
    """
    if are_named:
        Template(network, image)
        return places

    def error_of(after: Sequence[str]) -> str:
        heads = [
            network.exits[name] for name, path in zip(network.exit_names, places.after, strict=True) if path in after
        ]
        try:
            Template(ExitNetwork(network.trunk, after, heads, network.gates).eval(), image)
        except (StructureError, ExportError) as error:
            return str(error)
        return ""

    if not error_of(places.after):
        return places
    Template(ExitNetwork(network.trunk, (), (), network.gates).eval(), image)
    possible = [path for path in places.after if not error_of([path])]
    return places.only([] if error_of(possible) else possible, UNCUT)


def _with_weights_of(exits: ExitsSection, places: CutPoints) -> ExitsSection:
    """Returns the settings with weights for the automatic exits, each that of the nearest share in the settings."""
    if exits.after is not None or len(exits.weights) != len(exits.shares) + 1:
        return exits
    shares = sorted(exits.shares)
    nearest = [min(range(len(shares)), key=lambda index: abs(shares[index] - share)) for share in places.shares]
    return exits.model_copy(update={"weights": (*(exits.weights[index] for index in nearest), exits.weights[-1])})


def with_exits(
    trunk: nn.Module,
    after: Sequence[str],
    exits: ExitsSection,
    data: Splits,
    gates: Mapping[str, nn.Module] = NO_GATES,
) -> ExitNetwork:
    """Returns the trunk with gates, and with an untrained head after each of the modules `after`.

    Raises:
        StudyError: the number of weights in `exits` is not that of the losses.
    """
    channels = feature_channels(trunk, after, torch.zeros(1, *data.image_shape))
    if exits.weights and len(exits.weights) != len(channels) + 1:
        raise StudyError(
            f"[exits] weights has one for each exit and one for the end, got {len(exits.weights)} for {len(channels)}"
            " exits; leave it out for 1 each"
        )
    head = HEADS[exits.head]
    return ExitNetwork(trunk, after, [head(count, data.classes, exits.grid) for count in channels], gates).eval()


def train(
    network: nn.Module,
    data: LabelledImages,
    settings: TrainingSection,
    augment: Augment | None,
    checkpoint: Path,
    progress: Progress,
) -> Fitted:
    """Trains a classifier in place on the cross-entropy; an interrupted training resumes from its last complete epoch.

    Raises:
        DivergedError: the loss is not finite for the second time.
    """

    def step(batch: Batch) -> float:
        with fast_arithmetic():
            logits = network(batch.images).float()
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=settings.label_smoothing)
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
