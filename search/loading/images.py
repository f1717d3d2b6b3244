"""Loads the images of a study's [data] and splits them in four, with a record of the splits."""

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
from search.loading.image_folder import DataSource, Pool
from search.loading.image_store import ArrayReader, FileReader, Preprocessing, StoredImages
from search.loading.inspection import Inspected, inspect_files
from search.loading.splits import PLANS, SPLITS, class_remarks, draw_all, most_needed, stratified
from search.loading.user_code import UserCodeError, call, load

FAULTY = 0.01
"""Share of files that cannot be decoded above which loading fails."""
RECORD = "splits.json"
_IMAGENET_SIZE, _IMAGENET_RESIZE = 224, 256
_NAMED = 5


@dataclass(frozen=True)
class Loaded:
    """Images in four splits.

    Args:
        splits: the four sets.
        record: of how they were split, JSON-ready.
        preprocessing: of the images; None if a factory did it.
        empty: names of classes without images.
    """

    splits: Splits
    record: Mapping[str, Any]
    preprocessing: Preprocessing | None = None
    empty: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Writes the record of which image is in which split, unless it exists."""
        file = folder / RECORD
        if not file.is_file():
            file.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class UnreadData:
    """The images of a study, listed but not read. `open_data` makes one.

    Args:
        section: the study's.
        images: by the part of the data that they are in, or as a factory has split them.
    """

    section: DataSection
    images: DataSource | Loaded

    @property
    def classes(self) -> int:
        """The number of classes."""
        return self.images.splits.classes if isinstance(self.images, Loaded) else len(self.images.classes)

    def read(self, usual: Preprocessing | None, progress: Progress, say: Say) -> Loaded:
        """Returns the images in four splits.

        Args:
            usual: the preprocessing that the network's weights were trained with, or None.
            progress: called with the progress of long steps.
            say: called with remarks for the user on the images.

        Raises:
            SourceError: there are too few images, or too many that cannot be decoded.
        """
        if isinstance(self.images, Loaded):
            loaded, names = self.images, list(map(str, range(self.classes)))
        else:
            pools = _inspected(self.images, self.section, progress, say)
            preprocessing = _preprocessing(self.section, self.images, usual, pools)
            say(f"Input: {preprocessing}.")
            loaded, names = _split(self.section, self.images, pools, preprocessing, say), list(self.images.classes)
        for remark in class_remarks({name: getattr(loaded.splits, name).labels for name in SPLITS}, names):
            say(f"{remark}.")
        return loaded


def open_data(data: DataSection, download: bool, say: Say) -> UnreadData:
    """Returns the images that a study names; only those of a factory are read.

    Args:
        data: the study's section.
        download: whether torchvision may download a missing data set.
        say: called with remarks for the user on the images.

    Raises:
        SourceError: there are no such images.
        UserCodeError: the study's own factory fails, or does not return splits.
    """
    source = data_source(data.source)
    if source.is_factory:
        return UnreadData(data, _from_factory(data))
    try:
        images: DataSource = DATA_SETS[source.kind](source.place, download)
    except OSError as error:
        raise SourceError(f"data lies in a readable folder, got {data.source!r}: {error}") from None
    for remark in images.remarks:
        say(f"{remark}.")
    if data.labels is not None:
        images = images.in_order(_names(data.labels))
    return UnreadData(data, images)


def _names(file: str) -> list[str]:
    """Returns the names in a file, one a line; empty lines are none."""
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise SourceError(
            f"labels are a text file with the name of a class on each line, got {file!r}: {error}"
        ) from None
    return [line.strip() for line in lines if line.strip()]


def _from_factory(data: DataSection) -> Loaded:
    factory = load(data.source)
    splits = call(factory, "a data factory returns evaluators.data.Splits")
    if not isinstance(splits, Splits):
        raise UserCodeError(f"a data factory returns evaluators.data.Splits, got {type(splits).__name__}")
    record = {"source": data.source, "classes": splits.classes}
    return Loaded(splits, record | {name: _entry(getattr(splits, name)) for name in SPLITS})


@dataclass(frozen=True)
class _UsableImages:
    """The images of a pool that can be decoded and are no copies of others, at most as many as are needed."""

    pool: Pool
    indices: NDArray[np.int64]
    digests: list[str]
    sizes: frozenset[tuple[int, int]]
    faulty: tuple[str, ...] = ()


def _inspected(source_images: DataSource, data: DataSection, progress: Progress, say: Say) -> dict[str, _UsableImages]:
    """Returns the usable images of each pool."""
    plan = PLANS[frozenset(source_images.pools)]
    seen: set[str] = set()
    usable = {}
    faults = {}
    traits = Counter[str]()
    inspected_count = 0
    copies = 0
    for part, pool in source_images.pools.items():
        rng = np.random.default_rng(data.seed)
        indices = np.sort(stratified(pool.labels, most_needed(plan[part], _caps(data)), rng))
        inspections = _inspect(pool, indices, progress)
        inspected_count += len(inspections)
        keep, bad = [], []
        for position, inspection in enumerate(inspections):
            if inspection.fault:
                bad.append(str(pool.reader.name(int(indices[position]))))
                faults[bad[-1]] = inspection.fault
            elif inspection.digest in seen:
                copies += 1
            else:
                seen.add(inspection.digest)
                keep.append(position)
                traits.update(inspection.traits)
        good = [inspections[position] for position in keep]
        sizes = frozenset((inspection.width, inspection.height) for inspection in good)
        usable[part] = _UsableImages(pool, indices[keep], [inspection.digest for inspection in good], sizes, tuple(bad))
    _report_faults(faults, inspected_count, say)
    if traits:
        say(f"Converted: {', '.join(f'{count} {_TRAITS[name]}' for name, count in sorted(traits.items()))}.")
    if copies:
        say(f"Left out {copies} images that are copies, byte for byte, of others.")
    return usable


_TRAITS = {
    "grey": "grey",
    "transparent": "transparent, laid on white",
    "CMYK": "CMYK",
    "16-bit": "of 16 bits",
    "turned": "turned upright by their EXIF data",
}


def _caps(data: DataSection) -> dict[str, int]:
    return {name: getattr(data, name) for name in SPLITS}


def _inspect(pool: Pool, indices: NDArray[np.int64], progress: Progress) -> list[Inspected]:
    if isinstance(pool.reader, FileReader):
        return inspect_files([pool.reader.files[index] for index in indices], progress)
    assert isinstance(pool.reader, ArrayReader)
    pixels = pool.reader.pixels
    height, width = pixels.shape[1:3]
    return [Inspected(hashlib.sha256(pixels[index].tobytes()).hexdigest(), "", width, height) for index in indices]


def _report_faults(faults: Mapping[str, str], total: int, say: Say) -> None:
    if not faults:
        return
    shown = "; ".join(f"{name} ({fault})" for name, fault in list(faults.items())[:_NAMED])
    shown += f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
    if len(faults) > max(1, FAULTY * total):
        raise SourceError(
            f"at most {FAULTY:.0%} of the images may be corrupt, got {len(faults)} of {total}: {shown};"
            " repair or remove them"
        )
    say(f"Skipped {len(faults)} of {total} images, which cannot be decoded: {shown}.")


def _preprocessing(
    data: DataSection, source_images: DataSource, usual: Preprocessing | None, pools: Mapping[str, _UsableImages]
) -> Preprocessing:
    """Returns the preprocessing: that of the study, else of the weights, else the usual one."""
    sizes = frozenset[tuple[int, int]]().union(*(sound.sizes for sound in pools.values()))
    base = usual or _usual(source_images, sizes)
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


def _usual(source_images: DataSource, sizes: frozenset[tuple[int, int]]) -> Preprocessing:
    if source_images.size is not None:
        return Preprocessing(
            source_images.size,
            source_images.size,
            source_images.mean,
            source_images.std,
            origin="usual for this data set",
        )
    width, height = next(iter(sizes)) if len(sizes) == 1 else (0, 1)
    if width == height and width <= _IMAGENET_RESIZE:
        return Preprocessing(
            width, width, source_images.mean, source_images.std, origin="the size of all images, ImageNet's values"
        )
    return Preprocessing(
        _IMAGENET_SIZE, _IMAGENET_RESIZE, source_images.mean, source_images.std, origin="usual for ImageNet"
    )


def _split(
    data: DataSection,
    source_images: DataSource,
    pools: Mapping[str, _UsableImages],
    preprocessing: Preprocessing,
    say: Say,
) -> Loaded:
    plan = PLANS[frozenset(source_images.pools)]
    split_images: dict[str, LabelledImages] = {}
    for part, sound in pools.items():
        labels = sound.pool.labels[sound.indices]
        for split, chosen in draw_all(labels, plan[part], _caps(data), data.seed, len(sound.pool.labels)).items():
            digests = [sound.digests[index] for index in chosen]
            images = StoredImages(sound.pool.reader, sound.indices[chosen], digests, preprocessing)
            split_images[split] = LabelledImages(images, labels[chosen])
    small = [name for name in SPLITS if not len(split_images[name])]
    if small:
        raise SourceError(
            f"data is split into {', '.join(SPLITS)}, got no image for {', '.join(small)} out of"
            f" {sum(len(sound.indices) for sound in pools.values())}; give more images"
        )
    counts = ", ".join(f"{len(split_images[name])} {name}" for name in SPLITS)
    say(f"Images: {counts}; {len(source_images.classes)} classes. {_drawn(plan)}")
    splits = Splits(
        split_images["train"],
        split_images["calibration"],
        split_images["validation"],
        split_images["test"],
        len(source_images.classes),
        source_images.names or source_images.classes,
    )
    present = np.unique(np.concatenate([sound.pool.labels for sound in pools.values()]))
    empty = tuple(name for index, name in enumerate(source_images.classes) if index not in present)
    record = {
        "source": data.source,
        "seed": data.seed,
        "classes": source_images.classes,
        "preprocessing": str(preprocessing),
        "corrupt": [name for sound in pools.values() for name in sound.faulty],
        **{name: _entry(split_images[name]) for name in SPLITS},
    }
    return Loaded(splits, record, preprocessing, empty)


def _drawn(plan: Mapping[str, Sequence[Any]]) -> str:
    """Returns a sentence on the origin of the splits."""
    if len(plan) == 1:
        return "All are drawn from one folder: a network that was trained on some of them looks better than it is."
    held_out = next((part for part, draws in plan.items() if {"validation", "test"} <= {d.split for d in draws}), None)
    return f"Validation and test share the {held_out} images between them." if held_out else "As the folders say."


def _entry(part: LabelledImages) -> dict[str, Any]:
    entry: dict[str, Any] = {"images": len(part), "digest": part.digest}
    if isinstance(part.images, StoredImages):
        entry["names"] = part.images.names
    return entry
