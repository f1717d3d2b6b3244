"""Trains the heads of exits: on the frozen trunk, then jointly with it if asked for; then calibrates confidences."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from evaluators.data import LabelledImages, Splits
from search.config.progress import Progress
from search.config.study import ExitsSection
from search.training.distillation import distillation_loss
from search.training.loop import Augment, Batch, TrainingBatches, fast_arithmetic, fit, save
from spaces.dynamic.exit_network import ExitNetwork

_TEMPERATURES = (0.1, 10.0)
"""Bounds of the search for a head's temperature."""
_STEP = "Training the exits, once"
_PARTS = 5
"""Number of checkpoints of a head's training."""


def train_exits(
    network: ExitNetwork,
    data: Splits,
    exits: ExitsSection,
    augment: Augment | None,
    seed: int,
    checkpoint: Path | None,
    progress: Progress,
) -> None:
    """Trains the heads as the study says, in place, and calibrates them; in joint training the trunk is trained, too.

    Raises:
        DivergedError: the loss of joint training is not finite for the second time.
    """
    train_heads(network, data.train, exits, augment, seed, progress, checkpoint)
    if exits.training == "joint":
        train_jointly(network, data.train, exits, augment, checkpoint, progress)
    calibrate_heads(network, data.calibration)
    for name in network.exit_names:
        _remove(_beside(checkpoint, name))


def train_heads(
    network: ExitNetwork,
    data: LabelledImages,
    exits: ExitsSection,
    augment: Augment | None,
    seed: int,
    progress: Progress,
    checkpoint: Path | None = None,
) -> None:
    """Trains the heads on the frozen trunk, whose features are computed once per augmentation.

    At most `exits.images` random images are used, because all features are in memory together. Files beside
    `checkpoint` store the features of each augmentation until the heads are trained, and each head until the caller has
    the result, so that an interrupted training resumes.
    Source: Kaya et al., Shallow-Deep Networks, 2019, IC-only training.
    """
    files = {name: _beside(checkpoint, name) for name in network.exit_names}
    states = {name: _read(file) for name, file in files.items()}
    views = 4 if augment else 1
    if not all(state and state["is_done"] for state in states.values()):
        augmented = []
        for view in range(views):
            progress(_STEP, view, views + 1)
            file = _beside(checkpoint, f"view{view}")
            inputs = _read(file)
            if inputs is None:
                batches = TrainingBatches(data, 125, seed, augment if view else None, _sample(data, exits, seed))
                inputs = _head_inputs(network, batches, view)
                _write(inputs, file)
            augmented.append(inputs)
        labels = torch.cat([inputs["labels"] for inputs in augmented])
        features = {name: torch.cat([inputs[name] for inputs in augmented]) for name in network.exit_names}
    for name, head in network.exits.items():
        if (state := states[name]) and state["is_done"]:
            head.load_state_dict(state["head"])
        else:
            _fit_head(head, features.pop(name), labels, exits, seed, files[name], state)
    for view in range(views):
        _remove(_beside(checkpoint, f"view{view}"))
    progress(_STEP, views + 1, views + 1)


def _sample(data: LabelledImages, exits: ExitsSection, seed: int) -> NDArray[np.int64]:
    """Returns the indices of the images that are used, in random order."""
    return np.random.default_rng(seed).permutation(len(data))[: exits.images]


def _head_inputs(network: ExitNetwork, batches: TrainingBatches, view: int) -> dict[str, Tensor]:
    """Returns the pooled input features of each head on one augmentation, by its name, and the labels."""
    features: dict[str, list[Tensor]] = {name: [] for name in (*network.exit_names, "labels")}
    with torch.no_grad():
        for images, classes in batches.epoch(view):
            for (name, head), feature in zip(network.exits.items(), network.run_trunk(images)[0], strict=True):
                # A head starts with pooling, so its pooled inputs are small.
                features[name].append(head.get_submodule("pool")(feature))
            features["labels"].append(classes)
    return {name: torch.cat(parts) for name, parts in features.items()}


