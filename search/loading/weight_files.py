"""Reads weights from a file, as torch or safetensors wrote them; says what the file is if there are none in it."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from search.config.progress import Say
from search.config.references import SourceError

_NESTS = ("state_dict", "model", "model_state_dict", "net", "network", "ema", "model_ema", "state_dict_ema")
"""Keys that training scripts store the state dict under; of several in a file, the first in this order is taken."""
_SAVE = "save it with torch.save(network.state_dict(), FILE)"
_OTHER_FILES: Mapping[bytes, tuple[str, str]] = {
    b"version https://git-lfs": ("a pointer of git-lfs in place of the file", "fetch the file with: git lfs pull"),
    b"<!doctype html": ("an HTML page", "download the file itself"),
    b"<html": ("an HTML page", "download the file itself"),
    b"\x89hdf": ("an HDF5 file, as Keras writes them", _SAVE),
}
"""What a file is that begins so, in lower case, and what to do."""
_DEPTH = 3
_SHOWN = 4


def read_weights(file: Path, say: Say = lambda _: None) -> Mapping[str, Tensor]:
    """Returns the state dict in a file that `torch.save` or safetensors wrote; nothing in it is executed.

    Dicts around the state dict are removed.

    Args:
        file: the weights.
        say: called with which state dict is taken, if there are several.

    Raises:
        SourceError: there is none, or more than tensors in it.
    """
    if not file.is_file():
        raise SourceError(f"weights are an existing file, got {str(file)!r}; check its path")
    try:
        content = _content(file)
    except Exception as error:
        what, remedy = _described(file, error)
        raise SourceError(
            f"weights are a state dict that torch.save or safetensors wrote, got {str(file)!r}, {what}; {remedy}"
        ) from None
    return _unnested(content, file, say)


def _content(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return load_file(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on what the error names
        return torch.load(file, map_location="cpu", weights_only=True)


def _described(file: Path, error: Exception) -> tuple[str, str]:
    """Returns what a file is that could not be read, and what to do."""
    if isinstance(error, PermissionError):
        return "which may not be read", "check its permissions"
    begin = _beginning(file).lower()
    if not begin:
        return "an empty file", "check how it was written"
    for other, described in _OTHER_FILES.items():
        if begin.startswith(other):
            return described
    if found := re.search(r"GLOBAL (\S+) was not an allowed global", str(error)):
        return f"with an object of {found[1]}, which only its code can load", f"load it where it was made, and {_SAVE}"
    if "TorchScript" in str(error):
        return "a TorchScript archive", f"load it with torch.jit.load, and {_SAVE}"
    if begin.startswith(b"pk") or file.suffix == ".safetensors" or "EOF" in str(error):
        return "a file that is damaged or not whole", "copy or download it again"
    return "a file of another kind", _SAVE


def _beginning(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(64).lstrip()


def _unnested(content: Any, file: Path, say: Say) -> Mapping[str, Tensor]:
    for _ in range(_DEPTH):
        if isinstance(content, Mapping) and content and all(isinstance(value, Tensor) for value in content.values()):
            return content
        entries = content if isinstance(content, Mapping) else {}
        nests = [key for key in _NESTS if isinstance(entries.get(key), Mapping)]
        if not nests:
            break
        if others := nests[1:]:
            say(f"Weights: {file.name} has {nests[0]!r} and {' and '.join(map(repr, others))}; {nests[0]!r} is taken.")
        content = entries[nests[0]]
    has = ", ".join(map(str, list(content)[:_SHOWN])) if isinstance(content, Mapping) else type(content).__name__
    raise SourceError(
        f"weights are a state dict, perhaps under one of {', '.join(_NESTS)}, got {str(file)!r} with"
        f" {has or 'nothing'}; {_SAVE}"
    )
