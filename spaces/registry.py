"""Tables of implementations by name: what a study, a command line or a board may ask for."""

import difflib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, TypeVar, cast

from spaces.errors import UserError

Item = TypeVar("Item")


class UnknownNameError(UserError):
    """A name that a registry does not have."""


class Registry(Generic[Item]):
    """Implementations by name, each imported when it is asked for.

    CRITERIA: Registry[Criterion] = Registry("a criterion", {"l1": "spaces.pruning.criteria.l1:scores"})
    CRITERIA["l1"]       # the function; its module is imported now
    CRITERIA["l3"]       # UnknownNameError: a criterion is one of l1, got 'l3'; did you mean 'l1'?
    CRITERIA.check       # the validator of a key of a study file

    To add an implementation is a file and a line of the table. One that gets another name keeps the old one as an
    alias: study files and journals have it.

    Args:
        kind: what they are, for messages, such as "a criterion".
        entries: `"package.module:attribute"` by name.
        aliases: names of before, which go on working, and the present one of each.
    """

    def __init__(self, kind: str, entries: Mapping[str, str], aliases: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self._entries = dict(entries)
        self._aliases = dict(aliases or {})

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return self.renamed(str(name)) in self._entries

    def __getitem__(self, name: str) -> Item:
        """Returns the implementation called `name`.

        Raises:
            UnknownNameError: there is none; the nearest name is told.
            ImportError: it needs a library that is not installed.
        """
        module, _, attribute = self._entries[self.known(name)].partition(":")
        return cast(Item, getattr(importlib.import_module(module), attribute))

    def renamed(self, name: str) -> str:
        """Returns the present name of what had another one before, and every other name as it is."""
        return self._aliases.get(name, name)

    def names_of(self, name: str) -> tuple[str, ...]:
        """Returns the present name of an implementation, and then those that it had before."""
        present = self.renamed(name)
        return (present, *(before for before, now in self._aliases.items() if now == present))

    def known(self, name: str) -> str:
        """Returns the present name.

        Raises:
            UnknownNameError: nothing is called so, or was.
        """
        if name not in self:
            near = nearest(name, self._entries)
            hint = f"; did you mean {near!r}?" if near else ""
            raise UnknownNameError(f"{self.kind} is one of {', '.join(self._entries)}, got {name!r}{hint}")
        return self.renamed(name)

    def module(self, name: str) -> str:
        """Returns the name of the module that has an implementation, without importing it."""
        return self._entries[self.renamed(name)].partition(":")[0]

    def check(self, name: str) -> str:
        """Returns the name as it is, for pydantic, which tells the key and the value itself.

        Raises:
            ValueError: there is no such implementation.
        """
        if name not in self:
            near = nearest(name, self._entries)
            raise ValueError(f"one of {', '.join(self._entries)}{f' (did you mean {near!r}?)' if near else ''}")
        return name


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that a misspelt one resembles most; None where none is close."""
    return next(iter(difflib.get_close_matches(name, list(known), 1)), None)
