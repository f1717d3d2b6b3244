"""The machine and the library versions of a measurement."""

import os
import platform
from importlib import metadata

from evaluators.runtimes.device_state import DeviceState

_PACKAGES = (
    "torch",
    "onnxruntime",
    "openvino",
    "onnx",
    "optuna",
    "fvcore",
    "torch-pruning",
    "mlflow",
    "numpy",
    "deployfront",
)


def environment(device: str, state: DeviceState | None = None) -> dict[str, str]:
    """Returns what is needed to reproduce a measurement, by name.

    Args:
        device: that the runtime uses.
        state: of that device, which may be a board.
    """
    versions = {name: package_version(name) for name in _PACKAGES}
    return {
        "device": device,
        **{f"device's {name}": str(value) for name, value in (state.known() if state else {}).items()},
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version for name, version in versions.items() if version},
    }


def package_version(package: str) -> str:
    """Returns the version of a package; empty if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