def _fit_head(
    head: nn.Module,
    features: Tensor,
    labels: Tensor,
    exits: ExitsSection,
    seed: int,
    file: Path | None,
    state: dict[str, Any] | None,
) -> None:
    optimizer = torch.optim.AdamW(head.parameters(), exits.learning_rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    steps = exits.epochs * len(labels) // 250
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    if state is not None:
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        generator.set_state(state["generator"])
    head.train()
    for step in range(state["steps"] if state else 0, steps):
        chosen = torch.randint(len(labels), (250,), generator=generator)
        loss = F.cross_entropy(head(features[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % max(steps // _PARTS, 1) == 0:
            optimization = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            _write(_state(head, generator, step + 1) | optimization, file)
    head.eval()
    _write(_state(head, generator, steps) | {"is_done": True}, file)


def _state(head: nn.Module, generator: torch.Generator, steps: int) -> dict[str, Any]:
    """Returns a checkpoint of a head, without the state of its optimizer."""
    return {"head": head.state_dict(), "generator": generator.get_state(), "steps": steps, "is_done": False}


def _beside(checkpoint: Path | None, name: str) -> Path | None:
    """Returns the checkpoint file of a part of a training, or None."""
    return checkpoint.with_suffix(f".{name}.pt") if checkpoint is not None else None


def _write(content: dict[str, Any], file: Path | None) -> None:
    if file is not None:
        save(content, file)


def _read(file: Path | None) -> dict[str, Any] | None:
    if file is None or not file.is_file():
        return None
    try:
        content: dict[str, Any] = torch.load(file, weights_only=True)
    except Exception:  # damaged by a crash
        return None
    return content


def _remove(file: Path | None) -> None:
    if file is not None:
        file.unlink(missing_ok=True)


def train_jointly(
    network: ExitNetwork,
    data: LabelledImages,
    exits: ExitsSection,
    augment: Augment | None,
    checkpoint: Path | None,
    progress: Progress,
) -> None:
    """Trains trunk and heads together, in place, on the weighted sum of their losses.

    The network's end is trained on the labels, each exit also by distillation from the end. An interrupted training
    resumes from its last complete epoch.
    Source: Teerapittayanon et al., BranchyNet, 2016; Huang et al., Multi-Scale Dense Networks, 2018; Phuong & Lampert,
    Distillation-Based Training for Multi-Exit Architectures, 2019.

    Raises:
        DivergedError: the loss is not finite for the second time.
    """
    settings = exits.joint
    weights = exits.weights or (1.0,) * (len(network.cut_points) + 1)

    def step(batch: Batch) -> float:
        with fast_arithmetic():
            *early, last = (logits.float() for logits in _logits(network, batch.images))
        losses = [
            distillation_loss(logits, last, batch.labels, settings.distillation, settings.temperature)
            for logits in early
        ]
        losses.append(F.cross_entropy(last, batch.labels))
        loss = torch.stack([weight * part for weight, part in zip(weights, losses, strict=True)]).sum()
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


def _logits(network: ExitNetwork, images: Tensor) -> list[Tensor]:
    """Returns the logits of each exit and, last, of the trunk, with blocks skipped as the gates decide."""
    features, last = network.run_trunk(images)
    return [*(head(feature) for head, feature in zip(network.exits.values(), features, strict=True)), last]


def calibrate_heads(network: ExitNetwork, data: LabelledImages) -> dict[str, float]:
    """Divides the logits of each head by a temperature, in place; returns the temperatures by exit.

    The temperature maximizes the likelihood of the labels of the calibration images, so that a confidence is about the
    share of correct answers. Weights and bias of the last layer are divided, so there is no extra cost at run time. A
    head that does not end in a linear layer keeps the temperature 1.
    Source: Guo et al., On Calibration of Modern Neural Networks, 2017.
    """
    with torch.no_grad():
        *exit_logits, _ = _logits(network, torch.from_numpy(data.images[:]))
    labels = torch.from_numpy(data.labels)
    temperatures = {}
    for (name, head), logits in zip(network.exits.items(), exit_logits, strict=True):
        last = list(head.modules())[-1]
        temperatures[name] = temperature(logits, labels) if isinstance(last, nn.Linear) else 1.0
        with torch.no_grad():
            for parameter in last.parameters():
                parameter.div_(temperatures[name])
    return temperatures


def temperature(logits: Tensor, labels: Tensor) -> float:
    """Returns the temperature of logits `(n, classes)` that maximizes the likelihood of the labels `(n,)`.

    Labels are smoothed as if one more image could be of any class; otherwise a head without errors would become
    certain.
    """
    exact = logits.double()
    smoothing = 1 / (len(labels) + 1)

    def loss(logarithm: float) -> float:
        return float(F.cross_entropy(exact / np.exp(logarithm), labels, label_smoothing=smoothing))

    return float(np.exp(minimize_scalar(loss, bounds=np.log(_TEMPERATURES), method="bounded").x))
