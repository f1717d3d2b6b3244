"""Which images go into which split: by class, at random, and always the same."""

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
        share: of the pool's images, at most; the section's cap may be lower.
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
    # The network may know train/ by heart, so what is measured comes from what is held out.
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
"""By the folders or archives that there are: what is drawn from each, in order."""


def wanted(draws: tuple[Draw, ...], caps: Mapping[str, int]) -> int:
    """Returns how many images of a pool can be used at all, so that no more of them are looked at."""
    return sum(caps[draw.split] for draw in draws)


def draw_all(
    labels: NDArray[np.int64], draws: tuple[Draw, ...], caps: Mapping[str, int], seed: int, total: int
) -> dict[str, Indices]:
    """Returns the indices of each split that is drawn from a pool; no index is in two.

    Args:
        labels: of the pool's images that are fit for use.
        draws: in order.
        caps: how many images each split has at most.
        seed: of all choices.
        total: how many images the pool has, those that were not looked at included: what shares are of.
    """
    rng = np.random.default_rng(seed)
    left, drawn = np.arange(len(labels)), {}
    classes = len(np.unique(labels))
    for draw in draws:
        count = round(draw.share * total)
        if draw.split == "calibration":  # activation ranges want every class, if there are images to spare
            count = max(count, min(classes, len(labels) // 4))
        chosen = stratified(labels[left], min(count, caps[draw.split]), rng)
        drawn[draw.split] = left[chosen]
        left = np.delete(left, chosen)
    return drawn


def stratified(labels: NDArray[np.int64], count: int, rng: np.random.Generator) -> Indices:
    """Returns `count` indices in random order: one of every class first, then each class by its share.

    Args:
        labels: of the images to choose from; they may be sorted.
        count: how many; all where there are no more.
        rng: chooses.
    """
    order = rng.permutation(len(labels))
    rank = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank[members] = np.arange(len(members)) / len(members)
    # A stable sort of a permutation: images of equal rank come in random order.
    first = order[np.argsort(rank[order], kind="stable")][:count]
    return rng.permutation(first)
