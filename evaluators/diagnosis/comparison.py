"""Two versions of one network, run side by side on the same images and compared tensor by tensor."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from evaluators.data import LabelledImages
from evaluators.diagnosis.taps import FileError, Tap, find_taps, watched
from evaluators.diagnosis.tensor_errors import Figures, TensorComparison
from evaluators.graph.exporter import OUTPUT
from evaluators.runtimes.base import Images, Runtime, TensorReader

_PIXELS = 200_000
"""So many pixels of each channel are compared at a time: all tensors of a batch are in memory at once."""
_MOST_IMAGES = 64


@dataclass(frozen=True)
class Side:
    """One of the versions that are compared.

    Args:
        name: what it is called in front of users.
        runtime: what runs it.
        stages: its files, as the runtime wants them.
    """

    name: str
    runtime: Runtime
    stages: tuple[bytes, ...]


@dataclass(frozen=True)
class Answered:
    """What both versions said to the images, no exit taken.

    Args:
        images: how many.
        classes: how many there are to choose from.
        before: right answers of the reference.
        right: right answers of the version.
        same: images to which both gave the same class.
        only: the class that the version gave to every image; None where it gave several.
    """

    images: int
    classes: int
    before: int
    right: int
    same: int
    only: int | None


@dataclass(frozen=True)
class Compared:
    """A version beside its reference.

    Args:
        layers: the figures of each tensor that both have, in the order in which they are computed.
        unmatched: the watched tensors that the version lacks, or has in another shape.
        answered: what both said.
    """

    layers: tuple[Figures, ...]
    unmatched: tuple[str, ...]
    answered: Answered


def compare(
    reference: Side,
    version: Side,
    float_stages: Sequence[bytes],
    data: LabelledImages,
    classes: int,
    progress: Callable[[int, int], None],
) -> Compared:
    """Returns how the tensors of two versions differ.

    Args:
        reference: what is right.
        version: what is examined.
        float_stages: portable float files with the tensors' names; they tell what is worth watching.
        data: images and their labels.
        classes: how many there are.
        progress: told how many of how many images are done.

    Raises:
        FileError: the version cannot be run on these images.
    """
    taps = [find_taps(stage) for stage in float_stages]
    pair = _Pair(reference, version, taps)
    logits: list[tuple[Images, Images]] = []
    batch = max(min(_PIXELS // int(np.prod(data.images.shape[2:])), _MOST_IMAGES), 1)
    for start in range(0, len(data), batch):
        progress(start, len(data))
        logits.append(pair.compare(data.images[start : start + batch]))
    progress(len(data), len(data))
    before, found = (np.concatenate(side) for side in zip(*logits, strict=True))
    return Compared(pair.figures(), pair.unmatched(), _answered(before, found, data.labels, classes))


class _Pair:
    """Both versions, and what their tensors have come to so far.

    Args:
        reference: what is right.
        version: what is examined.
        taps: what is watched in each stage.
    """

    def __init__(self, reference: Side, version: Side, taps: Sequence[Sequence[Tap]]) -> None:
        tensors = [[tap.tensor for tap in some] for some in taps]
        self._version = version
        self._exact, self._other = _Watched(reference, tensors), _Watched(version, tensors)
        self._taps = [tap for some in taps for tap in some]
        self._comparisons = {tap.tensor: TensorComparison(tap.axis) for tap in self._taps}
        self._unmatched: set[str] = set()

    def compare(self, images: Images) -> tuple[Images, Images]:
        """Returns both logits for one batch, whose tensors are taken in."""
        ours, theirs = self._exact(images), self._other(images)
        for tensor, comparison in self._comparisons.items():
            if tensor in theirs and theirs[tensor].shape == ours[tensor].shape:
                comparison.add(ours[tensor], theirs[tensor])
            else:
                self._unmatched.add(tensor)
        return ours[OUTPUT], _logits(theirs, ours[OUTPUT].shape, self._version)

    def figures(self) -> tuple[Figures, ...]:
        """Returns the figures of each tensor that both have."""
        taps = [tap for tap in self._taps if tap.tensor not in self._unmatched]
        ratios = {tap.tensor: self._comparisons[tap.tensor].sqnr_db for tap in taps}

        def input_db(tap: Tap) -> float:
            return min((ratios.get(name, np.inf) for name in tap.sources), default=np.inf)

        return tuple(self._comparisons[tap.tensor].figures(tap.name, input_db(tap)) for tap in taps)

    def unmatched(self) -> tuple[str, ...]:
        """Returns the names of the tensors that the version lacks, or has in another shape."""
        return tuple(tap.name for tap in self._taps if tap.tensor in self._unmatched)


class _Watched:
    """A version whose tensors are seen under the names that the float files give them.

    Args:
        side: the version.
        tensors: to look at in each stage.
    """

    def __init__(self, side: Side, tensors: Sequence[Sequence[str]]) -> None:
        self._side = side
        self._stages = [self._stage(file, names) for file, names in zip(side.stages, tensors, strict=True)]

    def _stage(self, file: bytes, tensors: Sequence[str]) -> tuple[TensorReader, Mapping[str, str], str]:
        model, names = watched(file, tensors)
        first = onnx.load_from_string(file).graph.output[0].name
        try:
            return self._side.runtime.tensors(model), names, first
        except Exception as error:
            raise self._refusal(error) from error

    def __call__(self, images: Images) -> dict[str, Images]:
        """Returns every watched tensor that the version has; all images go through all of its stages."""
        found: dict[str, Images] = {}
        for watch, names, first in self._stages:
            try:
                outputs = watch(images)
            except Exception as error:
                raise self._refusal(error) from error
            found |= {tensor: outputs[name] for tensor, name in names.items()}
            images = outputs[first]
        return found

    def _refusal(self, error: Exception) -> FileError:
        reason = " ".join(str(error).split())[:300]
        return FileError(f"{self._side.runtime.name} runs what is compared, got {self._side.name}: {reason}")


def _logits(found: Mapping[str, Images], shape: tuple[int, ...], version: Side) -> Images:
    if OUTPUT not in found or found[OUTPUT].shape != shape:
        got = found[OUTPUT].shape if OUTPUT in found else "none"
        raise FileError(f"a version answers with logits {shape}, got {got} from {version.name}; is it of this network?")
    return found[OUTPUT]


def _answered(before: Images, found: Images, labels: NDArray[np.int64], classes: int) -> Answered:
    ours, theirs = before.argmax(axis=1), found.argmax(axis=1)
    given = set(map(int, theirs))
    return Answered(
        images=len(labels),
        classes=classes,
        before=int((ours == labels).sum()),
        right=int((theirs == labels).sum()),
        same=int((ours == theirs).sum()),
        only=given.pop() if len(given) == 1 and len(labels) > 1 else None,
    )
