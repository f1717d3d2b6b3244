"""Builds the network of a study's [model] and loads its weights."""

import difflib
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.parameter import is_lazy

from search.config.progress import Say
from search.config.references import Source, SourceError, model_source
from search.config.study import ModelSection, TrainingSection
from search.loading.image_store import Preprocessing
from search.loading.network_checks import check_weights
from search.loading.plain_network import train_as_deployed, trainable, unwrapped, with_shapes
from search.loading.user_code import UserCodeError, call, load, source_of
from search.loading.weight_files import read_weights
from search.loading.weights import LoadedWeights, fit

NO_WEIGHTS = "none"
"""After the @ of a torchvision model: no weights."""
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
}
"""Arguments of models with heads that are only used in training."""
_TRANSFORMING = ("googlenet", "inception_v3")
"""Models that renormalize their input for their pretrained weights."""
_CLASSES = ("classes", "num_classes")
NEW_LAYER = TrainingSection(epochs=3, batch=32, learning_rate=0.01)
"""Training of a network with a new last layer, unless the study has [training]."""


@dataclass(frozen=True)
class BuiltModel:
    """A network as loaded, before any training.

    Args:
        network: with its weights.
        key: hash of its source and weights, hexadecimal.
        fitted: the record of the loaded weights: whether the last layer is new.
        has_weights: whether weights were loaded from a file.
    """

    network: nn.Module
    key: str
    fitted: LoadedWeights
    has_weights: bool

    def training(self, section: TrainingSection | None) -> TrainingSection | None:
        """Returns the training: that of the study, else `NEW_LAYER` if its last layer is new, else None."""
        return section or (NEW_LAYER if self.fitted.renewed else None)


def usual_preprocessing(model: ModelSection, is_folder: bool) -> Preprocessing | None:
    """Returns the preprocessing that the network's weights were trained with; None if unknown.

    Args:
        model: the study's section.
        is_folder: whether images are files of any size; then the architecture's usual preprocessing is the default for
            the user's own weights.
    """
    source = model_source(model.source)
    if source.is_factory:
        return None
    weights = _torchvision_weights(model, source)
    if weights is None and not is_folder:
        return None
    preset, origin = weights, f"as {weights} was trained" if weights is not None else ""
    if preset is None:
        preset, origin = _default_weights(source), f"usual for {source.short}"
    if preset is None:
        return None
    transforms = preset.transforms()
    return Preprocessing(
        transforms.crop_size[0],
        transforms.resize_size[0],
        tuple(transforms.mean),
        tuple(transforms.std),
        transforms.interpolation.name,
        origin,
    )


def find_weights(model: ModelSection, download: bool, say: Say) -> Path | None:
    """Returns the file with the network's weights; None without weights.

    Args:
        model: the study's section.
        download: whether torchvision may download missing weights.
        say: called with the weights that are used.

    Raises:
        SourceError: there is no such model, or its weights are missing.
    """
    source = model_source(model.source)
    if not source.is_factory:
        weights = _torchvision_weights(model, source)
        if weights is not None:
            return _hub_file(weights, model.source, download, say)
    if model.weights is not None and not Path(model.weights).is_file():
        raise SourceError(f"weights are an existing file, got {model.weights!r}; check its path")
    return Path(model.weights) if model.weights is not None else None


def build_model(
    model: ModelSection,
    file: Path | None,
    classes: int,
    seed: int,
    images: Callable[[], NDArray[np.float32]],
    say: Say = lambda _: None,
) -> BuiltModel:
    """Returns the network that a study names, for this number of classes if its source supports it.

    Args:
        model: the study's section.
        file: its weights, as `find_weights` found them.
        classes: of the data.
        seed: of weights that are not loaded.
        images: returns two or more; called once the weights are known to fit, or for layers that have no shape before.
        say: called with remarks for the user on the weights, and what was changed so that the network can be trained.

    Raises:
        SourceError: there is no such model, or its weights do not match.
        UserCodeError: the study's own factory fails, or does not return a network.
    """
    torch.manual_seed(seed)
    source = model_source(model.source)
    if source.is_factory:
        network, text = _from_factory(model.source, classes), source_of(load(model.source))
    else:
        network, text = _from_torchvision(model, source, classes), str(source)
    network = unwrapped(network)
    weights = list(network.parameters())
    if not weights or any(map(is_lazy, weights)):
        with_shapes(network, images())  # its first forward makes its weights
    fitted, digest = LoadedWeights(), ""
    if file is not None:
        fitted = fit(network, read_weights(file, say), classes, file.name, say)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    check_weights(network)
    with_shapes(network, images())  # others may make layers in it, too
    network = trainable(network, say)
    train_as_deployed(network, images(), say)
    key = hashlib.sha256("\0".join((text, repr(network), digest, _digest(network))).encode()).hexdigest()
    return BuiltModel(network, key, fitted, file is not None)


