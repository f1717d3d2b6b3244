"""Composes scenes: one whole digit among pieces of others, under uneven light and noise, some easy and some hard.

All arithmetic that pixels depend on is exact or rounded, so that a seed gives the same pixels on every platform.
Source of the clutter: Mnih et al., Recurrent Models of Visual Attention, 2014 (cluttered MNIST).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluators.data import LabelledImages

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Range = tuple[float, float]
"""Values in the easiest and in the hardest scene."""

SMALLEST = 36
"""Height and width in pixels that the largest digit needs."""
SCALE: Range = (4.5, 2.2)
"""Pixels per cell of a digit, which has 8 cells in height and width."""
TURN: Range = (0.1, 0.6)
"""Radians, at most, in both directions."""
STRENGTH: Range = (0.85, 0.45)
"""How much brighter the digit's strokes are than the ground; pieces are drawn with 0.6 to 1 times as much."""
PIECES: Range = (0.0, 10.0)
"""Number of pieces of other digits."""
NOISE: Range = (0.01, 0.08)
"""Standard deviation, in units of brightness."""
SHADE: Range = (0.1, 0.5)
"""How much darker the darkest corner is than the brightest."""

_CELLS, _PIECE = 8, 4
"""Height and width of a digit, and of a piece of one, in cells."""
_BORDER = 2
"""Empty cells around a digit, so that what lies outside is exactly 0."""
_GROUND = 0.15
"""Brightness of the ground."""
_LARGEST_PIECE = 3.0
"""Pixels per cell of a piece, at most; a piece, 4 cells high and wide, fits into its window however turned."""
_WINDOW = 18
_INK = 0.25
"""Coverage from which a pixel belongs to the digit."""
_AT_ONCE = 256
"""Scenes composed together: their arrays fit into a processor's cache."""


@dataclass(frozen=True)
class Scenes:
    """Scenes, and where the digit is in each.

    Args:
        images: brightness from 0 to 1 in steps of 1/255, float32 `(n, 1, size, size)`.
        labels: which digit it is, `(n,)`.
        masks: which pixels its strokes cover, those under clutter included, bool `(n, size, size)`.
        boxes: top, left, bottom and right of the mask, in pixels, bottom and right exclusive, `(n, 4)`.
        difficulty: from 0, easy, to 1, hard, `(n,)`.
    """

    images: Floats
    labels: Ints
    masks: NDArray[np.bool_]
    boxes: Ints
    difficulty: Floats

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Drawings:
    """Parts of digits, each with its place in a picture.

    Args:
        cells: coverage from 0 to 1, `(n, 8, 8)`.
        middle: row and column of the cells that comes to lie on the place, `(n, 2)`; 3.5 is the middle of all 8.
        scale: pixels per cell, `(n,)`.
        turn: radians, `(n,)`.
        place: row and column of the picture, in pixels, `(n, 2)`.
    """

    cells: Floats
    middle: Floats
    scale: Floats
    turn: Floats
    place: Floats

    def drawn(self, size: int) -> Floats:
        """Returns the coverage of the pixels of a picture for each, from 0 to 1, `(n, size, size)`."""
        cosine, sine = (np.round(f(self.turn.astype(np.float64)), 6) / self.scale for f in (np.cos, np.sin))
        cosine, sine = cosine.astype(np.float32)[:, None], sine.astype(np.float32)[:, None]
        down, right = (np.arange(size, dtype=np.float32) - self.place[:, [axis]] for axis in (0, 1))
        row = (down * cosine)[:, :, None] - (right * sine)[:, None, :] + self.middle[:, 0, None, None]
        column = (down * sine)[:, :, None] + (right * cosine)[:, None, :] + self.middle[:, 1, None, None]
        return _sharpened(_between(self.cells, row, column))


