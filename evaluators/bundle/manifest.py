"""What a bundle says of itself in its `bundle.json`; a bundle brings this file, which needs no package at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

FILE = "bundle.json"
FORMAT = 1

Record = TypeVar("Record")


@dataclass(frozen=True)
class DeploymentTarget:
    """The target that a bundle was made for: the fields of `evaluators.runtimes.base.Target`, which is not shipped."""

    runtime: str = "onnxruntime"
    device: str = ""
    batch: int = 1
    threads: int = 1
    fp32_in: str = "fp32"


@dataclass(frozen=True)
class Frames:
    """Which frames of a stream are computed: the fields of `evaluators.inference.frame_reuse.Reuse`.

    Args:
        threshold: the difference from the last key frame from which a frame is computed; at 0 all are.
        max_age: the maximum number of frames from one key frame to the next.
    """

    threshold: float = 0.0
    max_age: int = 1


@dataclass(frozen=True)
class DenseReference:
    """The dense network that the bundle's latency is relative to.

    Args:
        file: its ONNX file, which need not be shipped.
        precision: of its layers.
        seconds: of work per batch, at the begin of the search.
    """

    file: str
    precision: str
    seconds: float


@dataclass(frozen=True)
class Check:
    """What the bundle said to its own check images.

    Args:
        images: number of check images.
        correct: number of correct answers when the bundle was made.
    """

    images: int
    correct: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `bundle.json`. Its keys in JSON are these names, in this order.

    Args:
        format: version of this format.
        study: the name of the study.
        search: the name of the search.
        trial: the number of the trial, or the name of a simple version, such as `int8`.
        target: that it was made for.
        library: name and version of the library that ran it, on this machine or a board; empty if unknown.
        deployed: its ONNX files, in the order in which they are run.
        extras: files of one runtime only, such as engines.
        exits: the names of its exits, without the end.
        thresholds: the confidence from which an input leaves, for each exit.
        confidence: measure of confidence that thresholds are compared with.
        preprocessing: of pictures; None if the data was preprocessed already.
        blocks: the blocks that inputs may skip.
        steps: the order in which files are run if blocks may be skipped, as in `staged.to_json`; else empty.
        image_shape: of one input, `(c, h, w)`.
        input_size: height and width that inputs are resized to before the first file; None for their own.
        classes: number of classes.
        class_names: of the classes, in their order; empty where they have none.
        frames: which frames of a stream are computed; None for independent inputs.
        reference: the network that its latency is relative to; None if latency was measured without one.
        leaving: the share of the images that each exit and the end answered when its latency was confirmed.
        check: its accuracy on the check images.
    """

    format: int = FORMAT
    study: str = ""
    search: str = ""
    trial: int | str = 0
    target: DeploymentTarget
    library: str = ""
    deployed: tuple[str, ...]
    extras: tuple[str, ...] = ()
    exits: tuple[str, ...] = ()
    thresholds: tuple[float, ...] = ()
    confidence: str = "softmax"
    preprocessing: Mapping[str, Any] | None = None
    blocks: tuple[str, ...] = ()
    steps: tuple[Any, ...] = ()
    image_shape: tuple[int, ...] = ()
    input_size: int | None = None
    classes: int = 0
    class_names: tuple[str, ...] = ()
    frames: Frames | None = None
    reference: DenseReference | None = None
    leaving: tuple[float, ...] = ()
    check: Check = Check(0, 0)

    @property
    def library_name(self) -> str:
        """The name of what the bundle was measured with, such as `onnxruntime`; empty if not told."""
        return self.library.partition(" ")[0]

    @property
    def ends(self) -> tuple[str, ...]:
        """The names of the exits, and `end`."""
        return (*self.exits, "end")

    @property
    def plan(self) -> tuple[Any, ...]:
        """How the files are run, as `staged.from_json` reads it: steps, or a threshold for each exit."""
        return self.steps or self.thresholds

    def class_name(self, label: int) -> str:
        """Returns the name of a class; its number where it has none."""
        return self.class_names[label] if self.class_names else str(label)

    def portable_files(self, folder: Path) -> list[Path]:
        """Returns the files in the form that every runtime reads, in the order in which they are run."""
        portable = [folder / "portable" / name for name in self.deployed]
        return [file if file.is_file() else folder / file.name for file in portable]

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy; `frames`, `input_size` and `class_names` are keys only where there are some."""
        content = asdict(self)
        if self.input_size is None:
            del content["input_size"]
        if self.frames is None:
            del content["frames"]
        if not self.class_names:
            del content["class_names"]
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Manifest:
        """Returns the manifest that `to_dict` described, now or before: a key that it lacks has its default.

        Raises:
            ValueError: it does not tell the files, or for which target they are.
        """
        found: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in content.items()
        }
        for key, kind in (
            ("target", DeploymentTarget),
            ("frames", Frames),
            ("reference", DenseReference),
            ("check", Check),
        ):
            if found.get(key) is not None:
                found[key] = _record(kind, found[key])
        return _record(cls, found)

    def write(self, folder: Path) -> None:
        """Writes it into a bundle."""
        (folder / FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Returns the manifest of a bundle.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not what `pick` wrote.
        """
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {FILE} has all that `pick` wrote, got a {type(content).__name__}; pick again")
        return cls.from_dict(content)


def _record(kind: type[Record], content: Mapping[str, Any]) -> Record:
    """Returns a dataclass of what is in `content`; keys that it does not know are a later version's."""
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    try:
        return kind(**{key: value for key, value in content.items() if key in known})
    except (AttributeError, TypeError) as error:  # it is no object, or lacks a key
        raise ValueError(f"a {FILE} has all that `pick` wrote, got another ({error}); pick again") from error
