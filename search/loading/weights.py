"""Loads weights from a file into a network, with clear errors if they do not match."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from search.config.references import SourceError

_NESTS = ("state_dict", "model", "model_state_dict", "net", "network", "ema", "model_ema")
"""Keys that training scripts store the state dict under."""
_PREFIXES = ("module.", "_orig_mod.")
"""Prefixes of keys by DataParallel and torch.compile."""
_SHOWN = 4
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\.\w+)$")


@dataclass(frozen=True)
class LoadedWeights:
    """How weights matched a network.

    Args:
        renewed: path of the last layer if it was not loaded, because the number of classes differs; else empty.
        had: number of classes of the weights if it differs, else 0.
    """

    renewed: str = ""
    had: int = 0


def read_weights(file: Path) -> dict[str, Tensor]:
    """Returns the state dict in a file that `torch.save` wrote; nothing in it is executed.

    Prefixes by DataParallel and torch.compile, and dicts around the state dict, are removed.

    Raises:
        SourceError: there is none, or more than tensors in it.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SourceError(f"weights are an existing file, got {str(file)!r}; check its path") from None
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceError(
            f"weights are a state dict that torch.save wrote, got {str(file)!r} ({reason[:200]});"
            " save it with torch.save(network.state_dict(), FILE)"
        ) from None
    return _plain(_unnested(content, file))


def _unnested(content: Any, file: Path) -> Mapping[str, Tensor]:
    for _ in range(3):
        if isinstance(content, Mapping) and content and all(isinstance(value, Tensor) for value in content.values()):
            return content
        inner = [content[key] for key in _NESTS if key in content] if isinstance(content, Mapping) else []
        if not inner:
            break
        content = inner[0]
    has = ", ".join(map(str, list(content)[:_SHOWN])) if isinstance(content, Mapping) else type(content).__name__
    raise SourceError(
        f"weights are a state dict, perhaps under one of {', '.join(_NESTS)}, got {str(file)!r} with"
        f" {has or 'nothing'};"
        " save it with torch.save(network.state_dict(), FILE)"
    )


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = _WithMetadata(state)
    metadata = {**getattr(state, "_metadata", {})}  # versions of layers, which loading depends on
    for prefix in _PREFIXES * 2:
        if all(key.startswith(prefix) for key in plain):
            plain = _WithMetadata({key.removeprefix(prefix): value for key, value in plain.items()})
            metadata = {key.removeprefix(prefix).removeprefix(prefix[:-1]): value for key, value in metadata.items()}
    if metadata:
        plain._metadata = metadata  # type: ignore[attr-defined]
    return plain


class _WithMetadata(dict[str, Tensor]):
    """A state dict that can have torch's metadata as an attribute."""


def fit(network: nn.Module, state: dict[str, Tensor], classes: int, origin: str) -> LoadedWeights:
    """Loads weights in place; a last layer for another number of classes is left as it is.

    Args:
        network: built for the data's classes.
        state: from `read_weights`.
        classes: of the data.
        origin: the weights' name, for messages.

    Returns:
        Whether the last layer still has to be trained.

    Raises:
        SourceError: the weights do not fit; missing, unexpected and differing keys are listed.
    """
    state = _renamed(network, state)
    own = network.state_dict()
    conflicts = [key for key, value in state.items() if key in own and own[key].shape != value.shape]
    last = last_layer(network, classes)
    renewed = bool(conflicts) and all(key.rpartition(".")[0] == last for key in conflicts)
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    if missing or unexpected or (conflicts and not renewed):
        shapes = [f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}" for key in conflicts]
        lists = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        differences = "; ".join(f"{len(keys)} {what}: {_shortened(keys)}" for what, keys in lists.items() if keys)
        raise SourceError(
            f"weights have the network's {len(own)} keys, got {origin} with {differences};"
            " build the network that they were saved from"
        )
    had = int(state[conflicts[0]].shape[0]) if renewed else 0
    kept = _WithMetadata({key: value for key, value in state.items() if key not in conflicts})
    if hasattr(state, "_metadata"):
        kept._metadata = state._metadata  # type: ignore[attr-defined]
    network.load_state_dict(kept, strict=False)
    return LoadedWeights(last if renewed else "", had)


def last_layer(network: nn.Module, classes: int) -> str:
    """Returns the path of the last layer that gives one output per class; empty where there is none."""
    last = ""
    for path, module in network.named_modules():
        outputs = getattr(module, "out_features", getattr(module, "out_channels", None))
        if isinstance(module, nn.Linear | nn.Conv2d) and outputs == classes:
            last = path
    return last


def _renamed(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights under today's names: torchvision's old DenseNets, and heads that only training uses."""
    own = network.state_dict().keys()
    renamed = _WithMetadata()
    for key, value in state.items():
        match = _OLD_DENSENET.match(key)
        name = "".join(match.groups()) if match and key not in own else key
        if name in own or not name.startswith(("aux1.", "aux2.", "AuxLogits.")):
            renamed[name] = value
    if hasattr(state, "_metadata"):
        renamed._metadata = state._metadata  # type: ignore[attr-defined]
    return renamed


def _shortened(keys: Sequence[str]) -> str:
    shown = ", ".join(keys[:_SHOWN])
    return shown if len(keys) <= _SHOWN else f"{shown} and {len(keys) - _SHOWN} more"
