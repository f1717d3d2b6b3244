"""Imports functions that study files name, and reports errors in user code."""

import hashlib
import importlib
import importlib.util
import inspect
import os
import site
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from search.config.references import Source, factory_source
from spaces.errors import UserError

Result = TypeVar("Result")

_OURS = tuple(str(Path(__file__).parent.parent.parent / name) + os.sep for name in ("search", "evaluators", "spaces"))
_LIBRARIES = (*site.getsitepackages(), sysconfig.get_paths()["stdlib"], "<frozen")


class UserCodeError(UserError):
    """A user's function cannot be found, fails, or returns the wrong type."""


def load(reference: str) -> Callable[..., Any]:
    """Returns the function that `package.module:function` or `path/file.py:function` names.

    Raises:
        UserCodeError: there is no such module or file, it does not import, or it has no such function.
    """
    source = factory_source(reference)
    try:
        with _own_gradients():
            module = _from_file(Path(source.place)) if source.kind == "file" else importlib.import_module(source.place)
    except Exception as error:
        raise UserCodeError(
            f"a factory must be importable, got {reference!r}: {_said(error)}{_remedy(source, error)}"
        ) from error
    attribute = getattr(module, source.attribute, None)
    if not callable(attribute):
        functions = sorted(name for name, item in vars(module).items() if _is_own(item, module))
        raise UserCodeError(
            f"a factory is a function of its file, got {reference!r}, and {source.place} has no function"
            f" {source.attribute!r}; it has {', '.join(functions) or 'none'}"
        )
    function: Callable[..., Any] = attribute
    return function


def call(work: Callable[[], Result], rule: str) -> Result:
    """Returns the result of a user's function.

    Args:
        work: calls it.
        rule: its specification, for the error message.

    Raises:
        UserCodeError: it raises; its file and line are named.
    """
    try:
        with _own_gradients():
            return work()
    except UserError:
        raise
    except Exception as error:
        raise UserCodeError(f"{rule}, got {_said(error)}") from error


@contextmanager
def _own_gradients() -> Iterator[None]:
    """Takes back what a user's code switches off: without gradients nothing could be trained."""
    before = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(before)


def source_of(function: Callable[..., Any]) -> str:
    """Returns the texts of the file that a function comes from, and of those beside it or below that it uses.

    A change of any of them is a change of key. What lies elsewhere, such as a library, takes no part.
    """
    module = inspect.getmodule(function)
    if module is None or not getattr(module, "__file__", None):
        return inspect.getsource(module or function)
    folder = Path(str(module.__file__)).parent
    found: dict[Path, str] = {}
    waiting = [module]
    while waiting:
        module = waiting.pop()
        file = Path(getattr(module, "__file__", None) or "/")
        if file not in found and file.suffix == ".py" and file.is_relative_to(folder):
            found[file] = file.read_text(encoding="utf-8", errors="replace")
            waiting += _used_by(module)
    return "\0".join(found[file] for file in sorted(found))


def _used_by(module: ModuleType) -> list[ModuleType]:
    """Returns the modules that a module's names are, or come from."""
    values = list(vars(module).values())
    origins = [sys.modules.get(str(getattr(value, "__module__", ""))) for value in values]
    return [each for each in (*values, *origins) if isinstance(each, ModuleType)]


def _from_file(file: Path) -> ModuleType:
    name = f"study_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    specification = importlib.util.spec_from_file_location(name, file)
    if specification is None or specification.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    if str(file.parent) not in sys.path:  # behind everything else: for what lies beside the file
        sys.path.append(str(file.parent))
    try:
        specification.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_own(item: Any, module: ModuleType) -> bool:
    return inspect.isfunction(item) and item.__module__ == module.__name__ and not item.__name__.startswith("_")


def _said(error: Exception) -> str:
    """Returns an error's kind and words, and the line of the user's file that it comes from."""
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    text = text if len(text) <= 300 else f"{text[:300]}..."
    place = _place(error)
    return f"{text} at {place}" if place else text


def _place(error: Exception) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _is_users(file: str) -> bool:
    return not file.startswith((*_OURS, *_LIBRARIES)) and "site-packages" not in file and file[:1] != "<"


def _remedy(source: Source, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and source.kind == "module":
        return "; install it, start from the folder that has it, or name it as path/file.py:function"
    return "; check its path" if isinstance(error, FileNotFoundError) else ""
