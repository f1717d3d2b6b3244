"""What the runtime uses of TensorRT exists in every version that it accepts: its own source against the real bindings.

The bindings import without TensorRT's libraries when stubs stand in for these, so no GPU is needed.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SOURCES = [ROOT / "evaluators" / "runtimes" / "tensorrt_gpu" / name for name in ("runtime.py", "engines.py")]
VERSIONS = ("10.3.*", "10.13.*", "11.*")
LIBRARY = ("trt", "self._trt", "library()")
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


def names_used(source: str) -> set[str]:
    """Returns every name below `tensorrt` that a module uses, such as `BuilderFlag.TF32` or `ICudaEngine.num_layers`.

    It finds chains that start at the module, attributes of whatever is annotated with one of TensorRT's classes, and
    methods that override one of theirs.
    """
    tree = ast.parse(source)
    kinds = {
        node.target.id for node in tree.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    annotated: dict[str, str] = {}
    for node in ast.walk(tree):
        named = ast.unparse(node.target) if isinstance(node, ast.AnnAssign) else getattr(node, "arg", None)
        kind = getattr(node, "annotation", None)
        if named and isinstance(kind, ast.Name) and kind.id in kinds and kind.id[0].isupper() and kind.id != "Shape":
            assert annotated.setdefault(named, kind.id) == kind.id, f"{named} is annotated with two classes"
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            text, value = ast.unparse(node), ast.unparse(node.value)
            used |= {text.removeprefix(f"{root}.") for root in LIBRARY if text.startswith(f"{root}.")}
            used |= {f"{annotated[value]}.{node.attr}"} if value in annotated else set()
        if isinstance(node, ast.FunctionDef):
            used |= overridden(node)
    return used


def overridden(function: ast.FunctionDef) -> set[str]:
    bases = {
        ast.unparse(node.target): ast.unparse(node.value).split(".")[-1]
        for node in function.body
        if isinstance(node, ast.AnnAssign) and node.value
    }
    return {
        f"{bases[ast.unparse(base)]}.{method.name}"
        for node in function.body
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        for method in node.body
        if isinstance(method, ast.FunctionDef)
    }


@pytest.fixture(scope="session")
def used() -> list[str]:
    return sorted(set().union(*(names_used(path.read_text()) for path in SOURCES)))


@dataclass(frozen=True)
class Bindings:
    """The real bindings, unpacked, and what stands in for the libraries below them."""

    package: Path
    stubs: Path

    def run(self, script: str, text: str = "") -> str:
        paths = {"LD_LIBRARY_PATH": str(self.stubs), "PYTHONPATH": f"{ROOT}{os.pathsep}{self.package}"}
        done = subprocess.run(
            [sys.executable, "-c", script],
            input=text,
            capture_output=True,
            text=True,
            env=os.environ | paths,
            timeout=50,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="session")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is not there to compile what stands in for TensorRT's libraries")
    folder = tmp_path_factory.mktemp("stubs")
    source = folder / "stub.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for library in ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin"):
        for major in (10, 11):
            name = f"{library}.so.{major}"
            output = str(folder / name)
            subprocess.run([compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", output, str(source)], check=True)
    return folder


@pytest.fixture(scope="session", params=VERSIONS)
def bindings(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config, stubs: Path
) -> Bindings:
    wheels = pytestconfig.cache.mkdir("tensorrt-bindings") if pytestconfig.cache else tmp_path_factory.mktemp("wheels")
    package = tmp_path_factory.mktemp("bindings")
    with zipfile.ZipFile(wheel(request.param, wheels)) as content:
        content.extractall(package)
    return Bindings(package, stubs)


def wheel(version: str, folder: Path) -> Path:
    """Returns the bindings' wheel for this Python, downloaded once."""
    pattern = f"tensorrt_cu12_bindings-{version}-cp{sys.version_info.major}{sys.version_info.minor}-*.whl"
    if not any(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--retries", "0", "--timeout", "10", "--dest", str(folder), f"tensorrt-cu12-bindings=={version}"]
        try:
            subprocess.run(command, capture_output=True, timeout=30, check=False)
        except subprocess.TimeoutExpired:
            pytest.skip(f"tensorrt-cu12-bindings {version} was not downloaded within 30 s")
    found = sorted(folder.glob(pattern))
    if not found:
        pytest.skip(f"tensorrt-cu12-bindings {version} cannot be downloaded for this Python")
    return found[-1]


def test_the_names_are_read_from_the_source(used: list[str]) -> None:
    """A guard against a list that is complete because it is empty."""
    for name in (
        "BuilderFlag.TF32",
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "ProfilingVerbosity.DETAILED",
        "IBuilderConfig.avg_timing_iterations",
        "IExecutionContext.execute_async_v3",
        "ICudaEngine.create_engine_inspector",
        "IOptimizationProfile.set_shape",
        "ITimingCache.serialize",
        "ParserError.node_name",
        "IProfiler.report_layer_time",
        "ILogger.log",
    ):
        assert name in used
    assert len(used) > 40


def test_a_name_that_is_not_there_would_be_found() -> None:
    source = "ICudaEngine: TypeAlias = Any\ndef f(engine: ICudaEngine):\n    return engine.gone, trt.BuilderFlag.FP16"
    assert names_used(source) == {"ICudaEngine.gone", "BuilderFlag", "BuilderFlag.FP16"}


def test_every_name_exists(bindings: Bindings, used: list[str]) -> None:
    script = """
import functools, json, sys
import tensorrt_bindings as trt

def exists(name):
    try:
        functools.reduce(getattr, name.split("."), trt)
    except AttributeError:
        return False
    return True

print(json.dumps([name for name in json.load(sys.stdin) if not exists(name)]))
"""
    gone = json.loads(bindings.run(script, json.dumps([*used, "BuilderFlag.NEVER_THERE"])))
    assert gone == ["BuilderFlag.NEVER_THERE"]


def test_the_version_is_accepted_and_a_builder_that_does_not_start_is_one_clear_line(bindings: Bindings) -> None:
    script = """
import sys
import tensorrt_bindings
sys.modules["tensorrt"] = tensorrt_bindings
from pathlib import Path
from evaluators.runtimes.tensorrt_gpu import runtime as trt

library = trt.library()
assert library.__version__ in trt.TensorRT().version()
log = trt._log()
log.log(library.ILogger.Severity.WARNING, "not an error")
log.log(library.ILogger.Severity.ERROR, "an\\nerror")
assert log.errors == ["an\\nerror"]
trt._layer_profiler().report_layer_time("layer", 1.0)
try:
    trt.EngineBuilder(Path("unused")).build(b"", (1, 1, 8, 8))
except trt.EngineError as error:
    print(error)
"""
    assert bindings.run(script).strip() == "TensorRT starts, got no reason; check the driver with nvidia-smi"