def compose(digits: LabelledImages, count: int, seed: int, size: int = 48) -> Scenes:
    """Returns scenes of these digits alone; every class as often as every other, to within one scene.

    Args:
        digits: images `(n, 1, 8, 8)` from 0 to 1, of every class at least one.
        count: number of scenes.
        seed: of all choices.
        size: height and width in pixels.

    Raises:
        ValueError: the digits have another size, or do not fit into the scenes.
    """
    _check(digits, size)
    rng = np.random.default_rng(seed)
    labels, chosen = _choice(digits.labels, count, rng)
    cells = np.ascontiguousarray(digits.images[:][:, 0])
    parts = [_composed(cells, labels[some], chosen[some], rng, size) for some in _portions(count)]
    fields = [np.concatenate([getattr(part, name) for part in parts]) for name in Scenes.__dataclass_fields__]
    return Scenes(*fields)


def _check(digits: LabelledImages, size: int) -> None:
    if tuple(digits.images.shape[1:]) != (1, _CELLS, _CELLS):
        raise ValueError(f"digits are (n, 1, 8, 8), got {digits.images.shape}; take them as scikit-learn has them")
    if size < SMALLEST:
        raise ValueError(f"scenes are at least {SMALLEST} pixels in height and width, got {size}; let them be larger")


def _portions(count: int) -> Iterator[slice]:
    return (slice(start, start + _AT_ONCE) for start in range(0, count, _AT_ONCE))


