"""From a study's [data] to four splits, and the record of what went where."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluators.data import LabelledImages, Splits
from search.config.progress import Progress, Say
from search.config.references import SourceError, data_source
from search.config.registries import DATA_SETS
from search.config.study import DataSection
from search.loading.image_folder import Found, Pool
from search.loading.image_store import ArrayReader, FileReader, Preprocessing, StoredImages
from search.loading.inspection import Inspected, inspect_files
from search.loading.splits import PLANS, SPLITS, draw_all, stratified, wanted
from search.loading.user_code import UserCodeError, call, load

FAULTY = 0.01
"""So large a share of files that cannot be decoded means that something is wrong with all of them."""
RECORD = "splits.json"
_IMAGENET_SIZE, _IMAGENET_RESIZE = 224, 256
_NAMED = 5


@dataclass(frozen=True)
class Loaded:
    """Images, split.

    Args:
        splits: the four sets.
        record: how they came about, JSON-ready.
        preprocessing: what was done to them; None where a factory has done it.
        empty: names of classes without images.
    """

    splits: Splits
    record: Mapping[str, Any]
    preprocessing: Preprocessing | None = None
    empty: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Writes the record, once: which image is in which split."""
        file = folder / RECORD
        if not file.is_file():
            file.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")


def load_data(data: DataSection, usual: Preprocessing | None, download: bool, progress: Progress, say: Say) -> Loaded:
    """Returns the images that a study names.

    Args:
        data: the study's section.
        usual: what the network's weights were trained with, where that is known.
        download: whether torchvision may download a data set that is not there.
        progress: told about the steps that take long.
        say: told what the user should know about the images.

    Raises:
        SourceError: there are no such images, or too many that cannot be decoded.
        UserCodeError: the study's own factory fails, or returns something else.
    """
    source = data_source(data.source)
    if source.is_factory:
        return _from_factory(data)
    try:
        found: Found = DATA_SETS[source.kind](source.place, download)
    except OSError as error:
        raise SourceError(f"data lies in a readable folder, got {data.source!r}: {error}") from None
    for remark in found.remarks:
        say(f"{remark}.")
    pools = _inspected(found, data, progress, say)
    preprocessing = _preprocessing(data, found, usual, pools)
    say(f"Input: {preprocessing}.")
    return _split(data, found, pools, preprocessing, say)


def _from_factory(data: DataSection) -> Loaded:
    factory = load(data.source)
    splits = call(factory, "a data factory returns evaluators.data.Splits")
    if not isinstance(splits, Splits):
        raise UserCodeError(f"a data factory returns evaluators.data.Splits, got {type(splits).__name__}")
    record = {"source": data.source, "classes": splits.classes}
    return Loaded(splits, record | {name: _entry(getattr(splits, name)) for name in SPLITS})


@dataclass(frozen=True)
class _Sound:
    """The images of a pool that can be decoded and are no other's copy, at most as many as are wanted."""

    pool: Pool
    indices: NDArray[np.int64]
    digests: list[str]
    sizes: frozenset[tuple[int, int]]
    faulty: tuple[str, ...] = ()


def _inspected(found: Found, data: DataSection, progress: Progress, say: Say) -> dict[str, _Sound]:
    """Returns what is fit for use of each pool."""
    plan = PLANS[frozenset(found.pools)]
    seen: set[str] = set()
    sound = {}
    faults = {}
    traits = Counter[str]()
    looked_at = 0
    copies = 0
    for part, pool in found.pools.items():
        rng = np.random.default_rng(data.seed)
        indices = np.sort(stratified(pool.labels, wanted(plan[part], _caps(data)), rng))
        looks = _look(pool, indices, progress)
        looked_at += len(looks)
        keep, bad = [], []
        for position, look in enumerate(looks):
            if look.fault:
                bad.append(str(pool.reader.name(int(indices[position]))))
                faults[bad[-1]] = look.fault
            elif look.digest in seen:
                copies += 1
            else:
                seen.add(look.digest)
                keep.append(position)
                traits.update(look.traits)
        good = [looks[position] for position in keep]
        sizes = frozenset((look.width, look.height) for look in good)
        sound[part] = _Sound(pool, indices[keep], [look.digest for look in good], sizes, tuple(bad))
    _judge_faults(faults, looked_at, say)
    if traits:
        say(f"Converted: {', '.join(f'{count} {_TRAITS[name]}' for name, count in sorted(traits.items()))}.")
    if copies:
        say(f"Left out {copies} images that are copies, byte for byte, of others.")
    return sound


_TRAITS = {
    "grey": "grey",
    "transparent": "transparent, laid on white",
    "CMYK": "CMYK",
    "16-bit": "of 16 bits",
    "turned": "turned upright by their EXIF data",
}


def _caps(data: DataSection) -> dict[str, int]:
    return {name: getattr(data, name) for name in SPLITS}


