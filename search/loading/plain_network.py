"""Makes of a factory's network one that can be cut, copied and trained: in Python, its weights its own and unfrozen."""

import copy
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
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


def train_as_deployed(network: nn.Module, images: NDArray[np.float32], say: Say) -> None:
    """Makes a network do in training what it does when deployed, in place, where it does otherwise.

    Auxiliary outputs and layers that run in training only are left out: nothing of them is deployed, so nothing of them
    is cut with the rest. Then each module that holds others runs as in evaluation; normalisation and dropout do not.

    Args:
        network: in evaluation mode.
        images: two or more.
        say: called with what is left out.
    """
    difference = _in_training_only(network, torch.from_numpy(images))
    if not difference:
        return
    for module in network.modules():
        if any(True for _ in module.children()):
            module.register_forward_pre_hook(_evaluate)
    say(f"In training mode the network {difference}: versions are trained as they are deployed, without that.")


def _evaluate(module: nn.Module, _inputs: object) -> None:
    module.training = False  # of itself alone: its parts keep their mode


def _in_training_only(network: nn.Module, images: Tensor) -> str:
    """Returns what a network does in training mode that it does not in evaluation mode; empty for nothing."""
    copied = copy.deepcopy(network)  # running statistics change
    with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, deployed = _observed(copied, images)
        try:
            found, trained = _observed(copied.train(), images)
        except Exception as error:
            return f"fails ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    if more := [path for path in trained if path not in deployed]:
        return f"runs more ({_listed(more)})"
    if isinstance(found, Tensor) and isinstance(expected, Tensor) and found.shape == expected.shape:
        return ""
    return f"answers with a {type(found).__name__} of another form"


def _observed(network: nn.Module, images: Tensor) -> tuple[object, list[str]]:
    """Returns a network's answer, and the paths of the modules that ran for it."""
    ran: dict[str, None] = {}
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, _out, path=path: ran.update({path: None}))
        for path, module in network.named_modules()
    ]
    answer: object = network(images)
    for hook in hooks:
        hook.remove()
    return answer, list(ran)


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
