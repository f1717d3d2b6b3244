"""The tree that `spaces/errors.py` draws is the tree that there is."""

import ast
import re
from collections.abc import Iterator

from spaces import errors
from tests.helpers.searches import ROOT


def drawn() -> dict[str, str]:
    """Returns the parent of each error in the drawing, which tells it by indentation."""
    found: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in str(errors.__doc__).splitlines():
        entry = re.match(r"^( *(?:[-+] )?)(\w+Error)\b", line)
        if not entry:
            continue
        depth = len(entry[1])
        above = [(other, name) for other, name in above if other < depth]
        if above:
            found[entry[2]] = above[-1][1]
        above.append((depth, entry[2]))
    return found


def defined() -> Iterator[tuple[str, str]]:
    """Yields each class of ours that ends in Error, and its base."""
    for layer in ("spaces", "evaluators", "search"):
        for path in (ROOT / layer).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef) and node.name.endswith("Error") and node.bases:
                    yield node.name, ast.unparse(node.bases[0])


def test_the_drawing_has_every_error_of_the_users_under_its_base() -> None:
    classes = list(defined())
    parents = dict(classes)
    assert len(parents) == len(classes), "a name belongs to one error"

    def is_users(name: str) -> bool:
        return name == "UserError" or (name in parents and is_users(parents[name]))

    assert drawn() == {name: base for name, base in classes if is_users(name) and name != "UserError"}
