"""A cache of timings by the structure of a network, because its weights do not change its latency.

On a runtime that compiles a network for its device, latency follows from shapes and precisions; building an engine to
measure it again would take longer than the rest of a trial.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from spaces import cache


def structure_key(stages: Sequence[bytes], *circumstances: str) -> str:
    """Returns a digest of the graphs, shapes, types and 2:4 sparsity of ONNX files, but not of their weights.

    Args:
        stages: the files.
        circumstances: everything else that affects the latency: runtime, device, batch size, protocol.
    """
    content = hashlib.sha256("\0".join(circumstances).encode())
    for stage in stages:
        model = onnx.load_from_string(stage)
        for tensor in model.graph.initializer:
            # Integer values are shapes and axes, which belong to the structure.
            if tensor.data_type != onnx.TensorProto.INT64:
                content.update(b"2:4" if is_two_in_four(numpy_helper.to_array(tensor)) else b"dense")
                for field in ("raw_data", "float_data", "int32_data"):
                    tensor.ClearField(field)
        content.update(model.SerializeToString(deterministic=True))
    return content.hexdigest()


def is_two_in_four(weight: NDArray[np.generic]) -> bool:
    """Returns whether at most two of each four weights along the input channels, axis 1, are nonzero."""
    if weight.ndim < 2 or weight.shape[1] % 4:
        return False
    fours = np.moveaxis(weight, 1, -1).reshape(-1, 4)
    return bool((np.count_nonzero(fours, axis=1) <= 2).all())


class LatencyCache:
    """A folder of measured ratios, one small file each.

    Args:
        folder: created with the first entry.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, key: str) -> dict[str, Any] | None:
        """Returns the entry of `key`; None if there is none or it cannot be read."""
        try:
            entry: dict[str, Any] = json.loads((self._folder / f"{key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return entry

    def keep(self, key: str, content: dict[str, Any]) -> None:
        """Writes a JSON-ready entry under `key`, atomically."""
        cache.write_atomically(self._folder / f"{key}.json", json.dumps(content))
