"""Makes of a factory's network one that can be cut, copied and trained: in Python, its weights its own and unfrozen."""

import copy
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from search.config.progress import Say
from search.loading.network_checks import logits_of
from search.loading.user_code import UserCodeError, call

_SHOWN = 3


def unwrapped(network: nn.Module) -> nn.Module:
    """Returns a network without the wrappers of torch.compile and DataParallel.

    Raises:
        UserCodeError: it is, or has, a TorchScript module, which has no Python code and takes no hooks.
    """
    while isinstance(network, nn.DataParallel) or hasattr(network, "_orig_mod"):
        network = network.get_submodule("module" if isinstance(network, nn.DataParallel) else "_orig_mod")
    for path, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            place = f" at {path!r}" if path else ""
            raise UserCodeError(
                f"a network is made of modules in Python, got a TorchScript module{place}; return the network that was"
                " scripted or traced, and load its weights into it"
            )
    return network


def with_shapes(network: nn.Module, images: NDArray[np.float32]) -> None:
    """Runs a network once, in evaluation mode, so that lazy layers and those that a first forward makes have weights.

    Raises:
        UserCodeError: it does not run, or has no evaluation mode.
    """
    call(network.eval, "a network has an evaluation mode")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again where the network is checked
        logits_of(network, torch.from_numpy(images))


def trainable(network: nn.Module, say: Say) -> nn.Module:
    """Returns a copy of a network, in evaluation mode, whose weights are parameters, all of which are trained.

    Weights that are computed from others (by weight norm, spectral norm, masks of torch's pruning or any other
    parametrization) become parameters with the values that they have. Frozen ones are trained like the others.

    Args:
        network: with its weights loaded; what torch's older functions compute becomes a parameter here, too.
        say: called with what was changed.

    Raises:
        UserCodeError: it cannot be copied.
    """
    computed = [name for path, module in network.named_modules() for name in _without_hooks(path, module.eval())]
    copied = call(lambda: copy.deepcopy(network), "a network can be copied")
    weights = [weight for weight in copied.parameters() if weight.is_floating_point()]
    frozen = sum(not weight.requires_grad for weight in weights)
    for weight in weights:
        weight.requires_grad_(True)
    computed += [name for path, module in copied.named_modules() for name in _unparametrized(path, module)]
    if computed:
        say(f"Weights that are computed from others are taken as they are, and trained as such: {_listed(computed)}.")
    if frozen:
        say(
            f"{frozen} of the network's {len(weights)} parameters are frozen (requires_grad is False): they are trained"
            " like any other, in a copy."
        )
    return copied


def _unparametrized(path: str, module: nn.Module) -> list[str]:
    """Makes parameters of a module's parametrized tensors, in place; returns their names."""
    if not parametrize.is_parametrized(module):
        return []
    names = [name for name, _ in module.get_submodule("parametrizations").named_children()]
    for name in names:
        parametrize.remove_parametrizations(module, name)
    return _named(path, names)


def _without_hooks(path: str, module: nn.Module) -> list[str]:
    """Makes parameters of what torch's older functions compute before every forward, in place; returns their names."""
    names = []
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # that function is deprecated, too
                remove_weight_norm(module, hook.name)
            names.append(hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
            names.append(hook.name)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
            names.append(hook._tensor_name)
    return _named(path, names)


def _named(path: str, names: Sequence[str]) -> list[str]:
    return [f"{path}.{name}".lstrip(".") for name in names]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
