"""Checks that a network can be searched, before anything is trained."""

import itertools
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from search.loading.user_code import UserCodeError, call

_CLOSE = 1e-3
"""Difference, as a share of the largest logit, up to which outputs count as the same."""


def check_network(network: nn.Module, images: NDArray[np.float32], classes: int, empty: Sequence[str]) -> None:
    """Checks that a network maps images to one logit per class, by a path that does not depend on the input.

    Args:
        network: in any mode; it is left in evaluation mode.
        images: two or more.
        classes: of the data.
        empty: names of classes without images.

    Raises:
        UserCodeError: it does not; the message names the user's file and line if possible.
    """
    network.eval()
    inputs = torch.from_numpy(images[:2])
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answers = logits_of(network, inputs)
        _check_classes(answers, len(inputs), classes, empty)
        _check_same(network, inputs, answers, caught)


def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """Returns what a network answers.

    Raises:
        UserCodeError: it fails, or that is no tensor.
    """
    shape = " ".join(map(str, images.shape))
    logits = call(lambda: network(images), f"a network maps images {shape} to logits")
    if not isinstance(logits, Tensor):
        raise UserCodeError(
            f"a network returns one tensor of logits, got {type(logits).__name__}; return the logits only"
        )
    return logits


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
    try:
        traced = torch.jit.trace(network, images[:1], check_trace=False)
        inputs = [images, -images, torch.zeros_like(images), 10 * images]
        pairs = [(logits_of(network, batch), traced(batch)) for batch in inputs]
    except UserCodeError:
        raise
    except Exception:
        return  # the exporter gives a better error
    again = logits_of(network, images)
    if not _close(answers, again):
        raise UserCodeError(
            "a network answers the same image alike every time, got two answers; leave chance out in evaluation mode"
        )
    if all(itertools.starmap(_close, pairs)):
        return
    branches = [item for item in caught if issubclass(item.category, torch.jit._trace.TracerWarning)]
    place = f" at {branches[-1].filename}:{branches[-1].lineno}" if branches else ""
    raise UserCodeError(
        f"a network takes the same way for every image, got one whose forward decides by what it sees{place};"
        " replace the decision, or move it out of the network"
    )


def _close(one: Tensor, other: Tensor) -> bool:
    largest = float(one.abs().max().nan_to_num()) + 1e-12
    return bool(torch.allclose(one, other, rtol=0, atol=_CLOSE * largest, equal_nan=True))
