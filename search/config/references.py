"""Parses the sources of networks and images in studies; imports nothing heavy, because the command line uses it."""

import re
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from search.config.registries import DATA_SETS
from spaces.errors import UserError

TORCHVISION = "torchvision"
_TELLS_NOTHING = re.compile(r"((build|create|get|load|make|main)_?)?(model|models|net|network|data|dataset|splits)?")
"""Names of files and functions that say nothing about the network or the images."""
_FACTORY = "package.module:function or path/file.py:function"
_MODELS = f"a model is torchvision:NAME[@WEIGHTS], {_FACTORY}"
_DATA = f"data is {', '.join(f'{kind}:PATH' for kind in DATA_SETS)}, {_FACTORY}"


class SourceError(UserError):
    """A source of a network or of images is wrong or missing."""


@dataclass(frozen=True)
class Source:
    """A parsed source, such as `imagefolder:/data/flowers` or `mine/model.py:build`.

    Args:
        kind: `torchvision` or one of `DATA_SETS`; `module` and `file` for a factory.
        place: the text after the kind, or the module or file of a factory.
        attribute: name of the factory; else empty.
    """

    kind: str
    place: str
    attribute: str = ""

    @property
    def is_factory(self) -> bool:
        """Whether it is a user's function."""
        return self.kind in ("module", "file")

    @property
    def short(self) -> str:
        """A short name, for names of searches: of a factory its file and function, as far as they tell something."""
        if self.is_factory:
            file = Path(self.place).stem if self.kind == "file" else self.place.rpartition(".")[2]
            telling = [word for word in (file, self.attribute) if not _TELLS_NOTHING.fullmatch(word.lower())]
            return "-".join(dict.fromkeys(telling)) or file
        return self.place.partition("@")[0] if self.kind == TORCHVISION else Path(self.place).name or self.kind

    @property
    def short_before(self) -> str:
        """The short name of earlier versions: of a factory its function alone."""
        return self.attribute or self.short

    def __str__(self) -> str:
        return f"{self.place}:{self.attribute}" if self.is_factory else f"{self.kind}:{self.place}"


def model_source(text: str) -> Source:
    """Returns the source of a network.

    Raises:
        SourceError: the text is none.
    """
    return _parse(text, (TORCHVISION,), _MODELS)


def data_source(text: str) -> Source:
    """Returns the source of images.

    Raises:
        SourceError: the text is none.
    """
    return _parse(text, DATA_SETS, _DATA)


def factory_source(text: str) -> Source:
    """Returns the reference to a function.

    Raises:
        SourceError: the text is none.
    """
    return _parse(text, (), f"a function is {_FACTORY}")


def _parse(text: str, kinds: Container[str], rule: str) -> Source:
    kind, _, place = text.partition(":")
    if kind in kinds and place:
        return Source(kind, place)
    place, _, attribute = text.rpartition(":")
    form: Literal["file", "module"] = "file" if place.endswith(".py") else "module"
    named = form == "file" or all(part.isidentifier() for part in place.split("."))
    if kind in kinds or not named or not attribute.isidentifier():
        raise SourceError(f"{rule}, got {text!r}")
    return Source(form, place, attribute)


def absolute(source: Source, folder: Path) -> str:
    """Returns the source as text with an absolute path, if it has a path.

    Args:
        source: with any path.
        folder: that relative paths refer to.
    """
    if source.kind in (TORCHVISION, "module"):
        return str(source)
    return str(Source(source.kind, absolute_path(source.place, folder), source.attribute))


def absolute_path(text: str, folder: Path) -> str:
    """Returns the absolute path of `text`; `~` is the user's home."""
    return str((folder / Path(text).expanduser()).resolve())
