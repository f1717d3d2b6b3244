"""Checks that a network can be searched, before anything is trained."""

import itertools
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from search.loading.user_code import UserCodeError, call

_CLOSE = 1e-3
"""Difference, as a share of the largest logit, up to which outputs count as the same."""


def check_network(network: nn.Module, images: NDArray[np.float32], classes: int, empty: Sequence[str]) -> None:
    """Checks that a network maps each image to one finite logit per class, by a path that does not depend on the input.

    Args:
        network: in any mode; it is left in evaluation mode.
        images: two or more.
        classes: of the data.
        empty: names of classes without images.

    Raises:
        UserCodeError: it does not; the message names the user's file and line, the module or the tensor if possible.
    """
    network.eval()
    inputs = torch.from_numpy(images[:2])
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answers = logits_of(network, inputs)
        _check_classes(answers, len(inputs), classes, empty)
        _check_finite(network, inputs, answers)
        _check_again(network, inputs, answers)
        _check_each_alone(network, inputs, answers)
        _check_same(network, inputs, answers, caught)


def check_weights(network: nn.Module) -> None:
    """Checks that no parameter or buffer has a NaN.

    Raises:
        UserCodeError: one has; it is named.
    """
    tensors = [*network.named_parameters(), *network.named_buffers()]
    counts = {name: int(tensor.isnan().sum()) for name, tensor in tensors if not is_lazy(tensor)}
    broken = [name for name, count in counts.items() if count]
    if broken:
        more = f" and {len(broken) - 1} more tensors" if len(broken) > 1 else ""
        raise UserCodeError(
            f"weights are numbers, got {counts[broken[0]]} NaN in {broken[0]!r}{more}; give weights of before the"
            " training failed"
        )


def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """Returns what a network answers.

    Raises:
        UserCodeError: it fails, or that is no tensor.
    """
    shape = " ".join(map(str, images.shape))
    try:
        logits = call(lambda: network(images), f"a network maps images {shape} to logits")
    except UserCodeError as error:
        raise UserCodeError(f"{error}{_colour_hint(network, images.shape[1])}") from error
    if not isinstance(logits, Tensor):
        raise UserCodeError(
            f"a network returns one tensor of logits, got {type(logits).__name__}; return the logits only"
        )
    return logits


def _colour_hint(network: nn.Module, channels: int) -> str:
    """Returns how images get as many channels as the network's first convolution reads; empty if they have them."""
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    reads = first.in_channels if first is not None else channels
    if {reads, channels} != {1, 3}:
        return ""
    values, colours = ("one value", "grey") if reads == 1 else ("three values", "RGB")
    return (
        f"; the network reads images of {reads} channel{'s' if reads > 1 else ''}: mean and std of {values} each under"
        f" [data] make image files {colours}"
    )


def _check_finite(network: nn.Module, images: Tensor, answers: Tensor) -> None:
    """Checks that logits are finite, or says in which module they cease to be."""
    if bool(answers.isfinite().all()):
        return
    broken: list[str] = []

    def note(path: str, module: nn.Module, output: object) -> None:
        if isinstance(output, Tensor) and not bool(output.isfinite().all()):
            broken.append(f"{path!r} ({type(module).__name__})")

    hooks = [
        module.register_forward_hook(lambda module, _args, output, path=path: note(path, module, output))
        for path, module in network.named_modules()
        if path
    ]
    try:
        network(images)
    finally:
        for hook in hooks:
            hook.remove()
    first = f", first from {broken[0]}" if broken else ""
    raise UserCodeError(
        f"a network answers in finite numbers, got {answers[~answers.isfinite()][0]:g}{first}; check its weights, and"
        " that its input is what it was trained with"
    )


def _check_again(network: nn.Module, images: Tensor, answers: Tensor) -> None:
    """Checks that the answer to an image does not depend on chance."""
    if not _close(answers, logits_of(network, images)):
        raise UserCodeError(
            "a network answers the same image alike every time, got two answers; leave chance out in evaluation mode"
        )


def _check_each_alone(network: nn.Module, images: Tensor, answers: Tensor) -> None:
    """Checks that the answer to an image does not depend on the others in its batch."""
    try:
        alone = torch.cat([network(image) for image in images.split(1)])
    except Exception:  # batch statistics of a single value
        alone = torch.full_like(answers, torch.nan)
    if _close(answers, alone):
        return
    raise UserCodeError(
        f"a network answers each image by itself, got answers that differ with the other images of a batch"
        f"{_batch_norm(network)}"
    )


def _batch_norm(network: nn.Module) -> str:
    """Returns which batch normalisation goes by the batch, why, and what to do; empty if none does."""
    for path, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            where = f": {path!r} ({type(module).__name__}) normalises by the batch, because it"
            if module.running_mean is None:
                return f"{where} has no running statistics; train it with track_running_stats=True"
            if module.training:
                return f"{where} stays in training mode; let it go to evaluation mode with the network"
    return ""


def _check_classes(answers: Tensor, count: int, classes: int, empty: Sequence[str]) -> None:
    if tuple(answers.shape) == (count, classes):
        return
    missing = f" (no images of {', '.join(map(repr, empty))}: remove the folder if it is no class)" if empty else ""
    raise UserCodeError(
        f"a network gives {classes} logits an image, one for each class of the data{missing}, got an output of shape"
        f" {tuple(answers.shape)} for {count} images; let its factory take `num_classes`, or bring the matching data"
    )


def _check_same(network: nn.Module, images: Tensor, answers: Tensor, caught: Sequence[warnings.WarningMessage]) -> None:
    """Checks that the path through the network does not depend on the input, because an export freezes it."""
    one = images[:1]
    try:
        traced = torch.jit.trace(network, one, check_trace=False)
        pairs = [(logits_of(network, image), traced(image)) for image in (one, -one, torch.zeros_like(one), 10 * one)]
    except UserCodeError:
        raise
    except Exception:
        return  # the exporter gives a better error
    if not all(itertools.starmap(_close, pairs)):
        raise UserCodeError(
            "a network takes the same way for every image, got one whose forward decides by what it"
            f" sees{_place(caught)}; replace the decision, or move it out of the network"
        )
    if not _runs_alike(traced, images, answers):
        raise UserCodeError(
            "a network takes any number of images, got one whose forward fixes their"
            f" number{_place(caught, but='boolean')}; write x.flatten(1) or x.shape[0], not len(x) or int(x.shape[0])"
        )


def _runs_alike(traced: Callable[[Tensor], Tensor], images: Tensor, answers: Tensor) -> bool:
    """Returns whether a network that was traced with one image answers several as it should."""
    try:
        return _close(traced(images), answers)
    except Exception:  # shapes do not fit
        return False


def _place(caught: Sequence[warnings.WarningMessage], but: str = "") -> str:
    """Returns the file and line of torch's last warning on what a trace fixes, without those that have a word."""
    fixed = [item for item in caught if issubclass(item.category, torch.jit._trace.TracerWarning)]
    named = [item for item in fixed if not but or but not in str(item.message)]
    return f" at {named[-1].filename}:{named[-1].lineno}" if named else ""


def _close(one: Tensor, other: Tensor) -> bool:
    largest = float(one.abs().max()) + 1e-12
    return one.shape == other.shape and bool(torch.allclose(one, other, rtol=0, atol=_CLOSE * largest))
