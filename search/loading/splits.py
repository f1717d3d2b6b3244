"""Splits images at random, stratified by class and reproducible."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

SPLITS = ("train", "calibration", "validation", "test")


@dataclass(frozen=True)
class Draw:
    """One split that is drawn from a pool.

    Args:
        split: its name.
        share: of the pool's images, at most; the study may limit it further.
    """

    split: str
    share: float


_CALIBRATION, _REST = Draw("calibration", 0.1), Draw("train", 1)
PLANS: Mapping[frozenset[str], Mapping[str, tuple[Draw, ...]]] = {
    frozenset({"train", "validation", "test"}): {
        "train": (_CALIBRATION, _REST),
        "validation": (Draw("validation", 1),),
        "test": (Draw("test", 1),),
    },
    # The network may be trained on train/, so validation and test images come from the held-out ones.
    frozenset({"train", "validation"}): {
        "train": (_CALIBRATION, _REST),
        "validation": (Draw("validation", 0.5), Draw("test", 1)),
    },
    frozenset({"train", "test"}): {
        "train": (_CALIBRATION, _REST),
        "test": (Draw("validation", 0.5), Draw("test", 1)),
    },
    frozenset({"validation", "test"}): {
        "validation": (Draw("validation", 0.4), _CALIBRATION, _REST),
        "test": (Draw("test", 1),),
    },
    **{
        frozenset({only}): {only: (Draw("test", 0.2), Draw("validation", 0.2), _CALIBRATION, _REST)}
        for only in ("train", "validation", "test")
    },
}
"""The splits that are drawn from each pool, in order, by the set of pools."""


def most_needed(draws: tuple[Draw, ...], caps: Mapping[str, int]) -> int:
    """Returns how many images of a pool are needed at most, so that no more are inspected."""
    return sum(caps[draw.split] for draw in draws)


def draw_all(
    labels: NDArray[np.int64], draws: tuple[Draw, ...], caps: Mapping[str, int], seed: int, total: int
) -> dict[str, Indices]:
    """Returns the indices of each split that is drawn from a pool; splits are disjoint.

    Args:
        labels: of the pool's usable images.
        draws: in order.
        caps: maximum number of images, by split.
        seed: of all choices.
        total: number of images in the pool, those not inspected included; shares refer to it.
    """
    rng = np.random.default_rng(seed)
    remaining = np.arange(len(labels))
    drawn = {}
    classes = len(np.unique(labels))
    for draw in draws:
        count = round(draw.share * total)
        if draw.split == "calibration":  # activation ranges need every class, if there are enough images
            count = max(count, min(classes, len(labels) // 4))
        chosen = stratified(labels[remaining], min(count, caps[draw.split]), rng)
        drawn[draw.split] = remaining[chosen]
        remaining = np.delete(remaining, chosen)
    return drawn


def stratified(labels: NDArray[np.int64], count: int, rng: np.random.Generator) -> Indices:
    """Returns `count` indices in random order: one of every class first, then each class by its share.

    Args:
        labels: of the images to choose from; they may be sorted.
        count: number of images; all if there are fewer.
        rng: random generator.
    """
    order = rng.permutation(len(labels))
    rank = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank[members] = np.arange(len(members)) / len(members)
    # A stable sort of a permutation: images of equal rank come in random order.
    first = order[np.argsort(rank[order], kind="stable")][:count]
    return rng.permutation(first)
