"""Splits images at random, stratified by class and reproducible."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

SPLITS = ("train", "calibration", "validation", "test")
_FIRST_SERVED = ("train", "validation", "test", "calibration")
"""The order in which splits get an image of a class that has too few for all of them."""
_UNEVEN = 3
"""Classes are called uneven if the largest has at least so many times the images of the smallest."""
_NAMED = 5


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

    Every class is in every split, if it has enough images.

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
    for number, draw in enumerate(draws, 1):
        count = round(draw.share * total)
        if draw.split == "calibration":  # activation ranges need every class, if there are enough images
            count = max(count, min(classes, len(labels) // 4))
        chosen = stratified(labels[remaining], min(count, caps[draw.split]), rng)
        chosen = _leaving_some(labels[remaining], chosen, draw, draws[number:])
        drawn[draw.split] = remaining[chosen]
        remaining = np.delete(remaining, chosen)
    return drawn


def _leaving_some(labels: NDArray[np.int64], chosen: Indices, draw: Draw, later: Sequence[Draw]) -> Indices:
    """Returns the chosen images without those of small classes that later splits need."""
    served_before = _FIRST_SERVED[: _FIRST_SERVED.index(draw.split)]
    needed = sum(other.split in served_before for other in later)
    counts = np.bincount(labels)
    allowed = np.maximum(counts - len(later), np.minimum(counts - needed, 1))
    taken = Counter[int]()
    kept = []
    for index in chosen:
        label = int(labels[index])
        taken[label] += 1
        if taken[label] <= allowed[label]:
            kept.append(index)
    return np.array(kept, dtype=np.int64)


def class_remarks(labels: Mapping[str, NDArray[np.int64]], names: Sequence[str]) -> list[str]:
    """Returns remarks for the user on classes that a split lacks, and on classes of uneven size.

    Args:
        labels: of the images of each split.
        names: of the classes.
    """
    counts = {split: np.bincount(found, minlength=len(names)) for split, found in labels.items()}
    total = np.sum(list(counts.values()), axis=0)
    present = [index for index, count in enumerate(total) if count]
    remarks = []
    lacking = {split: [names[index] for index in present if not counts[split][index]] for split in SPLITS}
    if len(labels["calibration"]) < len(present):  # so few images cannot show every class
        lacking["calibration"] = []
    if any(lacking.values()):
        said = "; ".join(f"{split} has none of {_listed(missing)}" for split, missing in lacking.items() if missing)
        remarks.append(f"Careful: {said}: what is trained or measured there says nothing of them. Give more of them")
    largest, smallest = (extreme(present, key=lambda index: int(total[index])) for extreme in (max, min))
    if total[largest] >= _UNEVEN * total[smallest]:
        share = counts["validation"][largest] / len(labels["validation"])
        remarks.append(
            f"Classes are uneven, from {total[smallest]} of {names[smallest]!r} to {total[largest]} of"
            f" {names[largest]!r}: to answer {names[largest]!r} each time is right for {share:.1%} of the validation"
            " images"
        )
    return remarks


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more classes"


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
