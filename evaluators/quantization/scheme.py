"""How int8 is made from float: where ranges come from, how weights are rounded, and what is corrected."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Scheme:
    """The ways of quantization that a study names; the same for every candidate of a search.

    Args:
        calibrator: reads the range of an activation from its histogram.
        percentile: of an activation's magnitudes that stay inside, where the calibrator is `percentile`.
        weights: whether each output channel of a weight has a scale of its own.
        ranges: of activations, from the calibration images or from what batch normalisation says about them.
        equalize: whether the ranges of channels are evened out between layers, which leaves the function as it is.
        bias_correction: where the mean input of a layer comes from, whose rounding error its bias makes up for.
        rounding: of weights, to the nearest step or to the one that keeps a layer's answers on calibration images.
        rounding_steps: of learning for each layer.
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
"""What a study gets that says nothing: the extremes of the calibration images, a scale per output channel."""
