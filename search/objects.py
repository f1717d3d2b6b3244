"""The functions and classes that study files and tables name as `module:attribute`."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from search.study import StudyError


def resolve(reference: str) -> Any:
    """Returns the object that `module:attribute` names.

    Raises:
        StudyError: there is no such module, it does not import, or it has no such attribute.
    """
    module, _, attribute = reference.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise StudyError(f"a factory is an importable module:name, got {reference!r}: {error}") from error
    except AttributeError:
        raise StudyError(f"a factory is an importable module:name, got {reference!r}: {module} has none") from None


def source_of(function: Callable[..., Any]) -> str:
    """Returns the text of the file that a function comes from, so that a change of it is a change of key."""
    return inspect.getsource(inspect.getmodule(function) or function)
