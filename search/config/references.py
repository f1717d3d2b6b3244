"""How a study names its network and its images. Nothing heavy is imported here: the command line reads these."""

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from search.config.registries import DATA_SETS
from spaces.errors import UserError

TORCHVISION = "torchvision"
_FACTORY = "package.module:function or path/file.py:function"
_MODELS = f"a model is torchvision:NAME[@WEIGHTS], {_FACTORY}"
_DATA = f"data is {', '.join(f'{kind}:PATH' for kind in DATA_SETS)}, {_FACTORY}"


class SourceError(UserError):
    """A network or images that cannot be had as they were named."""


@dataclass(frozen=True)
class Source:
    """What a text such as `imagefolder:/data/flowers` or `mine/model.py:build` says.

    Args:
        kind: `torchvision` or one of `DATA_SETS`; `module` and `file` for a factory.
        place: after the kind, or the module or file of a factory.
        attribute: the factory's name.
    """

    kind: str
    place: str
    attribute: str = ""

    @property
    def is_factory(self) -> bool:
        """Whether a function of the user's own is named."""
        return self.kind in ("module", "file")

    @property
    def short(self) -> str:
        """A word for it, for the name of a search."""
        if self.is_factory:
            return self.attribute
        return self.place.partition("@")[0] if self.kind == TORCHVISION else Path(self.place).name or self.kind

    def __str__(self) -> str:
        return f"{self.place}:{self.attribute}" if self.is_factory else f"{self.kind}:{self.place}"


def model_source(text: str) -> Source:
    """Returns where a network comes from.

    Raises:
        SourceError: the text names none.
    """
    return _parse(text, (TORCHVISION,), _MODELS)


def data_source(text: str) -> Source:
    """Returns where images come from.

    Raises:
        SourceError: the text names none.
    """
    return _parse(text, DATA_SETS, _DATA)


def factory_source(text: str) -> Source:
    """Returns the function that a text names.

    Raises:
        SourceError: the text names none.
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
    """Returns the source's text with its path, if it has one, made absolute.

    Args:
        source: what was named.
        folder: what relative paths begin at.
    """
    if source.kind in (TORCHVISION, "module"):
        return str(source)
    return str(Source(source.kind, absolute_path(source.place, folder), source.attribute))


def absolute_path(text: str, folder: Path) -> str:
    """Returns a path that means the same from everywhere; `~` is the user's home."""
    return str((folder / Path(text).expanduser()).resolve())
