"""Data sets that torchvision knows: in its own formats, downloaded only when asked to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from search.config.references import SourceError
from search.loading.image_folder import IMAGENET_MEAN, IMAGENET_STD, DataSource, Pool
from search.loading.image_store import ArrayReader, FileReader


def cifar10(place: str, download: bool) -> DataSource:
    """Returns CIFAR-10's 50,000 training and 10,000 test images; mean and std are those of the training images."""
    from torchvision.datasets import CIFAR10

    return _arrays("cifar10", CIFAR10, place, download, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def cifar100(place: str, download: bool) -> DataSource:
    """Returns CIFAR-100's 50,000 training and 10,000 test images; mean and std are those of the training images."""
    from torchvision.datasets import CIFAR100

    return _arrays("cifar100", CIFAR100, place, download, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def fashion_mnist(place: str, download: bool) -> DataSource:
    """Returns Fashion-MNIST's 60,000 training and 10,000 test images; mean and std are those of the training images."""
    from torchvision.datasets import FashionMNIST

    return _arrays("fashion-mnist", FashionMNIST, place, download, 28, (0.2860,), (0.3530,))


def _arrays(
    kind: str,
    dataset: Callable[..., Any],
    place: str,
    download: bool,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> DataSource:
    try:
        parts = {part: dataset(place, train=part == "train", download=download) for part in ("train", "test")}
    except Exception as error:
        remedy = "check the connection and the folder" if download else "add --download, or give the folder it is in"
        reason = str(error).partition("You can use")[0].strip()
        raise SourceError(
            f"{kind} is in a folder as torchvision stores it, got {place!r} ({reason}); {remedy}"
        ) from None
    pools = {
        part: Pool(ArrayReader(np.asarray(data_set.data)), np.asarray(data_set.targets, dtype=np.int64))
        for part, data_set in parts.items()
    }
    return DataSource(pools, tuple(parts["train"].classes), size, mean, std)


def imagenet(place: str, download: bool) -> DataSource:  # noqa: ARG001  its licence does not allow a download
    """Returns ImageNet's images as torchvision stores them: what there is of train/ and val/, and meta.bin."""
    from torchvision.datasets import ImageNet

    pools = {}
    reasons = []
    classes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    for part, name in (("train", "train"), ("validation", "val")):
        try:
            data_set = ImageNet(place, split=name)
        except Exception as error:
            reasons.append(str(error))
            continue
        files, labels = [Path(file) for file, _ in data_set.samples], [label for _, label in data_set.samples]
        pools[part] = Pool(FileReader(Path(place), files), np.array(labels, dtype=np.int64))
        classes = tuple(data_set.wnids)
        names = tuple(", ".join(synonyms) for synonyms in data_set.classes)
    if not pools:
        raise SourceError(
            f"imagenet lies in a folder as torchvision stores it, got {place!r} ({reasons[0]}); put its archives there,"
            " or give train/ and val/ with a folder for each class as imagefolder:PATH"
        )
    return DataSource(pools, classes, None, IMAGENET_MEAN, IMAGENET_STD, names=names)
