"""The arrow points down, and each heavy library has one door."""

import ast
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
LIGHT = ("search/cli.py", "search/config/budget.py", "search/config/study.py", "search/__main__.py")


def modules() -> list[Path]:
    return [path for folder in (*LAYERS, "studies") for path in (ROOT / folder).rglob("*.py")]


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_and_respect_the_fences(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    layer = name.split("/")[0]
    for imported in imports(path):
        top = imported.split(".")[0]
        if top in LAYERS and layer in LAYERS:
            assert LAYERS.index(top) >= LAYERS.index(layer), f"{name} imports {imported}, which lies above it"
        if layer in LAYERS:
            assert top not in ("studies", "tests"), f"{name} imports {imported}"
        if top in FENCES and layer in LAYERS:
            assert name.startswith(FENCES[top]), f"{name} imports {imported}, which belongs in {FENCES[top]}"


def test_what_answers_at_once_loads_nothing_heavy() -> None:
    todo, seen = [ROOT / path for path in LIGHT], set()
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for imported in imports(path, top_level_only=True):
            assert imported.split(".")[0] not in ("torch", "optuna", "mlflow", "onnx", "numpy", "rich"), (
                path,
                imported,
            )
            own = ROOT / (imported.replace(".", "/") + ".py")
            if own.is_file():
                todo.append(own)
    assert len(seen) > len(LIGHT)


def test_files_stay_readable() -> None:
    for path in modules():
        assert len(path.read_text().splitlines()) <= 500, f"{path} wants to be two"
