"""What is wrong with a study file, in one plain line."""

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from spaces.errors import UserError


class StudyError(UserError):
    """A study that does not exist or says something that cannot be."""


_RULES: Mapping[str, str] = {
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text in quotes",
    "tuple_type": "a list in brackets",
    "model_type": "a section with keys",
    "model_attributes_type": "a section with keys",
    "finite_number": "a finite number",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
}


def plain(validation_error: ValidationError, study: type[BaseModel]) -> str:
    """Returns `<rule>, got <value>; <remedy>` for the first thing that pydantic found.

    Args:
        validation_error: pydantic's errors. An unknown key comes first, because it may be a misspelt missing one.
        study: what the file was read as.
    """
    error = min(validation_error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    path = [part for part in error["loc"] if isinstance(part, str)]
    place, section = ".".join(path), _section(path[:-1], study)
    if error["type"] == "extra_forbidden":
        known = sorted(section.model_fields)
        near = difflib.get_close_matches(path[-1], known, 1)
        remedy = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
        return f"{_described(path[:-1])} has no key {path[-1]!r}, got {_shown(error['input'])}; {remedy}"
    if error["type"] == "missing":
        return f"{_described(path[:-1])} needs {path[-1]!r}, got none; add a line: {path[-1]} = ..."
    context: dict[str, Any] = error.get("ctx", {})
    words = str(context["error"]) if "error" in context else _RULES.get(error["type"], "").format(**context)
    return f"{place} is {words or error['msg']}, got {_shown(error['input'])}; {_remedy(path, section)}"


def _section(path: list[str], study: type[BaseModel]) -> type[BaseModel]:
    model = study
    for name in path:
        field = model.model_fields.get(name)
        inner = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        model = next((kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)), model)
    return model


def _described(path: list[str]) -> str:
    return f"[{'.'.join(path)}]" if path else "a study"


def _remedy(path: list[str], section: type[BaseModel]) -> str:
    field = section.model_fields.get(path[-1]) if path else None
    if field is None or field.is_required():
        return "change it"
    is_plain = field.default not in (None, ()) and not isinstance(field.default, BaseModel)
    return f"leave it out for {field.default!r}" if is_plain else "leave it out"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
