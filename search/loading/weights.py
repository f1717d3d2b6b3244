"""Loads weights into a network, with clear errors if they do not match."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from search.config.progress import Say
from search.config.references import SourceError

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


class _WithMetadata(dict[str, Tensor]):
    """A state dict that can have torch's metadata as an attribute."""


def fit(
    network: nn.Module, state: Mapping[str, Tensor], classes: int, origin: str, say: Say = lambda _: None
) -> LoadedWeights:
    """Loads weights in place; a last layer for another number of classes is left as it is.

    A prefix of the keys that the network lacks is taken off: of DataParallel, torch.compile, Lightning or an average.

    Args:
        network: built for the data's classes.
        state: from `read_weights`.
        classes: of the data.
        origin: the weights' name, for messages.
        say: called with what was taken off or left out.

    Returns:
        Whether the last layer still has to be trained.

    Raises:
        SourceError: the weights do not fit; missing, unexpected and differing keys are listed.
    """
    state = _renamed(network, _without_prefix(network, state, origin, say))
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


def _without_prefix(network: nn.Module, state: Mapping[str, Tensor], origin: str, say: Say) -> Mapping[str, Tensor]:
    """Returns the weights without the prefix behind which most of the network's keys are found, if there is one."""
    own = network.state_dict().keys()
    found = Counter(prefix for key in state for prefix, rest in _splits(key) if rest in own)
    prefix, count = found.most_common(1)[0] if found else ("", 0)
    if not prefix or found[""] == count:
        return state
    kept = _WithMetadata({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})
    metadata = getattr(state, "_metadata", {})  # versions of layers, which loading depends on
    inner = {f"{name}.": version for name, version in metadata.items() if f"{name}.".startswith(prefix)}
    kept._metadata = {name.removeprefix(prefix).removesuffix("."): version for name, version in inner.items()}  # type: ignore[attr-defined]
    left = [key for key in state if not key.startswith(prefix)]
    rest = f"; {_shortened(left)} {'is' if len(left) == 1 else 'are'} left out" if left else ""
    say(f"Weights: the keys in {origin} begin with {prefix!r}, which is taken off{rest}.")
    return kept


def _splits(key: str) -> Iterator[tuple[str, str]]:
    """Yields each beginning of a key that ends at a dot, the empty one first, and what follows it."""
    parts = key.split(".")
    for index in range(len(parts)):
        yield "".join(f"{part}." for part in parts[:index]), ".".join(parts[index:])


def _renamed(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
