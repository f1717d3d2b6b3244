"""The arrow points down, there are no circles, and each heavy library has one door. ARCHITECTURE.md has the order."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("search", "evaluators", "spaces")
FENCES = {
    "optuna": ("search/",),
    "mlflow": ("search/",),
    "tensorrt": ("evaluators/runtimes/tensorrt_gpu/runtime.py",),
    "openvino": ("evaluators/runtimes/openvino_cpu.py", "evaluators/bundle/run.py"),
    "onnxruntime": ("evaluators/runtimes/onnxruntime_cpu.py", "evaluators/bundle/run.py"),
    "torch_pruning": ("spaces/",),
}
LIGHT = ("search.cli", "search.config.budget", "search.config.study", "search.__main__")
HEAVY = ("torch", "optuna", "mlflow", "onnx", "numpy", "rich")


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES: Mapping[str, Path] = {
    _name(path): path for folder in (*LAYERS, "studies") for path in sorted((ROOT / folder).rglob("*.py"))
}


def imports(path: Path, at_once_only: bool = False) -> Iterator[str]:
    """Yields what a file imports, in full; `from package import module` yields the module."""
    tree = ast.parse(path.read_text())
    for node in tree.body if at_once_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def rooms(layer: str) -> list[str]:
    """Returns the rooms of a layer in the order in which they may be imported, as ARCHITECTURE.md lists them."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    section = text.split(f"\n### {layer}:")[1].split("\n#")[0]
    return re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_and_respect_the_fences(module: str) -> None:
    name, layer = str(MODULES[module].relative_to(ROOT)), module.split(".")[0]
    for imported in imports(MODULES[module]):
        top = imported.split(".")[0]
        if top in LAYERS and layer in LAYERS:
            assert LAYERS.index(top) >= LAYERS.index(layer), f"{name} imports {imported}, which lies above it"
        if layer in LAYERS:
            assert top not in ("studies", "tests"), f"{name} imports {imported}"
        if top in FENCES and layer in LAYERS:
            assert name.startswith(FENCES[top]), f"{name} imports {imported}, which belongs in {FENCES[top]}"


@pytest.mark.parametrize("layer", LAYERS)
def test_rooms_import_only_what_stands_above_them_in_the_list(layer: str) -> None:
    order = [*rooms(layer), "__main__"]
    there = {name.split(".")[1] for name in MODULES if name.startswith(f"{layer}.")}
    assert there | {"__main__"} == set(order), "every room has its place, and no other is listed"
    for module, path in MODULES.items():
        own = module.split(".")[1:2]
        for imported in imports(path):
            other = imported.split(".")[1:2]
            if own and other and own != other and module.startswith(f"{layer}.") and imported.startswith(f"{layer}."):
                assert order.index(other[0]) < order.index(own[0]), f"{module} imports {imported}"


def test_there_is_no_circle_of_imports() -> None:
    graph = {module: {name for name in imports(path) if name in MODULES} - {module} for module, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_root_of_search_has_few_entries() -> None:
    found = {path.name for path in (ROOT / "search").iterdir()} - {"__pycache__", "py.typed"}
    assert len(found - {"__init__.py", "__main__.py", "cli.py"}) <= 12


def test_what_answers_at_once_loads_nothing_heavy() -> None:
    todo, seen = list(LIGHT), set[str]()
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        parents = [module.rsplit(".", count)[0] for count in range(1, module.count(".") + 1)]
        todo += [parent for parent in parents if parent in MODULES]
        for imported in imports(MODULES[module], at_once_only=True):
            assert imported.split(".")[0] not in HEAVY, (module, imported)
            if imported in MODULES:
                todo.append(imported)
    assert len(seen) > len(LIGHT)


def test_an_import_changes_nothing_outside_its_module() -> None:
    script = (
        "import os, sys, warnings, optuna\n"
        "before = dict(os.environ), optuna.logging.get_verbosity()\n"
        "import search.commands.run, search.commands.pick, search.commands.report, search.commands.ui\n"
        "import search.commands.diagnose, search.commands.front, search.results.store, search.tracking.store\n"
        "assert before == (dict(os.environ), optuna.logging.get_verbosity())\n"
        "assert not [one for one in warnings.filters if one[2] is optuna.exceptions.ExperimentalWarning]\n"
        "assert 'mlflow' not in sys.modules, 'it reads its settings when it is imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_files_stay_readable() -> None:
    for path in MODULES.values():
        assert len(path.read_text().splitlines()) <= 500, f"{path} wants to be two"


@pytest.mark.parametrize("module", MODULES)
def test_a_line_assigns_at_most_two_things(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            for target in node.targets:
                assert not isinstance(target, ast.Tuple) or len(target.elts) < 3, f"{module}:{node.lineno}"
