"""Training a network once more, with gates around some of its blocks."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from evaluators.data import Splits
from search.config.progress import Progress
from search.config.study import SkipsSection
from search.training.batchnorm import check_images, rebase_batch_norm, recovery_images, refresh_statistics
from search.training.distillation import distillation_loss
from search.training.frozen_gates import settle, train_in_parts, while_gates_learn
from search.training.loop import Augment, Fitted, Report, TrainingBatches, fast_arithmetic, fit, load_weights
from spaces.dynamic.block_gates import BLOCK_GATES
from spaces.dynamic.exit_network import Decide, ExitNetwork, decided
from spaces.dynamic.skippable_blocks import Blocks, check_blocks, find_blocks

_TEMPERATURE = 2.0
"""Softens the teacher's answers and the learner's."""
_IMAGES = 2_000
"""Training images that batch statistics are measured on, once gates are calibrated."""


def skip_blocks(trunk: nn.Module, skips: SkipsSection, image: Tensor) -> Blocks:
    """Returns the blocks that the study wants gates around.

    Args:
        trunk: in evaluation mode.
        skips: all of them, or their paths.
        image: one input, `(1, c, h, w)`.

    Raises:
        StructureError: one of them cannot be skipped.
    """
    if not skips.blocks:
        return Blocks(())
    return find_blocks(trunk, image) if skips.blocks == "all" else check_blocks(trunk, image, skips.blocks)


def with_gates(trunk: nn.Module, blocks: Blocks, skips: SkipsSection, image: Tensor) -> ExitNetwork:
    """Returns the trunk with an untrained gate around each of the blocks, and no exits."""
    torch.manual_seed(skips.seed)
    bare = ExitNetwork(trunk, (), (), {block: nn.Identity() for block in blocks.gated}).eval()
    with torch.no_grad():
        _, seen, _ = bare.observe(image)
    make = BLOCK_GATES[skips.gate]
    gates = {block: make(source.shape[1]) for block, (source, _) in zip(blocks.gated, seen, strict=True)}
    return ExitNetwork(trunk, (), (), gates).eval()


def train_gates_once(
    network: ExitNetwork,
    data: Splits,
    skips: SkipsSection,
    augment: Augment | None,
    file: Path,
    progress: Progress,
) -> None:
    """Trains a network with its gates in place, or loads what an earlier call came to; gates are then calibrated.

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

    def settled(checkpoint: Path, report: Report) -> None:
        settle(network, gates, loss_of, batches, skips, checkpoint, report)
        rebase_batch_norm(network, images)

    train_in_parts(network, learn, settled, file, progress)
    calibrate_gates(network.eval(), calibration, skips.rate)


def train_gates(
    network: ExitNetwork,
    batches: TrainingBatches,
    skips: SkipsSection,
    checkpoint: Path | None = None,
    report: Report = lambda _done, _total: None,
) -> Fitted:
    """Trains a network with its gates in place: on labels, on what it answered before, and towards the wanted rate.

    Source: Veit & Belongie, Convolutional Networks with Adaptive Inference Graphs, 2018. Their published evaluation
    still samples the gates; here they are deterministic from the end of the training on.

    Raises:
        DivergedError: the loss is not finite for the second time.
    """
    loss_of = _SkippedLoss(network, skips)

    def step(images: Tensor, labels: Tensor, done: float, generator: torch.Generator) -> float:  # noqa: ARG001
        gates = SampledGates(skips.temperature, generator)
        loss = loss_of(images, labels, gates) + skips.weight * rate_loss(gates.taken, skips.rate)
        loss.backward()
        return float(loss.detach())

    return fit(network, step, batches, skips, checkpoint, report)


class _SkippedLoss:
    """On labels, and on what the network answered before it had gates."""

    def __init__(self, network: ExitNetwork, skips: SkipsSection) -> None:
        self._network = network
        self._skips = skips
        self._teacher = copy.deepcopy(network.trunk).eval() if skips.distillation > 0 else None

    def __call__(self, images: Tensor, labels: Tensor, decide: Decide = decided) -> Tensor:
        """Returns the loss of a batch whose images run the blocks that `decide` says."""
        with fast_arithmetic():
            with torch.no_grad():
                answers = self._teacher(images).float() if self._teacher else torch.empty(0)
            _, logits = self._network.run_trunk(images, decide)
        return distillation_loss(logits.float(), answers, labels, self._skips.distillation, _TEMPERATURE)


def calibrate_gates(network: ExitNetwork, images: Tensor, rate: float) -> None:
    """Moves and stretches the logits of each gate, in place: from 0 on, a share `rate` of the images runs its block.

    A gate that was sampled while it learned need not be sure of anything, so most of its logits may lie on one side of
    0; what they tell is which images need the block more. Their unit becomes their standard deviation. Gates are taken
    one after the other, each given what those before it decide.

    Args:
        network: trained, in evaluation mode.
        images: `(n, c, h, w)`.
        rate: the share.
    """

    def decide(block: str, logits: Tensor) -> Tensor:
        last = [module for module in network.gate(block).modules() if isinstance(module, nn.Linear)][-1]
        middle, spread = torch.quantile(logits, 1 - rate), logits.std().clamp(min=1e-6)
        last.weight.div_(spread)
        last.bias.sub_(middle).div_(spread)
        return (logits >= middle).to(logits.dtype)

    with torch.no_grad():
        network.run_trunk(images, decide)


class SampledGates:
    """Gates as they are trained: open or closed at random, as likely as they say, with the gradient of a soft one.

    The difference of two Gumbel variables is logistic, so one noise is enough for the two ways.
    Source: Jang et al., Categorical Reparameterization with Gumbel-Softmax, 2017 (straight-through).

    Args:
        temperature: of the soft gate.
        generator: of the noise.
    """

    def __init__(self, temperature: float, generator: torch.Generator) -> None:
        self.taken: list[Tensor] = []
        self._temperature = temperature
        self._generator = generator

    def __call__(self, block: str, logits: Tensor) -> Tensor:  # noqa: ARG002
        """Returns 1 where the block is run and 0 where it is skipped, `(n, 1)`."""
        chance = torch.rand(logits.shape, generator=self._generator).clamp(1e-6, 1 - 1e-6)
        noisy = logits.float() + torch.logit(chance)
        soft = torch.sigmoid(noisy / self._temperature)
        runs = (noisy >= 0).float() + (soft - soft.detach())  # forwards exactly 0 or 1
        self.taken.append(runs)
        return runs


def rate_loss(taken: list[Tensor], rate: float) -> Tensor:
    """Returns the mean over gates of the squared distance of each one's share of open images from the wanted rate."""
    return torch.stack([(rate - runs.mean()) ** 2 for runs in taken]).mean()