def _digest(network: nn.Module) -> str:
    """Returns a hash over all parameters and buffers: a factory may have loaded them from a file that nobody named."""
    content = hashlib.sha256()
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        content.update(name.encode())
        content.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def _from_factory(reference: str, classes: int) -> nn.Module:
    factory = load(reference)
    parameters = [name for name in _CLASSES if name in _parameters(factory)]
    network = call(lambda: factory(**dict.fromkeys(parameters, classes)), "a model factory returns a network")
    if not isinstance(network, nn.Module):
        raise UserCodeError(f"a model factory returns a torch.nn.Module, got {type(network).__name__}")
    return network


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def _from_torchvision(model: ModelSection, source: Source, classes: int) -> nn.Module:
    from torchvision.models import get_model

    arguments = dict(_ARGUMENTS.get(source.short, {}))
    if source.short in _TRANSFORMING and _torchvision_weights(model, source) is not None:
        arguments["transform_input"] = True
    _check_name(source)
    network: nn.Module = get_model(source.short, weights=None, num_classes=classes, **arguments)
    return network


def _check_name(source: Source) -> None:
    import torchvision
    from torchvision.models import list_models

    names = list_models(module=torchvision.models)
    if source.short not in names:
        near = " or ".join(map(repr, difflib.get_close_matches(source.short, names, 3)))
        remedy = f"did you mean {near}?" if near else "see torchvision.models.list_models()"
        raise SourceError(f"a torchvision model is one that classifies images, got {source.short!r}; {remedy}")


def _torchvision_weights(model: ModelSection, source: Source) -> Any:
    """Returns the member of torchvision's enumeration of weights; None if the study gives a file or no weights."""
    from torchvision.models import get_model_weights

    _check_name(source)
    name = source.place.partition("@")[2]
    if name.lower() == NO_WEIGHTS or (model.weights is not None and not name):
        return None
    if model.weights is not None:
        raise SourceError(
            f"a network has one set of weights, got {model.source!r} and the file {model.weights!r}; leave one out"
        )
    if not name:
        return _default_weights(source)
    weights = get_model_weights(source.short)
    if name not in weights.__members__:
        choices = ", ".join(["DEFAULT", *(item.name for item in weights), NO_WEIGHTS])
        raise SourceError(f"weights of {source.short} are one of {choices}, got {name!r}; change what stands behind @")
    return weights[name]


def _default_weights(source: Source) -> Any:
    from torchvision.models import get_model_weights

    _check_name(source)
    return getattr(get_model_weights(source.short), "DEFAULT", None)


def _hub_file(weights: Any, source: str, download: bool, say: Say) -> Path:
    """Returns the file of torchvision's weights in torch hub's cache, downloaded if needed and allowed."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(weights.url).path).name
    if file.is_file():
        say(f"Weights: {weights}.")
        return file
    if not download:
        raise SourceError(
            f"weights {weights} of {source!r} lie in torch hub's cache, got no {file};"
            " add --download to fetch them, give your own with --weights FILE, or begin untrained with @none"
        )
    say(f"Downloading {weights} from {weights.url}...")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(weights.url, str(file), _hash(file), progress=False)
    except Exception as error:
        raise SourceError(
            f"weights {weights} are downloaded from {weights.url}, got {error}; check the connection, or put the file"
            f" into {file.parent}"
        ) from None
    return file


def _hash(file: Path) -> str | None:
    """Returns the beginning of the SHA-256 that torchvision puts at the end of a file's name."""
    _, _, digits = file.stem.rpartition("-")
    return digits or None