def _look(pool: Pool, indices: NDArray[np.int64], progress: Progress) -> list[Inspected]:
    if isinstance(pool.reader, FileReader):
        return inspect_files([pool.reader.files[index] for index in indices], progress)
    assert isinstance(pool.reader, ArrayReader)
    pixels = pool.reader.pixels
    height, width = pixels.shape[1:3]
    return [Inspected(hashlib.sha256(pixels[index].tobytes()).hexdigest(), "", width, height) for index in indices]


def _judge_faults(faults: Mapping[str, str], looked_at: int, say: Say) -> None:
    if not faults:
        return
    shown = "; ".join(f"{name} ({fault})" for name, fault in list(faults.items())[:_NAMED])
    shown += f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
    if len(faults) > max(1, FAULTY * looked_at):
        raise SourceError(
            f"at most {FAULTY:.0%} of the images may be corrupt, got {len(faults)} of {looked_at}: {shown};"
            " repair or remove them"
        )
    say(f"Skipped {len(faults)} of {looked_at} images, which cannot be decoded: {shown}.")


def _preprocessing(
    data: DataSection, found: Found, usual: Preprocessing | None, pools: Mapping[str, _Sound]
) -> Preprocessing:
    """Returns how images become input: as the study says, else as the weights want it, else as is usual."""
    sizes = frozenset[tuple[int, int]]().union(*(sound.sizes for sound in pools.values()))
    base = usual or _usual(found, sizes)
    mean, std = data.mean or base.mean, data.std or base.std
    if data.mean and not data.std and len(data.mean) != len(base.std):
        std = (1.0,) * len(mean)
    if len(mean) != len(std) or len(mean) not in (1, 3):
        raise SourceError(
            f"[data] mean and std have one value for grey or three for RGB, got {len(mean)} and {len(std)};"
            " give both alike"
        )
    size = data.size or base.size
    resize = data.resize or (size if data.size else base.resize)
    if resize < size:
        raise SourceError(f"[data] resize is at least size, {size}, got {resize}; leave it out for {size}")
    given = [name for name in ("size", "resize", "mean", "std") if getattr(data, name) is not None]
    origin = f"{', '.join(given)} from [data], else {base.origin}" if given else base.origin
    return Preprocessing(size, resize, mean, std, base.interpolation, origin)


def _usual(found: Found, sizes: frozenset[tuple[int, int]]) -> Preprocessing:
    if found.size is not None:
        return Preprocessing(found.size, found.size, found.mean, found.std, origin="usual for this data set")
    width, height = next(iter(sizes)) if len(sizes) == 1 else (0, 1)
    if width == height and width <= _IMAGENET_RESIZE:
        return Preprocessing(width, width, found.mean, found.std, origin="the size of all images, ImageNet's values")
    return Preprocessing(_IMAGENET_SIZE, _IMAGENET_RESIZE, found.mean, found.std, origin="usual for ImageNet")


def _split(
    data: DataSection, found: Found, pools: Mapping[str, _Sound], preprocessing: Preprocessing, say: Say
) -> Loaded:
    plan = PLANS[frozenset(found.pools)]
    made: dict[str, LabelledImages] = {}
    for part, sound in pools.items():
        labels = sound.pool.labels[sound.indices]
        for split, chosen in draw_all(labels, plan[part], _caps(data), data.seed, len(sound.pool.labels)).items():
            digests = [sound.digests[index] for index in chosen]
            images = StoredImages(sound.pool.reader, sound.indices[chosen], digests, preprocessing)
            made[split] = LabelledImages(images, labels[chosen])
    small = [name for name in SPLITS if not len(made[name])]
    if small:
        raise SourceError(
            f"data is split into {', '.join(SPLITS)}, got no image for {', '.join(small)} out of"
            f" {sum(len(sound.indices) for sound in pools.values())}; give more images"
        )
    counts = ", ".join(f"{len(made[name])} {name}" for name in SPLITS)
    say(f"Images: {counts}; {len(found.classes)} classes. {_drawn(plan)}")
    splits = Splits(made["train"], made["calibration"], made["validation"], made["test"], len(found.classes))
    present = np.unique(np.concatenate([sound.pool.labels for sound in pools.values()]))
    empty = tuple(name for index, name in enumerate(found.classes) if index not in present)
    record = {
        "source": data.source,
        "seed": data.seed,
        "classes": found.classes,
        "preprocessing": str(preprocessing),
        "corrupt": [name for sound in pools.values() for name in sound.faulty],
        **{name: _entry(made[name]) for name in SPLITS},
    }
    return Loaded(splits, record, preprocessing, empty)


def _drawn(plan: Mapping[str, Sequence[Any]]) -> str:
    """Returns a sentence on what the splits were drawn from."""
    if len(plan) == 1:
        return "All are drawn from one folder: a network that was trained on some of them looks better than it is."
    held_out = next((part for part, draws in plan.items() if {"validation", "test"} <= {d.split for d in draws}), None)
    return f"Validation and test share the {held_out} images between them." if held_out else "As the folders say."


def _entry(part: LabelledImages) -> dict[str, Any]:
    entry: dict[str, Any] = {"images": len(part), "digest": part.digest}
    if isinstance(part.images, StoredImages):
        entry["names"] = part.images.names
    return entry
