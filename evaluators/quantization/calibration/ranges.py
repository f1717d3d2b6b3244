"""The ranges of a network's activations over calibration images, chosen by a calibrator."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evaluators.quantization.calibration import CALIBRATORS
from evaluators.quantization.calibration.histogram import Histogram
from evaluators.quantization.scheme import Scheme
from evaluators.runtimes.onnxruntime_cpu import activation_ranges, activations
from spaces.errors import QuantizationError


def calibrated_ranges(
    model: bytes, tensors: Sequence[str], images: NDArray[np.float32], scheme: Scheme
) -> dict[str, tuple[float, float]]:
    """Returns the lowest and highest unclipped value of each of a float model's tensors, 0 included.

    Args:
        model: an ONNX file.
        tensors: the names of activations.
        images: the calibration images, `(n, c, h, w)`.
        scheme: names the calibrator.

    Raises:
        UnknownNameError: there is no such calibrator.
        QuantizationError: an activation is not finite.
    """
    threshold = CALIBRATORS[scheme.calibrator]
    if scheme.calibrator == "minmax":  # needs no histogram: the graph computes the extremes
        return activation_ranges(model, tensors, images)
    by_tensor = histograms(model, tensors, images)
    return {name: histogram.clipped(threshold(histogram, scheme)) for name, histogram in by_tensor.items()}


def histograms(model: bytes, tensors: Sequence[str], images: NDArray[np.float32]) -> dict[str, Histogram]:
    """Returns the histogram of each of a float model's tensors over `images`, read in one pass.

    Raises:
        QuantizationError: an activation is not finite.
    """
    by_tensor: dict[str, Histogram] = {}
    for batch in activations(model, tensors, images):
        for name, values in batch.items():
            histogram = _histogram(name, values)
            by_tensor[name] = by_tensor[name] + histogram if name in by_tensor else histogram
    return by_tensor


def _histogram(name: str, values: NDArray[np.float32]) -> Histogram:
    try:
        return Histogram.of(values)
    except ValueError as error:
        raise QuantizationError(
            f"{error} in activation {name!r} on the calibration images; check the weights and [data] mean and std"
        ) from None