def _choice(labels: Ints, count: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Returns the class of each scene, and which of the digits it shows."""
    classes = np.unique(labels)
    wanted = classes[rng.permutation(count) % len(classes)]
    chosen = np.empty(count, np.int64)
    for label in classes:
        members = np.flatnonzero(labels == label)
        places = np.flatnonzero(wanted == label)
        chosen[places] = members[rng.integers(len(members), size=len(places))]
    return wanted, chosen


def _composed(cells: Floats, labels: Ints, chosen: Ints, rng: np.random.Generator, size: int) -> Scenes:
    difficulty = rng.random(len(labels), np.float32)
    digits = _placed(cells[chosen], difficulty, rng, size)
    coverage = digits.drawn(size)
    strength = _between_ends(STRENGTH, difficulty, rng)
    clutter = _clutter(cells, digits.scale, _between_ends(PIECES, difficulty, rng), rng, size)
    ink = np.maximum(coverage, clutter) * strength[:, None, None]
    lit = (np.float32(_GROUND) + ink) * _light(_between_ends(SHADE, difficulty, rng), rng, size)
    noisy = lit + _noise(_between_ends(NOISE, difficulty, rng), rng, size)
    images = np.round(np.clip(noisy, 0, 1) * 255) / np.float32(255)
    masks = coverage >= _INK
    return Scenes(images[:, None], labels, masks, _boxes(masks), difficulty)


def _between_ends(ends: Range, difficulty: Floats, rng: np.random.Generator) -> Floats:
    """Returns a value for each scene, as hard as the scene is, give or take a fifth."""
    hardness = np.clip(difficulty + 0.4 * rng.random(len(difficulty), np.float32) - 0.2, 0, 1).astype(np.float32)
    return np.float32(ends[0]) + np.float32(ends[1] - ends[0]) * hardness


def _placed(cells: Floats, difficulty: Floats, rng: np.random.Generator, size: int) -> Drawings:
    """Returns the digits with their sizes, turns and places, whole inside the scene unless a turn cuts a corner."""
    count = len(cells)
    scale = _between_ends(SCALE, difficulty, rng)
    turn = _between_ends(TURN, difficulty, rng) * (2 * rng.random(count, np.float32) - 1)
    half = scale[:, None] * (_CELLS / 2)
    place = half - 0.5 + (size - 2 * half) * rng.random((count, 2), np.float32)
    middle = np.full((count, 2), (_CELLS - 1) / 2, np.float32)
    return Drawings(cells, middle, scale, turn, place.astype(np.float32))


def _clutter(cells: Floats, scale: Floats, pieces: Floats, rng: np.random.Generator, size: int) -> Floats:
    """Returns the coverage by pieces of any digits, drawn no larger than the scene's own, `(n, size, size)`."""
    canvas = np.zeros((len(scale), size + 2 * _WINDOW, size + 2 * _WINDOW), np.float32)
    for number in range(int(np.ceil(pieces.max()))):
        scenes = np.flatnonzero(pieces > number)
        drawn = _pieces(cells, np.minimum(scale[scenes], _LARGEST_PIECE), rng).drawn(_WINDOW)
        drawn *= 0.6 + 0.4 * rng.random((len(scenes), 1, 1), np.float32)
        corner = rng.integers(_WINDOW // 2, size + _WINDOW // 2 + 1, (2, len(scenes), 1, 1))
        rows, columns = corner[0] + np.arange(_WINDOW)[:, None], corner[1] + np.arange(_WINDOW)
        below = canvas[scenes[:, None, None], rows, columns]
        canvas[scenes[:, None, None], rows, columns] = np.maximum(below, drawn)
    return canvas[:, _WINDOW:-_WINDOW, _WINDOW:-_WINDOW]


def _pieces(cells: Floats, largest: Floats, rng: np.random.Generator) -> Drawings:
    """Returns one piece of 4x4 cells for each of `largest`, its pixels per cell at most, in the middle of a window."""
    count = len(largest)
    corner = rng.integers(1, _CELLS - _PIECE, (count, 2))
    within = (np.arange(_CELLS) >= corner[..., None]) & (np.arange(_CELLS) < corner[..., None] + _PIECE)
    piece = cells[rng.integers(len(cells), size=count)] * (within[:, 0, :, None] & within[:, 1, None, :])
    scale = largest * (0.7 + 0.3 * rng.random(count, np.float32))
    turn = np.float32(6.28) * rng.random(count, np.float32)
    middle = (corner + (_PIECE - 1) / 2).astype(np.float32)
    return Drawings(piece, middle, scale, turn, np.full((count, 2), (_WINDOW - 1) / 2, np.float32))


def _light(shade: Floats, rng: np.random.Generator, size: int) -> Floats:
    """Returns a factor for each pixel, from 1 at the brightest edge to `1 - shade` at the darkest corner."""
    ramp = np.linspace(0, 1, size, dtype=np.float32)
    down, right = np.where(rng.random((2, len(shade), 1)) < 0.5, ramp, ramp[::-1])
    slope = rng.random((len(shade), 1, 1), np.float32)
    factor: Floats = 1 - shade[:, None, None] * (slope * down[:, :, None] + (1 - slope) * right[:, None, :])
    return factor


def _noise(deviation: Floats, rng: np.random.Generator, size: int) -> Floats:
    """Returns noise whose density is a triangle, which needs no function that platforms compute differently."""
    halves = rng.random((2, len(deviation), size, size), np.float32)
    noise: Floats = (halves[0] + halves[1] - 1) * (np.float32(6**0.5) * deviation[:, None, None])
    return noise


def _between(cells: Floats, row: Floats, column: Floats) -> Floats:
    """Returns cells `(n, 8, 8)` at fractional rows and columns `(n, h, w)`, bilinearly; 0 outside."""
    padded = np.pad(cells, ((0, 0), (_BORDER, _BORDER), (_BORDER, _BORDER)))
    width = padded.shape[-1]
    row, column = (np.clip(index + _BORDER, 0, width - 1.01, dtype=np.float32) for index in (row, column))
    top, left = row.astype(np.int32), column.astype(np.int32)
    first = np.arange(len(cells), dtype=np.int32)[:, None, None] * width**2 + top * width + left
    down, right = row - top, column - left
    flat = padded.ravel()
    above = flat[first] + right * (flat[first + 1] - flat[first])
    below = flat[first + width] + right * (flat[first + width + 1] - flat[first + width])
    between: Floats = above + down * (below - above)
    return between


def _sharpened(coverage: Floats) -> Floats:
    """Returns coverage with the blur of the enlargement taken back."""
    sharpened: Floats = np.clip(2 * coverage - 0.4, 0, 1, dtype=np.float32)
    return sharpened


def _boxes(masks: NDArray[np.bool_]) -> Ints:
    """Returns top, left, bottom and right of each mask, the last two exclusive, `(n, 4)`; zeros where it is empty."""
    size = masks.shape[-1]
    rows, columns = np.any(masks, axis=2), np.any(masks, axis=1)
    ends = [rows.argmax(1), columns.argmax(1), size - rows[:, ::-1].argmax(1), size - columns[:, ::-1].argmax(1)]
    return np.where(rows.any(1)[:, None], np.stack(ends, 1), 0).astype(np.int64)
