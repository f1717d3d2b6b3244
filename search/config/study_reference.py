"""The reference of all keys of a study file: `python -m search.config.study_reference > docs/study-reference.md`."""

import inspect
import json
import sys
from collections.abc import Iterable, Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from search.config.budget import Budget
from search.config.study import Study
from spaces.registry import Registry

_HEAD = """\
# Reference of study files

Every key of `study.toml`, section by section. This page is generated from the code:
`python -m search.config.study_reference > docs/study-reference.md`. [A tutorial](../studies/README.md) shows how to
write a study, and `python -m search init FOLDER` writes one to start from.

Keys without a default are required, and so are the sections `[model]` and `[data]`. Relative paths begin at the study
file. On the command line `--model`, `--weights`, `--data`, `--target`, `--batch`, `--threads`, `--objectives` and
`--budget` replace what a `--study` says; with `--weights` its `[training]` is set aside.
"""
_TYPES = {str: "text", int: "whole number", float: "number", bool: "true or false", Budget: "list of text"}
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def reference() -> str:
    """Returns the page as Markdown: a table for each section, a row for each key, those of its own first."""
    return _HEAD + "".join(_table(path, section) for path, section in sections(Study))


def sections(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yields a section and all in it, each with its name in a file: `recovery.final`; nothing for the study itself."""
    yield path, section
    for key, field in section.model_fields.items():
        inner = _inner_section(field)
        if inner is not None:
            yield from sections(inner, f"{path}.{key}" if path else key)


def description(section: type[BaseModel], key: str) -> str:
    """Returns what a key is, in a line; where a section overrides a default only, its base class says it."""
    bases = [base for base in section.__mro__ if issubclass(base, BaseModel) and key in base.model_fields]
    texts = (base.model_fields[key].description for base in bases)
    return next((" ".join(text.split()) for text in texts if text), "")


def _inner_section(field: FieldInfo) -> type[BaseModel] | None:
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _table(path: str, section: type[BaseModel]) -> str:
    bases = [base for base in section.__mro__[1:] if issubclass(base, BaseModel)]
    keys = sorted(section.model_fields, key=lambda key: any(key in base.model_fields for base in bases))
    fields = ((key, section.model_fields[key]) for key in keys)
    rows = [_row(section, key, field) for key, field in fields if _inner_section(field) is None]
    title = f"\n## `[{path}]`\n" if path else "\n## Keys at the top\n"
    head = "| key | type | default | range or choices | what it is |\n|---|---|---|---|---|\n"
    return f"{title}\n{inspect.cleandoc(section.__doc__ or '')}\n\n{head}{''.join(rows)}"


def _row(section: type[BaseModel], key: str, field: FieldInfo) -> str:
    kind, allowed = _type_and_choices(field.annotation, field.metadata)
    cells = (f"`{key}`", kind, _default(field, allowed), allowed, description(section, key))
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |\n"


def _type_and_choices(kind: Any, constraints: Iterable[Any] = ()) -> tuple[str, str]:
    """Returns a type in words, and the range or the choices of its values."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type_and_choices(arguments[0], arguments[1:])
    choices = _names(constraints)
    if choices:
        return "text", choices
    if origin is Literal:
        return "text", ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, UnionType):
        kinds = [_type_and_choices(inner, constraints) for inner in arguments if inner is not NoneType]
        return " or ".join(name for name, _ in kinds), ", or ".join(allowed for _, allowed in kinds if allowed)
    if origin is tuple:
        inner, allowed = _type_and_choices(arguments[0])
        return f"list of {inner}s".replace("texts", "text"), allowed
    return _TYPES.get(kind, "text"), _bounds(constraints)


def _names(constraints: Iterable[Any]) -> str:
    """Returns the names of the registry that checks a value, if one does."""
    owners = (getattr(getattr(constraint, "func", None), "__self__", None) for constraint in constraints)
    registry = next((owner for owner in owners if isinstance(owner, Registry)), None)
    return ", ".join(f"`{name}`" for name in registry) if registry is not None else ""


def _bounds(constraints: Iterable[Any]) -> str:
    flat = [part for each in constraints for part in (each.metadata if isinstance(each, FieldInfo) else [each])]
    bounds = ((word, getattr(part, name, None)) for part in flat for name, word in _BOUNDS.items())
    return ", ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)


def _default(field: FieldInfo, allowed: str) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is None:
        return "none"
    if isinstance(value, tuple):
        names = [f"{item:.4g}" if isinstance(item, float) else json.dumps(item) for item in value]
        everything = allowed.replace("`", '"') == ", ".join(names) and len(names) > 1
        return "all" if everything else f"`[{', '.join(names)}]`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    sys.stdout.write(reference())
