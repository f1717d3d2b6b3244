"""Training the heads of exits: on a frozen trunk, then perhaps with it, and last how sure they sound."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from evaluators.data import LabelledImages, Splits
from search.progress import Progress
from search.recovery.distillation import distillation_loss
from search.recovery.fitting import Augment, TrainingBatches, fast_arithmetic, fit
from search.study import ExitsSection
from spaces.network import ExitNetwork

_TEMPERATURES = (0.1, 10.0)
"""Between these a head's temperature is looked for."""


def train_exits(
    network: ExitNetwork,
    data: Splits,
    exits: ExitsSection,
    augment: Augment | None,
    seed: int,
    checkpoint: Path | None,
    progress: Progress,
) -> None:
    """Trains the heads as the study says, in place, and calibrates them; in joint training the trunk learns, too.

    Raises:
        DivergedError: the loss of joint training is not finite for the second time.
    """
    train_heads(network, data.train, exits, augment, seed, progress)
    if exits.training == "joint":
        train_jointly(network, data.train, exits, augment, checkpoint, progress)
    calibrate_heads(network, data.calibration)


def train_heads(
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
                found = zip(network.exits.values(), features, network.run_trunk(images)[0], strict=True)
                for head, collected, feature in found:
                    # A head begins by pooling, so what it sees of a feature map is small.
                    collected.append(head.get_submodule("pool")(feature))
                labels.append(classes)
    targets = torch.cat(labels)
    for head, collected in zip(network.exits.values(), features, strict=True):
        _fit_head(head, torch.cat(collected), targets, exits, seed)
    progress("Training the exits, once", views + 1, views + 1)


def _fit_head(head: nn.Module, features: Tensor, labels: Tensor, exits: ExitsSection, seed: int) -> None:
    optimizer = torch.optim.AdamW(head.parameters(), exits.learning_rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    steps = exits.epochs * len(labels) // 250
    head.train()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps):
        chosen = torch.randint(len(labels), (250,), generator=generator)
        loss = F.cross_entropy(head(features[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    head.eval()


def train_jointly(
    network: ExitNetwork,
    data: LabelledImages,
    exits: ExitsSection,
    augment: Augment | None,
    checkpoint: Path | None,
    progress: Progress,
) -> None:
    """Trains trunk and heads together, in place, on the weighted sum of their losses.

    The network's end learns from the labels, each exit from labels and end. An interrupted training goes on from its
    last whole epoch.
    Source: Teerapittayanon et al., BranchyNet, 2016; Huang et al., Multi-Scale Dense Networks, 2018; Phuong & Lampert,
    Distillation-Based Training for Multi-Exit Architectures, 2019.

    Raises:
        DivergedError: the loss is not finite for the second time.
    """
    settings = exits.joint
    weights = exits.weights or (1.0,) * (len(network.cut_points) + 1)

    def step(images: Tensor, labels: Tensor, done: float, generator: torch.Generator) -> float:  # noqa: ARG001
        with fast_arithmetic():
            *early, last = (logits.float() for logits in _answers(network, images))
        losses = [distillation_loss(each, last, labels, settings.distillation, settings.temperature) for each in early]
        losses.append(F.cross_entropy(last, labels))
        loss = torch.stack([weight * each for weight, each in zip(weights, losses, strict=True)]).sum()
        loss.backward()
        return float(loss.detach())

    batches = TrainingBatches(data, settings.batch, settings.seed, augment)
    fit(
        network,
        step,
        batches,
        settings,
        checkpoint,
        lambda done, total: progress("Training network and exits together, once", done, total),
    )


def _answers(network: ExitNetwork, images: Tensor) -> list[Tensor]:
    """Returns the logits of each exit and, last, of the trunk, where every image skips what it may."""
    features, last = network.run_trunk(images)
    return [*(head(feature) for head, feature in zip(network.exits.values(), features, strict=True)), last]


def calibrate_heads(network: ExitNetwork, data: LabelledImages) -> dict[str, float]:
    """Returns the temperature of each head, after dividing its logits by it, in place.

    It is the one with which the softmax gives the labels of the calibration images the highest likelihood, so that a
    confidence is about the share of right answers. Weights and bias of the last layer are divided, so nothing changes
    when the network runs. A head that does not end in a linear layer keeps the temperature 1.
    Source: Guo et al., On Calibration of Modern Neural Networks, 2017.
    """
    with torch.no_grad():
        *found, _ = _answers(network, torch.from_numpy(data.images[:]))
    labels = torch.from_numpy(data.labels)
    temperatures = {}
    for (name, head), logits in zip(network.exits.items(), found, strict=True):
        last = list(head.modules())[-1]
        temperatures[name] = temperature(logits, labels) if isinstance(last, nn.Linear) else 1.0
        with torch.no_grad():
            for parameter in last.parameters():
                parameter.div_(temperatures[name])
    return temperatures


def temperature(logits: Tensor, labels: Tensor) -> float:
    """Returns what logits `(n, classes)` are best divided by: the likelihood of the labels `(n,)` is highest then.

    One more image is taken to be of any class, or images that are all answered right would make a head certain.
    """
    exact, unsure = logits.double(), 1 / (len(labels) + 1)

    def loss(logarithm: float) -> float:
        return float(F.cross_entropy(exact / np.exp(logarithm), labels, label_smoothing=unsure))

    return float(np.exp(minimize_scalar(loss, bounds=np.log(_TEMPERATURES), method="bounded").x))
