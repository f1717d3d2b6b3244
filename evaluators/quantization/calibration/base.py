"""What a calibrator is given, and what it returns."""

from typing import Protocol

from evaluators.quantization.calibration.histogram import Histogram
from evaluators.quantization.scheme import Scheme


class Calibrator(Protocol):
    """Chooses the range of an activation."""

    def __call__(self, histogram: Histogram, scheme: Scheme) -> float:
        """Returns the magnitude that the largest level stands for; larger ones are clipped to it.

        Args:
            histogram: of all the values that the activation took.
            scheme: has the settings of calibrators that need any.
        """
        ...
