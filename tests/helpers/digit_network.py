"""A small network with depthwise layers, trained on digits in seconds, and images to score it on."""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluators.data import LabelledImages
from spaces.dynamic.exit_network import ExitHead, ExitNetwork
from studies.digits.data import splits


def unit(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class DigitNetwork(nn.Module):
    """Two convolutions, two depthwise separable ones, a residual block, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = unit(1, 16), unit(16, 24, stride=2)
        self.depthwise, self.pointwise = unit(24, 24, groups=24), unit(24, 32, kernel=1)
        self.inner = unit(32, 32)
        self.outer = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32))
        self.join, self.pool, self.flatten = nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        self.hidden, self.act, self.classifier = nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise(self.depthwise(self.second(self.first(x))))
        x = self.join(self.outer(self.inner(x)) + x)
        return self.classifier(self.act(self.hidden(self.flatten(self.pool(x)))))


@cache
def digits() -> tuple[LabelledImages, LabelledImages, LabelledImages]:
    """Returns images to train on, to calibrate with and to score, 16x16."""
    found = splits()
    return tuple(_halved(part) for part in (found.train, found.calibration, found.validation))


def _halved(part: LabelledImages) -> LabelledImages:
    return LabelledImages(F.avg_pool2d(torch.from_numpy(part.images), 2).numpy(), part.labels)


@cache
def trained() -> ExitNetwork:
    """Returns the network with an exit behind `pointwise`, after 120 steps; what is returned is shared."""
    torch.manual_seed(0)
    network = ExitNetwork(DigitNetwork(), ["pointwise"], [ExitHead(32, 10, 2)])
    data, _, _ = digits()
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=120)
    for _ in range(120):
        chosen = torch.randperm(len(images))[:50]
        loss = sum(F.cross_entropy(logits, labels[chosen]) for logits in network(images[chosen]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return settled(network, images)


def settled(network: ExitNetwork, images: Tensor) -> ExitNetwork:
    """Returns the network with the batch statistics of all images, in evaluation mode."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        network.train()(images)
    return network.eval()


def accuracy(answers: np.ndarray) -> float:
    """Returns the share of the scored images that logits are right about."""
    return float(np.mean(answers.argmax(1) == digits()[2].labels))
