"""The settings of int8 quantization: ranges, rounding of weights, and corrections."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Scheme:
    """The quantization settings of a study; the same for every candidate of a search.

    Args:
        calibrator: chooses the range of an activation from its histogram.
        percentile: the percentage of an activation's magnitudes within its range; for the calibrator `percentile`.
        weights: the granularity of the scales of weights.
        ranges: whether activation ranges come from calibration images or from batch normalisation's parameters.
        equalize: whether cross-layer equalization is applied, which does not change the network's function.
        bias_correction: the source of layers' mean inputs for bias correction.
        rounding: whether weights are rounded to the nearest level or by AdaRound.
        rounding_steps: the number of AdaRound's optimization steps for each layer.
    """

    calibrator: str = "minmax"
    percentile: float = 99.99
    weights: Literal["per-channel", "per-tensor"] = "per-channel"
    ranges: Literal["data", "batchnorm"] = "data"
    equalize: bool = False
    bias_correction: Literal["none", "batchnorm", "data"] = "none"
    rounding: Literal["nearest", "adaround"] = "nearest"
    rounding_steps: int = 500


MINMAX = Scheme()
"""The default: min-max ranges of the calibration images, and one scale per output channel."""
