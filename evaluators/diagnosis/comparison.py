"""Two versions of one network, run side by side on the same images and compared tensor by tensor."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from evaluators.data import LabelledImages
from evaluators.diagnosis.taps import FileError, Tap, find_taps, with_taps
from evaluators.diagnosis.tensor_errors import TensorComparison, TensorErrors
from evaluators.graph.exporter import OUTPUT
from evaluators.runtimes.base import Images, Runtime, TensorReader

_PIXELS = 200_000
"""The largest number of pixels per channel in a batch, because all tensors of a batch are in memory."""
_MAX_BATCH = 64


@dataclass(frozen=True)
class Side:
    """One of the two versions that are compared.

    Args:
        name: its name for users.
        runtime: the library that runs it.
        stages: its deployed files.
    """

    name: str
    runtime: Runtime
    stages: tuple[bytes, ...]


@dataclass(frozen=True)
class Answered:
    """The predictions of both versions without exits, as counts.

    Args:
        images: the number of images.
        classes: the number of classes.
        before: the number of right predictions of the reference.
        right: the number of right predictions of the version.
        same: the number of images for which both predict the same class.
        only: the class that the version predicts for all images; None if it predicts several.
    """

    images: int
    classes: int
    before: int
    right: int
    same: int
    only: int | None


@dataclass(frozen=True)
class Compared:
    """The comparison of a version with its reference.

    Args:
        layers: the error statistics of each tensor that both have, in the order in which they are computed.
        unmatched: the tapped tensors that the version lacks, or has in another shape.
        answered: the predictions of both.
    """

    layers: tuple[TensorErrors, ...]
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
        reference: the correct version.
        version: the version to examine.
        float_stages: portable float files, which define the taps.
        data: images and their labels.
        classes: the number of classes.
        progress: called with the number of images that are done and of all images.

    Raises:
        FileError: the version cannot be run on these images.
    """
    taps = [find_taps(stage) for stage in float_stages]
    pair = _Pair(reference, version, taps)
    logits: list[tuple[Images, Images]] = []
    batch = max(min(_PIXELS // int(np.prod(data.images.shape[2:])), _MAX_BATCH), 1)
    for start in range(0, len(data), batch):
        progress(start, len(data))
        logits.append(pair.compare(data.images[start : start + batch]))
    progress(len(data), len(data))
    expected, actual = (np.concatenate(side) for side in zip(*logits, strict=True))
    return Compared(pair.errors(), pair.unmatched(), _answered(expected, actual, data.labels, classes))


class _Pair:
    """Both versions, and the error statistics of their tensors so far.

    Args:
        reference: the correct version.
        version: the version to examine.
        taps: the taps of each stage.
    """

    def __init__(self, reference: Side, version: Side, taps: Sequence[Sequence[Tap]]) -> None:
        tensors = [[tap.tensor for tap in stage_taps] for stage_taps in taps]
        self._version = version
        self._exact, self._other = _TappedNetwork(reference, tensors), _TappedNetwork(version, tensors)
        self._taps = [tap for stage_taps in taps for tap in stage_taps]
        self._comparisons = {tap.tensor: TensorComparison(tap.axis) for tap in self._taps}
        self._unmatched: set[str] = set()

    def compare(self, images: Images) -> tuple[Images, Images]:
        """Returns the logits of both for one batch, and adds its tensors to the statistics."""
        ours, theirs = self._exact(images), self._other(images)
        for tensor, comparison in self._comparisons.items():
            if tensor in theirs and theirs[tensor].shape == ours[tensor].shape:
                comparison.add(ours[tensor], theirs[tensor])
            else:
                self._unmatched.add(tensor)
        return ours[OUTPUT], _logits(theirs, ours[OUTPUT].shape, self._version)

    def errors(self) -> tuple[TensorErrors, ...]:
        """Returns the error statistics of each tensor that both have."""
        taps = [tap for tap in self._taps if tap.tensor not in self._unmatched]
        ratios = {tap.tensor: self._comparisons[tap.tensor].sqnr_db for tap in taps}

        def input_db(tap: Tap) -> float:
            return min((ratios.get(name, np.inf) for name in tap.sources), default=np.inf)

        return tuple(self._comparisons[tap.tensor].errors(tap.name, input_db(tap)) for tap in taps)

    def unmatched(self) -> tuple[str, ...]:
        """Returns the names of the tensors that the version lacks, or has in another shape."""
        return tuple(tap.name for tap in self._taps if tap.tensor in self._unmatched)


class _TappedNetwork:
    """A version whose tensors are returned under their names in the float files.

    Args:
        side: the version.
        tensors: the tapped tensors of each stage.
    """

    def __init__(self, side: Side, tensors: Sequence[Sequence[str]]) -> None:
        self._side = side
        self._stages = [self._stage(file, names) for file, names in zip(side.stages, tensors, strict=True)]

    def _stage(self, file: bytes, tensors: Sequence[str]) -> tuple[TensorReader, Mapping[str, str], str]:
        model, names = with_taps(file, tensors)
        first = onnx.load_from_string(file).graph.output[0].name
        try:
            return self._side.runtime.tensors(model), names, first
        except Exception as error:
            raise self._refusal(error) from error

    def __call__(self, images: Images) -> dict[str, Images]:
        """Returns every tapped tensor that the version has; all images are run through all of its stages."""
        tensors: dict[str, Images] = {}
        for read_tensors, names, first in self._stages:
            try:
                outputs = read_tensors(images)
            except Exception as error:
                raise self._refusal(error) from error
            tensors |= {tensor: outputs[name] for tensor, name in names.items()}
            images = outputs[first]
        return tensors

    def _refusal(self, error: Exception) -> FileError:
        reason = " ".join(str(error).split())[:300]
        return FileError(f"{self._side.runtime.name} runs what is compared, got {self._side.name}: {reason}")


def _logits(tensors: Mapping[str, Images], shape: tuple[int, ...], version: Side) -> Images:
    if OUTPUT not in tensors or tensors[OUTPUT].shape != shape:
        got = tensors[OUTPUT].shape if OUTPUT in tensors else "none"
        raise FileError(f"a version answers with logits {shape}, got {got} from {version.name}; is it of this network?")
    return tensors[OUTPUT]


def _answered(expected: Images, actual: Images, labels: NDArray[np.int64], classes: int) -> Answered:
    ours, theirs = expected.argmax(axis=1), actual.argmax(axis=1)
    predicted = set(map(int, theirs))
    return Answered(
        images=len(labels),
        classes=classes,
        before=int((ours == labels).sum()),
        right=int((theirs == labels).sum()),
        same=int((ours == theirs).sum()),
        only=predicted.pop() if len(predicted) == 1 and len(labels) > 1 else None,
    )
