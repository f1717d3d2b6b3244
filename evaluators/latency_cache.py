"""Latencies that need not be measured again, because weights do not change them.

On a runtime that compiles a network for its device, latency follows from shapes and precisions; building an engine to
learn it anew would take longer than all the rest of a trial.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx


def structure_key(stages: Sequence[bytes], *circumstances: str) -> str:
    """Returns a digest over the graphs, shapes and types of some ONNX files, and not over their weights.

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
                for field in ("raw_data", "float_data", "int32_data"):
                    tensor.ClearField(field)
        content.update(model.SerializeToString(deterministic=True))
    return content.hexdigest()


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
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / f"{key}.{os.getpid()}"
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(self._folder / f"{key}.json")
