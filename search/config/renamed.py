"""Former names of keys of study files, and their present names."""

from collections.abc import Mapping
from typing import Any

from search.config.errors import StudyError
from search.config.sections import BEFORE_DEPTH

RENAMED: Mapping[str, Mapping[str, str]] = {"search": {"early": "early_stopping", "profile": "warm_start"}}
"""Present names by former names, by section."""
_FP32_TYPES = ("tf32", "bf16")
"""Former boolean keys of [target]."""


def with_present_names(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns a study's content with present keys, and a line for each renamed one.

    Args:
        content: of a study file or a journal.

    Raises:
        StudyError: a key is given under both names.
    """
    study, lines = dict(content), list[str]()
    for section, names in RENAMED.items():
        keys = study.get(section)
        if not isinstance(keys, Mapping):
            continue
        for old, new in names.items():
            if old in keys and new in keys:
                raise StudyError(f"[{section}] {old} is the former name of {new}, got both; keep {new}")
            if old in keys:
                keys = {new if key == old else key: value for key, value in keys.items()}
                lines.append(f"[{section}] {old} is called {new} now")
        study[section] = keys
    target = study.get("target")
    if isinstance(target, Mapping) and "fp32_in" in target and any(kind in target for kind in _FP32_TYPES):
        raise StudyError("[target] fp32_in takes the place of tf32 and bf16, got both; keep fp32_in")
    if isinstance(target, Mapping) and "fp32_in" not in target:
        study["target"], more = _with_fp32_type(target)
        lines += more
    return study, lines


def _with_fp32_type(target: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the section with one key in place of `tf32` and `bf16`.

    Raises:
        StudyError: fp32 layers are wanted in both.
    """
    old = [kind for kind in _FP32_TYPES if kind in target]
    enabled = [kind for kind in old if target[kind] is True]
    if len(enabled) > 1:
        raise StudyError('[target] fp32 layers run in one type, got tf32 and bf16; write fp32_in = "tf32" or "bf16"')
    if not old or any(not isinstance(target[kind], bool) for kind in old):
        return dict(target), []
    value = enabled[0] if enabled else "fp32"
    kept = {key: each for key, each in target.items() if key not in old}
    lines = [f'[target] {kind} = {str(target[kind]).lower()} is written fp32_in = "{value}" now' for kind in old]
    return {**kept, "fp32_in": value}, lines


def with_earlier_dimensions(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a journal's study with the dimensions that were searched, if it was written before they could be chosen.

    Args:
        content: of the journal, which has every key of its version.
    """
    space = content.get("space")
    if not isinstance(space, Mapping) or "only" in space:
        return dict(content)
    return {**content, "space": {**space, "only": list(BEFORE_DEPTH)}}
