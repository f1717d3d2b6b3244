"""Trains gates around residual blocks of a trained network."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from evaluators.data import Splits
from search.config.progress import Progress
from search.config.study import SkipsSection
from search.training.batchnorm import check_images, rebase_batch_norm, recovery_images, refresh_statistics
from search.training.distillation import distillation_loss
from search.training.frozen_gates import train_in_parts, train_with_frozen_gates, while_gates_learn
from search.training.loop import Augment, Batch, Fitted, Report, TrainingBatches, fast_arithmetic, fit, load_weights
from spaces.dynamic.block_gates import BLOCK_GATES
from spaces.dynamic.exit_network import Decide, ExitNetwork, decided
from spaces.dynamic.skippable_blocks import Blocks, check_blocks, find_blocks

_TEMPERATURE = 2.0
"""Temperature of the distillation."""
_IMAGES = 2_000
"""Training images for batch norm statistics, once gates are calibrated."""


def skip_blocks(trunk: nn.Module, skips: SkipsSection, image: Tensor) -> Blocks:
    """Returns the blocks that get gates.

    Args:
        trunk: in evaluation mode.
        skips: names all blocks, or their paths.
        image: one input, `(1, c, h, w)`.

    Raises:
        StructureError: a named block cannot be skipped.
    """
    if not skips.blocks:
        return Blocks(())
    return find_blocks(trunk, image) if skips.blocks == "all" else check_blocks(trunk, image, skips.blocks)


def with_gates(trunk: nn.Module, blocks: Blocks, skips: SkipsSection, image: Tensor) -> ExitNetwork:
    """Returns the trunk with an untrained gate around each of the blocks, and no exits."""
    torch.manual_seed(skips.seed)
    ungated = ExitNetwork(trunk, (), (), {block: nn.Identity() for block in blocks.gated}).eval()
    with torch.no_grad():
        _, inputs, _ = ungated.observe(image)
    gate = BLOCK_GATES[skips.gate]
    gates = {block: gate(source.shape[1]) for block, (source, _) in zip(blocks.gated, inputs, strict=True)}
    return ExitNetwork(trunk, (), (), gates).eval()


def train_gates_once(
    network: ExitNetwork,
    data: Splits,
    skips: SkipsSection,
    augment: Augment | None,
    file: Path,
    progress: Progress,
) -> None:
    """Trains a network with its gates in place, or loads the cached result; gates are calibrated afterwards.

    Raises:
        DivergedError: the loss is not finite for the second time.
    """
    calibration = torch.from_numpy(data.calibration.images[:])
    if load_weights(network, file):
        calibrate_gates(network.eval(), calibration, skips.rate)
        return
    batches = TrainingBatches(data.train, skips.batch, skips.seed, augment)
    images, check = recovery_images(data.train, _IMAGES), check_images(data.train, _IMAGES)

    def learn(checkpoint: Path, report: Report) -> None:
        train_gates(network, batches, while_gates_learn(skips), checkpoint, report)
        calibrate_gates(network, calibration, skips.rate)
        refresh_statistics(network, images, check)

    loss_of = _SkippedLoss(network, skips)
    gates = [network.gate(block) for block in network.skip_blocks]

    def train_frozen(checkpoint: Path, report: Report) -> None:
        train_with_frozen_gates(network, gates, loss_of, batches, skips, checkpoint, report)
        rebase_batch_norm(network, images)

    train_in_parts(network, learn, train_frozen, file, progress)
    calibrate_gates(network.eval(), calibration, skips.rate)


def train_gates(
    network: ExitNetwork,
    batches: TrainingBatches,
    skips: SkipsSection,
    checkpoint: Path | None = None,
    report: Report = lambda _done, _total: None,
) -> Fitted:
    """Trains a network with its gates in place, on labels, by distillation from itself, and on a rate loss.

    Source: Veit & Belongie, Convolutional Networks with Adaptive Inference Graphs, 2018. Their published evaluation
    still samples the gates; here they are deterministic once trained.

    Raises:
        DivergedError: the loss is not finite for the second time.
    """
    loss_of = _SkippedLoss(network, skips)

    def step(batch: Batch) -> float:
        gates = SampledGates(skips.temperature, batch.generator)
        loss = loss_of(batch.images, batch.labels, gates) + skips.weight * rate_loss(gates.taken, skips.rate)
        loss.backward()
        return float(loss.detach())

    return fit(network, step, batches, skips, checkpoint, report)


class _SkippedLoss:
    """The loss on labels, and of distillation from the network without gates."""

    def __init__(self, network: ExitNetwork, skips: SkipsSection) -> None:
        self._network = network
        self._skips = skips
        self._teacher = copy.deepcopy(network.trunk).eval() if skips.distillation > 0 else None

    def __call__(self, images: Tensor, labels: Tensor, decide: Decide = decided) -> Tensor:
        """Returns the loss of a batch; `decide` chooses the blocks that each image runs."""
        with fast_arithmetic():
            with torch.no_grad():
                teacher_logits = self._teacher(images).float() if self._teacher else torch.empty(0)
            _, logits = self._network.run_trunk(images, decide)
        return distillation_loss(logits.float(), teacher_logits, labels, self._skips.distillation, _TEMPERATURE)


def calibrate_gates(network: ExitNetwork, images: Tensor, rate: float) -> None:
    """Shifts and scales the logits of each gate, in place, so that a share `rate` of the images has a logit from 0 on.

    Gates were sampled in training, so most of their logits may lie on one side of 0; only their order tells which
    images need the block more. The unit becomes their standard deviation. Gates are calibrated one after the other,
    each with the decisions of those before it.

    Args:
        network: trained, in evaluation mode.
        images: `(n, c, h, w)`.
        rate: share of the images that run each block.
    """

    def decide(block: str, logits: Tensor) -> Tensor:
        last = [module for module in network.gate(block).modules() if isinstance(module, nn.Linear)][-1]
        threshold = torch.quantile(logits, 1 - rate)
        std = logits.std().clamp(min=1e-6)
        last.weight.div_(std)
        last.bias.sub_(threshold).div_(std)
        return (logits >= threshold).to(logits.dtype)

    with torch.no_grad():
        network.run_trunk(images, decide)


class SampledGates:
    """Gates in training: open at random with the probability of their logit, with the gradient of a soft gate.

    The difference of two Gumbel variables is logistic, so one noise variable is enough for two choices.
    Source: Jang et al., Categorical Reparameterization with Gumbel-Softmax, 2017 (straight-through).

    Args:
        temperature: of the soft gate.
        generator: of the noise.
    """

    def __init__(self, temperature: float, generator: torch.Generator) -> None:
        self.taken: list[Tensor] = []
        self._temperature = temperature
        self._generator = generator

    def __call__(self, _block: str, logits: Tensor) -> Tensor:
        """Returns 1 where the block is run and 0 where it is skipped, `(n, 1)`."""
        uniform = torch.rand(logits.shape, generator=self._generator).clamp(1e-6, 1 - 1e-6)
        noisy = logits.float() + torch.logit(uniform)
        soft = torch.sigmoid(noisy / self._temperature)
        runs = (noisy >= 0).float() + (soft - soft.detach())  # exactly 0 or 1 in the forward pass
        self.taken.append(runs)
        return runs


def rate_loss(taken: list[Tensor], rate: float) -> Tensor:
    """Returns the mean over gates of the squared distance of the share of images that run the block from `rate`."""
    return torch.stack([(rate - runs.mean()) ** 2 for runs in taken]).mean()
