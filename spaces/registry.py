"""Tables of implementations by name."""

import difflib
import importlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, TypeVar, cast

from spaces.errors import UserError

Item = TypeVar("Item")

_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
FORM = "package.module:attribute"
"""The form of the name of a user's own implementation; its module must be importable."""


def is_reference(name: object) -> bool:
    """Returns whether a name has the form `package.module:attribute`."""
    return isinstance(name, str) and _REFERENCE.fullmatch(name) is not None


class UnknownNameError(UserError):
    """A name that a registry does not have."""


class Registry(Generic[Item]):
    """Implementations by name, each imported when it is first used.

    CRITERIA: Registry[Criterion] = Registry("a criterion", {"l1": "spaces.pruning.criteria.l1:scores"})
    CRITERIA["l1"]       # the function; its module is imported now
    CRITERIA["mine.criteria:scores"]   # a function of the user's own, which has no line here
    CRITERIA["l3"]       # UnknownNameError: a criterion is one of l1 or package.module:attribute, got 'l3'; ...
    CRITERIA.check       # the validator of a key of a study file

    A new implementation needs a file and a line in the table: docs/extending has a page for each kind. A renamed one
    keeps its old name as an alias, because study files and journals may have it.

    Args:
        kind: the kind of implementation with its article, for messages, such as "a criterion".
        entries: `"package.module:attribute"` by name.
        aliases: the present name of each implementation by its former name.
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
        """Returns the implementation called `name`, or the one at `package.module:attribute`.

        Raises:
            UnknownNameError: there is none; the message has the nearest name.
            ImportError: a built-in implementation needs a library that is not installed.
        """
        if is_reference(name):
            return self._imported(name)
        module, _, attribute = self._entries[self.known(name)].partition(":")
        return cast(Item, getattr(importlib.import_module(module), attribute))

    def _imported(self, reference: str) -> Item:
        """Returns a user's own implementation."""
        module, _, attribute = reference.partition(":")
        try:
            return cast(Item, getattr(importlib.import_module(module), attribute))
        except (ImportError, AttributeError) as error:
            raise UnknownNameError(
                f"{self.kind} that is named {FORM} is importable, got {reference!r}: {error};"
                " install it, or start from the folder that has it"
            ) from error

    def renamed(self, name: str) -> str:
        """Returns the present name for a former one; any other name unchanged."""
        return self._aliases.get(name, name)

    def names_of(self, name: str) -> tuple[str, ...]:
        """Returns the present name of an implementation, followed by its former names."""
        present = self.renamed(name)
        return (present, *(before for before, now in self._aliases.items() if now == present))

    def known(self, name: str) -> str:
        """Returns the present name; a user's own implementation is imported to check that it exists.

        Raises:
            UnknownNameError: no implementation has or had this name.
        """
        if is_reference(name):
            self._imported(name)
        elif name not in self:
            near = nearest(name, self._entries)
            hint = f"; did you mean {near!r}?" if near else ""
            raise UnknownNameError(f"{self.kind} is one of {', '.join(self._entries)} or {FORM}, got {name!r}{hint}")
        return self.renamed(name)

    def module(self, name: str) -> str:
        """Returns the name of the module of an implementation, without importing it."""
        present = self.renamed(name)
        return self._entries.get(present, present).partition(":")[0]

    def check(self, name: str) -> str:
        """Returns the name unchanged; a validator for pydantic, whose message has the key and the value.

        A name of the form `package.module:attribute` is not imported, because a journal must be readable where that
        code is not installed.

        Raises:
            ValueError: there is no such implementation.
        """
        if name not in self and not is_reference(name):
            near = nearest(name, self._entries)
            hint = f" (did you mean {near!r}?)" if near else ""
            raise ValueError(f"one of {', '.join(self._entries)} or {FORM}{hint}")
        return name


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that is most similar to a misspelt one; None if none is close."""
    return next(iter(difflib.get_close_matches(name, list(known), 1)), None)
