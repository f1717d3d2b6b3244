"""The protocol of calibrators."""

from typing import Protocol

from evaluators.quantization.calibration.histogram import Histogram
from evaluators.quantization.scheme import Scheme


class Calibrator(Protocol):
    '''Chooses the range of an activation: a function, named by a line of `CALIBRATORS`.

    Example:
        """A multiple of the root mean square."""

        import numpy as np

        from evaluators.quantization.calibration.histogram import Histogram
        from evaluators.quantization.scheme import Scheme

        _MULTIPLE = 6


        def threshold(histogram: Histogram, _scheme: Scheme, /) -> float:
            """Returns six root mean squares of the activation, or the largest magnitude where that is less."""
            middles = (np.arange(len(histogram.counts)) + 0.5) * histogram.width
            rms = float(np.sqrt(np.average(middles**2, weights=histogram.counts)))
            return min(_MULTIPLE * rms, histogram.largest)
    '''

    def __call__(self, histogram: Histogram, scheme: Scheme, /) -> float:
        """Returns the magnitude of the largest level; larger magnitudes are clipped to it.

        Args:
            histogram: of the activation's values over the calibration images.
            scheme: the settings of calibrators, if they have any.
        """
        ...
