"""Tables of implementations by name: what a study, a command line or a board may ask for."""

import difflib
import importlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, TypeVar, cast

from spaces.errors import UserError

Item = TypeVar("Item")

_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
FORM = "package.module:attribute"
"""How an implementation is named that lies elsewhere; its module must be importable where the program is started."""


def is_reference(name: object) -> bool:
    """Returns whether a name says itself where its implementation is, as `package.module:attribute`."""
    return isinstance(name, str) and _REFERENCE.fullmatch(name) is not None


class UnknownNameError(UserError):
    """A name that a registry does not have."""


class Registry(Generic[Item]):
    """Implementations by name, each imported when it is asked for.

    CRITERIA: Registry[Criterion] = Registry("a criterion", {"l1": "spaces.pruning.criteria.l1:scores"})
    CRITERIA["l1"]       # the function; its module is imported now
    CRITERIA["mine.criteria:scores"]   # a function of the user's own, which has no line here
    CRITERIA["l3"]       # UnknownNameError: a criterion is one of l1 or package.module:attribute, got 'l3'; ...
    CRITERIA.check       # the validator of a key of a study file

    To add an implementation is a file and a line of the table: docs/extending has a page for each kind.

    Args:
        kind: what they are, for messages, such as "a criterion".
        entries: `"package.module:attribute"` by name.
    """

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Item:
        """Returns the implementation called `name`, or the one that `package.module:attribute` is.

        Raises:
            UnknownNameError: there is none; the nearest name is told.
            ImportError: one of ours needs a library that is not installed.
        """
        if is_reference(name):
            return self._imported(name)
        module, _, attribute = self._entries[self.known(name)].partition(":")
        return cast(Item, getattr(importlib.import_module(module), attribute))

    def _imported(self, reference: str) -> Item:
        """Returns an implementation of the user's own."""
        module, _, attribute = reference.partition(":")
        try:
            return cast(Item, getattr(importlib.import_module(module), attribute))
        except (ImportError, AttributeError) as error:
            raise UnknownNameError(
                f"{self.kind} that is named {FORM} is importable, got {reference!r}: {error};"
                " install it, or start from the folder that has it"
            ) from error

    def known(self, name: str) -> str:
        """Returns the name of an implementation, those of the user's own being imported to see that they are there.

        Raises:
            UnknownNameError: nothing is called so.
        """
        if is_reference(name):
            self._imported(name)
        elif name not in self._entries:
            near = nearest(name, self._entries)
            hint = f"; did you mean {near!r}?" if near else ""
            raise UnknownNameError(f"{self.kind} is one of {', '.join(self._entries)} or {FORM}, got {name!r}{hint}")
        return name

    def module(self, name: str) -> str:
        """Returns the name of the module that has an implementation, without importing it."""
        return self._entries.get(name, name).partition(":")[0]

    def check(self, name: str) -> str:
        """Returns the name, for pydantic, which tells the key and the value itself.

        What `package.module:attribute` names is not imported: a journal is read where its code is not installed too.

        Raises:
            ValueError: there is no such implementation.
        """
        if name not in self._entries and not is_reference(name):
            near = nearest(name, self._entries)
            hint = f" (did you mean {near!r}?)" if near else ""
            raise ValueError(f"one of {', '.join(self._entries)} or {FORM}{hint}")
        return name


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that a misspelt one resembles most; None where none is close."""
    return next(iter(difflib.get_close_matches(name, list(known), 1)), None)
