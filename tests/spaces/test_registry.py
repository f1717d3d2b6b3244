"""Names of implementations: those of today, those of before, and those that are misspelt."""

import math

import pytest

from spaces.registry import Registry, UnknownNameError

FUNCTIONS = Registry("a function", {"sqrt": "math:sqrt", "exp": "math:exp"}, aliases={"root": "sqrt"})


def test_a_name_of_before_is_accepted_and_has_a_present_one() -> None:
    assert FUNCTIONS["root"] is math.sqrt
    assert "root" in FUNCTIONS
    assert FUNCTIONS.known("root") == FUNCTIONS.renamed("root") == "sqrt"
    assert FUNCTIONS.module("root") == "math"
    assert FUNCTIONS.check("root") == "root", "a study file keeps what its user wrote"
    assert FUNCTIONS.names_of("sqrt") == FUNCTIONS.names_of("root") == ("sqrt", "root")
    assert FUNCTIONS.names_of("exp") == ("exp",)


def test_only_present_names_are_listed() -> None:
    assert list(FUNCTIONS) == ["sqrt", "exp"]
    with pytest.raises(
        UnknownNameError, match=r"a function is one of sqrt, exp or .*, got 'sqr'; did you mean 'sqrt'\?"
    ):
        FUNCTIONS.known("sqr")
    with pytest.raises(ValueError, match="one of sqrt, exp"):
        FUNCTIONS.check("log")
    assert FUNCTIONS.renamed("log") == "log"
