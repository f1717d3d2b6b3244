"""Calibrators, which choose the range of an activation from its histogram: a file and a table line each."""

from typing import TYPE_CHECKING

from spaces.registry import Registry

if TYPE_CHECKING:
    from evaluators.quantization.calibration.base import Calibrator

CALIBRATORS: "Registry[Calibrator]" = Registry(
    "a calibrator",
    {
        "minmax": "evaluators.quantization.calibration.minmax:threshold",
        "entropy": "evaluators.quantization.calibration.entropy:threshold",
        "percentile": "evaluators.quantization.calibration.percentile:threshold",
        "mse": "evaluators.quantization.calibration.mse:threshold",
    },
)
"""Every calibrator, by the name that `[quantization] calibrator` gives it."""
