"""Training the dense network and its exits, once, with the result kept by content key."""

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
from search.loading.models import Built
from search.loading.user_code import call, load, source_of
from search.training.block_gates import skip_blocks, train_gates_once, with_gates
from search.training.exit_heads import train_exits
from search.training.loop import Augment, Fitted, TrainingBatches, fast_arithmetic, fit, load_weights, save
from search.training.masks import train_masks_once, with_masks
from spaces import cache
from spaces.dynamic.cut_points import CutPoints, check_cut_points, find_cut_points
from spaces.dynamic.exit_network import HEADS, NO_GATES, ExitNetwork, feature_channels
from spaces.errors import StructureError

UNCUT = "the exported network cannot be cut there"
"""Why an automatic exit is left out that autograd would have allowed."""


def trained_network(
    study: Study, built: Built, data: Splits, progress: Progress, places: CutPoints | None = None
) -> ExitNetwork:
    """Returns the study's dense network with its exits, in evaluation mode: trained now, loaded, or as it came.

    What is loaded was trained from the same model source, weights, data, settings and torch version.
    An interrupted training goes on from its last whole epoch. Automatic exits behind which the exported graph cannot be
    cut are left out.

    Args:
        study: the question.
        built: the network before.
        data: of which the training and calibration images are used.
        progress: told about the steps that take long.
        places: where its exits sit; they are looked for where not given.
    """
    trunk, training = trained_trunk(study, built, data, progress), built.training(study.training)
    augment: Augment | None = augmentation(study.data.augment) if study.data.augment else None
    folder, key = cache_folder(), _trunk_key(study, built, data)
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
    exits, seed = _weighted(study.exits, places), training.seed if training else 0
    torch.manual_seed(seed)  # heads begin alike, whether the trunk was trained in this process or is loaded
    network = with_exits(trunk, places.after, exits, data, gates)
    settings = study.exits.model_dump_json(exclude={"thresholds", "confidence"})
    exits_key = cache.key(key, settings, data.calibration.digest, *network.cut_points)
    exits_file = folder / f"{study.name}-exits-{exits_key}.pt"
    part: nn.Module = network if study.exits.training == "joint" else network.exits
    if network.cut_points and not load_weights(part, exits_file):
        able = places if exits.after is not None else _exported(network, places, image)
        if able.after != places.after:
            return trained_network(study, built, data, progress, able)
        train_exits(network, data, exits, augment, seed, exits_file.with_suffix(".partial.pt"), progress)
        save(part.state_dict(), exits_file)
    return network.eval()


def trained_trunk(study: Study, built: Built, data: Splits, progress: Progress) -> nn.Module:
    """Returns the study's dense network alone, in evaluation mode: trained now, loaded, or as it came.

    Exits and skipped blocks that cannot be are refused before anything is trained.
    """
    trunk, training = built.network.eval(), built.training(study.training)
    exit_places(trunk, study.exits, data)
    skip_blocks(trunk, study.skips, torch.zeros(1, *data.image_shape))
    file = cache_folder() / f"{study.name}-{_trunk_key(study, built, data)}.pt"
    if training and not load_weights(trunk, file):
        augment: Augment | None = augmentation(study.data.augment) if study.data.augment else None
        train(trunk, data.train, training, augment, file.with_suffix(".partial.pt"), progress)
        save(trunk.state_dict(), file)
    return trunk


def _trunk_key(study: Study, built: Built, data: Splits) -> str:
    training = built.training(study.training)
    return cache.key(
        built.key,
        source_of(load(study.data.augment)) if study.data.augment else "",
        training.model_dump_json() if training else "",
        data.train.digest,
        torch.__version__,
        platform.machine(),
    )


def _with_trained_masks(
    trunk: nn.Module, study: Study, data: Splits, augment: Augment | None, file: Path, progress: Progress
) -> nn.Module:
    if study.skips.blocks:
        raise StudyError("blocks have masks or may be skipped, got [masks] and [skips]; leave one of them out")
    if study.exits.training == "joint":
        raise StudyError(
            "exits behind masks are trained on the frozen trunk, got [exits] training = 'joint'; leave it out"
        )
    masked = with_masks(trunk, study.masks, torch.from_numpy(data.calibration.images[:1]))
    train_masks_once(masked, trunk, data, study.masks, augment, file, progress)
    return masked


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


def _exported(network: ExitNetwork, places: CutPoints, image: Tensor) -> CutPoints:
    """Returns the places behind which the exported graph can be cut, each by itself where not all can be.

    Raises:
        ExportError: the network cannot be exported, whatever exits it has.
    """

    def refusal(after: Sequence[str]) -> str:
        heads = [
            network.exits[name] for name, path in zip(network.exit_names, places.after, strict=True) if path in after
        ]
        try:
            Template(ExitNetwork(network.trunk, after, heads, network.gates).eval(), image)
        except (StructureError, ExportError) as error:
            return str(error)
        return ""

    if not refusal(places.after):
        return places
    Template(ExitNetwork(network.trunk, (), (), network.gates).eval(), image)
    able = [path for path in places.after if not refusal([path])]
    return places.only([] if refusal(able) else able, UNCUT)


def _weighted(exits: ExitsSection, places: CutPoints) -> ExitsSection:
    """Returns the settings with the weights of the automatic exits that are there, each near a share that was asked."""
    if exits.after is not None or len(exits.weights) != len(exits.shares) + 1:
        return exits
    wanted = sorted(exits.shares)
    nearest = [min(range(len(wanted)), key=lambda place: abs(wanted[place] - share)) for share in places.shares]
    return exits.model_copy(update={"weights": (*(exits.weights[place] for place in nearest), exits.weights[-1])})


def with_exits(
    trunk: nn.Module,
    after: Sequence[str],
    exits: ExitsSection,
    data: Splits,
    gates: Mapping[str, nn.Module] = NO_GATES,
) -> ExitNetwork:
    """Returns the trunk with an untrained head behind each of some of its modules, and gates where it has them.

    Raises:
        StudyError: the number of weights in `exits` is another than that of the losses.
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
