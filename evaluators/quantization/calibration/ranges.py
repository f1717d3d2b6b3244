"""The ranges of a network's activations over its calibration images, as a calibrator reads them."""

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
    """Returns the lowest and highest value of each of a float model's tensors that is not clipped, 0 included.

    Args:
        model: an ONNX file.
        tensors: activations of it.
        images: that they are seen on, `(n, c, h, w)`.
        scheme: names the calibrator.

    Raises:
        UnknownNameError: there is no such calibrator.
        QuantizationError: an activation is not finite.
    """
    threshold = CALIBRATORS[scheme.calibrator]
    if scheme.calibrator == "minmax":  # asks for no histogram, only for what the graph can tell by itself
        return activation_ranges(model, tensors, images)
    found = histograms(model, tensors, images)
    return {name: histogram.clipped(threshold(histogram, scheme)) for name, histogram in found.items()}


def histograms(model: bytes, tensors: Sequence[str], images: NDArray[np.float32]) -> dict[str, Histogram]:
    """Returns the histogram of each of a float model's tensors over `images`, read in one pass.

    Raises:
        QuantizationError: an activation is not finite.
    """
    found: dict[str, Histogram] = {}
    for batch in activations(model, tensors, images):
        for name, values in batch.items():
            histogram = _histogram(name, values)
            found[name] = found[name] + histogram if name in found else histogram
    return found


def _histogram(name: str, values: NDArray[np.float32]) -> Histogram:
    try:
        return Histogram.of(values)
    except ValueError as error:
        raise QuantizationError(
            f"{error} in activation {name!r} on the calibration images; check the weights and [data] mean and std"
        ) from None
