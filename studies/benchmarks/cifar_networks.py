"""Networks for CIFAR-10 on which the program has not been tuned, and their training.

python -m studies.benchmarks.cifar_networks --data imagefolder:PATH --weights resnet20.pt --out FOLDER [--minutes 7]

Writes `resnet56.pt` and `mobile.pt`. The deep network is grown from a trained ResNet-20: its further blocks begin as
identities (the last scale of each is 0), so that minutes of training do.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluators.data import LabelledImages
from search.config.study import DataSection, ModelSection, Study, load_study
from search.loading.prepare import prepare
from search.training.loop import TrainingBatches
from studies.cifar10.data import augment
from studies.cifar10.model import BasicBlock, ResNet20

_SMALLEST_SCALE = 1e-2
"""A new block's last scale: at 0 itself its channels would look as if they could all go."""


class ResNet56(ResNet20):
    """A CIFAR ResNet with nine blocks a layer."""

    BLOCKS = 9

    def __init__(self, classes: int = 10) -> None:
        super().__init__(classes)
        for layer, width in ((self.layer1, 16), (self.layer2, 32), (self.layer3, 64)):
            layer.extend(BasicBlock(width, width, 1) for _ in range(self.BLOCKS - len(layer)))


class InvertedResidual(nn.Module):
    """A wide depthwise convolution between two narrow linear ends, ReLU6 in between.

    Source: Sandler et al., MobileNetV2, 2018.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.layers = nn.Sequential(
            *_normed(inputs, hidden, 1),
            *_normed(hidden, hidden, 3, stride, hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Returns `(n, outputs, h / stride, w / stride)` for `x` of shape `(n, inputs, h, w)`."""
        made: Tensor = self.layers(x)
        return x + made if self.is_residual else made


class Mobile(nn.Module):
    """A MobileNetV2 for images of 32 pixels: ten blocks, 24 to 96 channels."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        widths = (24, 24, 32, 32, 32, 64, 64, 64, 96, 96)
        strides = (1, 1, 2, 1, 1, 2, 1, 1, 1, 1)
        self.stem = nn.Sequential(*_normed(3, 24, 3))
        sources = (24, *widths)
        pairs = zip(sources, widths, strides, strict=False)
        self.blocks = nn.Sequential(*(InvertedResidual(*each) for each in pairs))
        self.last = nn.Sequential(*_normed(96, 320, 1))
        self.classifier = nn.Linear(320, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits `(n, classes)` for images `(n, 3, 32, 32)`."""
        features = self.last(self.blocks(self.stem(x)))
        logits: Tensor = self.classifier(F.adaptive_avg_pool2d(features, 1).flatten(1))
        return logits


def _normed(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU6()]


def resnet56() -> nn.Module:
    """Returns an untrained ResNet-56 for three colour channels and ten classes."""
    return ResNet56()


def mobile() -> nn.Module:
    """Returns an untrained small MobileNetV2 for three colour channels and ten classes."""
    return Mobile()


def grown(weights: Path) -> nn.Module:
    """Returns a ResNet-56 that answers nearly as the ResNet-20 whose weights these are."""
    network = ResNet56()
    network.load_state_dict(torch.load(weights, weights_only=True), strict=False)
    for layer in (network.layer1, network.layer2, network.layer3):
        for block in list(layer)[3:]:
            assert isinstance(block, BasicBlock)
            nn.init.constant_(block.bn2.weight, _SMALLEST_SCALE)
    return network


def train(network: nn.Module, data: LabelledImages, minutes: float, rate: float) -> None:
    """Trains in place for so many processor minutes: SGD, one cosine, images shifted and mirrored."""
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batches = TrainingBatches(data, 128, 0, augment)
    begin = time.process_time()
    epoch = 0
    share = 0.0
    network.train()
    while share < 1:
        for images, labels in batches.epoch(epoch):
            share = (time.process_time() - begin) / (60 * minutes)
            for group in optimizer.param_groups:
                group["lr"] = rate * min(
                    20 * share + 0.05, 0.5 + 0.5 * float(torch.cos(torch.tensor(share * torch.pi)))
                )
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels, label_smoothing=0.05).backward()
            optimizer.step()
            if share >= 1:
                break
        epoch += 1
    network.eval()


def accuracy(network: nn.Module, data: LabelledImages) -> float:
    """Returns the share of right answers."""
    with torch.no_grad():
        found = [network(images).argmax(1) for images in torch.from_numpy(data.images[:]).split(500)]
    return float((torch.cat(found).numpy() == data.labels).mean())


def study_on(data: str, model: str, weights: Path) -> Study:
    """Returns the CIFAR-10 study with other images and another network."""
    given = load_study("cifar10")
    sections = {
        "data": DataSection(**given.data.model_dump(exclude={"source"}), source=data),
        "model": ModelSection(source=model, weights=str(weights)),
        "training": None,
    }
    return given.model_copy(update=sections)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains both networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True, type=Path, help="of the ResNet-20")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument(
        "--minutes", type=float, default=7.0, help="of the processor, for the deep network; twice for the other"
    )
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    study = study_on(given.data, "studies.cifar10.model:resnet20", given.weights)
    loaded, _ = prepare(study, False, lambda *_: None, lambda _: None)
    plans = (("mobile", Mobile(), 2 * given.minutes, 0.2), ("resnet56", grown(given.weights), given.minutes, 0.03))
    for name, network, minutes, rate in plans:
        train(network, loaded.splits.train, minutes, rate)
        torch.save(network.state_dict(), given.out / f"{name}.pt")
        print(
            f"{name}: {accuracy(network, loaded.splits.test):.2%} of {len(loaded.splits.test)} test images", flush=True
        )


if __name__ == "__main__":
    main()
