"""Where an activation is clipped, read from its histogram: one calibrator a file, one line each in the table."""

import importlib
from collections.abc import Mapping
from typing import Protocol

from evaluators.quantization.calibration.histogram import Histogram
from evaluators.quantization.scheme import Scheme
from spaces.errors import UserError

CALIBRATORS: Mapping[str, str] = {
    "minmax": "evaluators.quantization.calibration.minmax:threshold",
    "entropy": "evaluators.quantization.calibration.entropy:threshold",
    "percentile": "evaluators.quantization.calibration.percentile:threshold",
    "mse": "evaluators.quantization.calibration.mse:threshold",
}
"""Every calibrator, by the name that a study gives it; loaded when asked for."""


class CalibratorError(UserError):
    """A calibrator that does not exist."""


class Calibrator(Protocol):
    """Chooses the range of an activation."""

    def __call__(self, histogram: Histogram, scheme: Scheme) -> float:
        """Returns the magnitude that the largest level stands for; larger ones are clipped to it.

        Args:
            histogram: of all the values that the activation took.
            scheme: has the settings of calibrators that need any.
        """
        ...


def calibrator(name: str) -> Calibrator:
    """Returns the calibrator called `name`.

    Raises:
        CalibratorError: there is none.
    """
    if name not in CALIBRATORS:
        raise CalibratorError(f"a calibrator is one of {', '.join(CALIBRATORS)}, got {name!r}; see [quantization]")
    module, _, attribute = CALIBRATORS[name].partition(":")
    found: Calibrator = getattr(importlib.import_module(module), attribute)
    return found
