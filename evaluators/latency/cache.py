"""Latencies that need not be measured again, because weights do not change them.

On a runtime that compiles a network for its device, latency follows from shapes and precisions; building an engine to
learn it anew would take longer than all the rest of a trial.
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
    """Returns a digest over the graphs, shapes, types and 2:4 sparsity of some ONNX files, and not over their weights.

    Args:
        stages: the files.
        circumstances: whatever else decides the latency: runtime, device, batch size, what it was timed beside.
    """
    content = hashlib.sha256("\0".join(circumstances).encode())
    for stage in stages:
        model = onnx.load_from_string(stage)
        for tensor in model.graph.initializer:
            # Values of small integers are shapes and axes; they belong to the structure.
            if tensor.data_type != onnx.TensorProto.INT64:
                content.update(b"2:4" if is_two_in_four(numpy_helper.to_array(tensor)) else b"dense")
                for field in ("raw_data", "float_data", "int32_data"):
                    tensor.ClearField(field)
        content.update(model.SerializeToString(deterministic=True))
    return content.hexdigest()


def is_two_in_four(weight: NDArray[np.generic]) -> bool:
    """Returns whether at most two in each four weights along the input channels, axis 1, are not zero."""
    if weight.ndim < 2 or weight.shape[1] % 4:
        return False
    fours = np.moveaxis(weight, 1, -1).reshape(-1, 4)
    return bool((np.count_nonzero(fours, axis=1) <= 2).all())


class LatencyCache:
    """A folder of measured ratios, one small file each.

    Args:
        folder: made when the first one is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, key: str) -> dict[str, Any] | None:
        """Returns what was kept under `key`; None where nothing was, or what is there cannot be read."""
        try:
            found: dict[str, Any] = json.loads((self._folder / f"{key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found

    def keep(self, key: str, content: dict[str, Any]) -> None:
        """Keeps something JSON-ready under `key`, whole or not at all."""
        cache.write_atomically(self._folder / f"{key}.json", json.dumps(content))
