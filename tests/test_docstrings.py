"""What docstrings say of arguments is about arguments that are there."""

import ast
import re

import pytest

from tests.test_architecture import MODULES


def described(docstring: str) -> list[str]:
    """Returns the names in the section `Args:` of a docstring."""
    _, _, section = docstring.partition("\nArgs:\n")
    names = re.findall(r"^    \*{0,2}(\w+(?:, \w+)*):", re.split(r"\n(?=\S)", section)[0], re.MULTILINE)
    return [name for group in names for name in group.split(", ")]


def parameters(function: ast.FunctionDef) -> list[str]:
    given = function.args
    parts = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return [part.arg.lstrip("_") for part in parts if part]


def there(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    """Returns the parameters of a function, or the fields of a class and the parameters of its constructor."""
    if isinstance(node, ast.FunctionDef):
        return parameters(node)
    fields = [item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and hasattr(item.target, "id")]
    makers = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
    return [*fields, *(name for maker in makers for name in parameters(maker))]


@pytest.mark.parametrize("module", MODULES)
def test_arguments_in_docstrings_exist(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = {name.lstrip("_") for name in described(ast.get_docstring(node) or "")}
            unknown = names - set(there(node))
            assert not unknown, f"{module}:{node.lineno} {node.name} has no {', '.join(sorted(unknown))}"
