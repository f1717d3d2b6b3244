"""From a study's [model] to a network with weights."""

import difflib
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from search.config.progress import Say
from search.config.references import Source, SourceError, model_source
from search.config.study import ModelSection, TrainingSection
from search.loading.image_store import Preprocessing
from search.loading.user_code import UserCodeError, call, load, source_of
from search.loading.weights import Fitted, fit, read_weights

NO_WEIGHTS = "none"
"""After the @ of a torchvision model: it begins untrained."""
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
}
"""Of models with heads that only training uses."""
_TRANSFORMING = ("googlenet", "inception_v3")
"""Their pretrained weights want input normalised another way, which the models do themselves."""
_CLASSES = ("classes", "num_classes")
NEW_LAYER = TrainingSection(epochs=3, batch=32, learning_rate=0.01)
"""How a network with a new last layer is trained where the study does not say."""


@dataclass(frozen=True)
class Built:
    """A network, before it is trained or taken as it is.

    Args:
        network: with its weights.
        key: hexadecimal digits over what it was built from.
        fitted: whether its last layer is new.
        has_weights: whether it begins with weights from a file.
    """

    network: nn.Module
    key: str
    fitted: Fitted
    has_weights: bool

    def training(self, asked: TrainingSection | None) -> TrainingSection | None:
        """Returns how the network is trained: as asked, briefly where its last layer is new, else not at all."""
        return asked or (NEW_LAYER if self.fitted.renewed else None)


def usual_preprocessing(model: ModelSection, is_folder: bool) -> Preprocessing | None:
    """Returns how images become input as the network's own weights were trained; None where nobody knows.

    Args:
        model: the study's section.
        is_folder: whether images come as files of any size: then an architecture's usual size stands in for weights
            of the user's own.
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
    made = preset.transforms()
    return Preprocessing(
        made.crop_size[0], made.resize_size[0], tuple(made.mean), tuple(made.std), made.interpolation.name, origin
    )


def find_weights(model: ModelSection, download: bool, say: Say) -> Path | None:
    """Returns the file that the network's weights are in; None where it begins without.

    Args:
        model: the study's section.
        download: whether torchvision may download weights that are not there.
        say: told which weights were taken.

    Raises:
        SourceError: there is no such model, or its weights are not there.
    """
    source = model_source(model.source)
    if not source.is_factory:
        weights = _torchvision_weights(model, source)
        if weights is not None:
            return _hub_file(weights, model.source, download, say)
    if model.weights is not None and not Path(model.weights).is_file():
        raise SourceError(f"weights are an existing file, got {model.weights!r}; check its path")
    return Path(model.weights) if model.weights is not None else None


def build_model(model: ModelSection, file: Path | None, classes: int, seed: int) -> Built:
    """Returns the network that a study names, for this number of classes where its source allows.

    Args:
        model: the study's section.
        file: its weights, as `find_weights` found them.
        classes: of the data.
        seed: of the weights that are not read from anywhere.

    Raises:
        SourceError: there is no such model, or its weights do not fit.
        UserCodeError: the study's own factory fails, or returns something else.
    """
    torch.manual_seed(seed)
    source = model_source(model.source)
    if source.is_factory:
        network, text = _from_factory(model.source, classes), source_of(load(model.source))
    else:
        network, text = _from_torchvision(model, source, classes), str(source)
    fitted, digest = Fitted(), ""
    if file is not None:
        fitted = fit(network, read_weights(file), classes, file.name)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    key = hashlib.sha256("\0".join((text, repr(network), digest)).encode()).hexdigest()
    return Built(network, key, fitted, file is not None)


def _from_factory(reference: str, classes: int) -> nn.Module:
    factory = load(reference)
    wanted = [name for name in _CLASSES if name in _parameters(factory)]
    made = call(lambda: factory(**dict.fromkeys(wanted, classes)), "a model factory returns a network")
    if not isinstance(made, nn.Module):
        raise UserCodeError(f"a model factory returns a torch.nn.Module, got {type(made).__name__}")
    return made


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
    """Returns the member of torchvision's enumeration that a model asks for; None where it brings a file or none."""
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
    there = get_model_weights(source.short)
    if name not in there.__members__:
        choices = ", ".join(["DEFAULT", *(item.name for item in there), NO_WEIGHTS])
        raise SourceError(f"weights of {source.short} are one of {choices}, got {name!r}; change what stands behind @")
    return there[name]


def _default_weights(source: Source) -> Any:
    from torchvision.models import get_model_weights

    _check_name(source)
    return getattr(get_model_weights(source.short), "DEFAULT", None)


def _hub_file(weights: Any, source: str, download: bool, say: Say) -> Path:
    """Returns the file of torchvision's weights in torch hub's cache, downloaded if need be and allowed."""
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
