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

    To add an implementation is a file and a line of the table: docs/extending has a page for each kind. One that gets
    another name keeps the old one as an alias: study files and journals have it.

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

    def renamed(self, name: str) -> str:
        """Returns the present name of what had another one before, and every other name as it is."""
        return self._aliases.get(name, name)

    def names_of(self, name: str) -> tuple[str, ...]:
        """Returns the present name of an implementation, and then those that it had before."""
        present = self.renamed(name)
        return (present, *(before for before, now in self._aliases.items() if now == present))

    def known(self, name: str) -> str:
        """Returns the present name; what is the user's own is imported to see that it is there.

        Raises:
            UnknownNameError: nothing is called so, or was.
        """
        if is_reference(name):
            self._imported(name)
        elif name not in self:
            near = nearest(name, self._entries)
            hint = f"; did you mean {near!r}?" if near else ""
            raise UnknownNameError(f"{self.kind} is one of {', '.join(self._entries)} or {FORM}, got {name!r}{hint}")
        return self.renamed(name)

    def module(self, name: str) -> str:
        """Returns the name of the module that has an implementation, without importing it."""
        present = self.renamed(name)
        return self._entries.get(present, present).partition(":")[0]

    def check(self, name: str) -> str:
        """Returns the name as it is, for pydantic, which tells the key and the value itself.

        What `package.module:attribute` names is not imported: a journal is read where its code is not installed too.

        Raises:
            ValueError: there is no such implementation.
        """
        if name not in self and not is_reference(name):
            near = nearest(name, self._entries)
            hint = f" (did you mean {near!r}?)" if near else ""
            raise ValueError(f"one of {', '.join(self._entries)} or {FORM}{hint}")
        return name


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that a misspelt one resembles most; None where none is close."""
    return next(iter(difflib.get_close_matches(name, list(known), 1)), None)
