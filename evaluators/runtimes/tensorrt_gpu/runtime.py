"""TensorRT 10.3 to 11: the main accelerator target, one engine per stage and batch size.

Precision lives in the ONNX file: engines are strongly typed, on 10 as on 11, and TF32 is off unless the file's metadata
allows it. This is the only module that imports tensorrt, and only when it is needed, so that it can be asked what is
missing anywhere.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

from evaluators.inference.staged import Steps
from evaluators.runtimes.base import Capabilities, Images, TargetError, TensorReader, allows, exit_thresholds
from evaluators.runtimes.device_state import DeviceState, gpu_state, state_moved
from evaluators.runtimes.tensorrt_gpu.capabilities import capabilities, timing_cache_file
from evaluators.runtimes.tensorrt_gpu.cuda import Buffer, Cuda, OutOfDeviceMemoryError, TimedStream
from evaluators.runtimes.tensorrt_gpu.engines import EngineError, EngineSession, EngineStage, Plan, Shape, layer_seconds
from evaluators.runtimes.tensorrt_gpu.inspector import LayerRow, layer_rows
from spaces.cache import write_atomically

# tensorrt has no types. These are its classes' names, which a test compares with the real bindings: every attribute
# that is used of something annotated with one of them has to exist, in every version that is accepted.
Builder: TypeAlias = Any
IBuilderConfig: TypeAlias = Any
ICudaEngine: TypeAlias = Any
IExecutionContext: TypeAlias = Any
INetworkDefinition: TypeAlias = Any
IOptimizationProfile: TypeAlias = Any
ITensor: TypeAlias = Any
ITimingCache: TypeAlias = Any
EngineInspector: TypeAlias = Any
OnnxParser: TypeAlias = Any
ParserError: TypeAlias = Any
Runtime: TypeAlias = Any

_OLDEST, _TOO_NEW = (10, 3), (12, 0)
_INSTALL = "pip install 'tensorrt>=10.3,<12'; on a Jetson it comes with JetPack 6 or newer"
_NO_MEMORY = re.compile(r"out of memory|OutOfMemory", re.IGNORECASE)
_FREE_MEMORY = "use a smaller batch, or free the GPU"
_TIMINGS_PER_TACTIC = 8
_PLANS_KEPT = 8


def library() -> Any:
    """Returns the tensorrt module.

    Raises:
        TargetError: it is not installed, or of a version that this module does not know.
    """
    try:
        import tensorrt as trt  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except (ImportError, OSError) as error:
        raise TargetError(f"the tensorrt package must be importable, got {str(error)!r}; {_INSTALL}") from error
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if not _OLDEST <= version < _TOO_NEW:
        raise TargetError(f"TensorRT is 10.3 to 11.x, got {trt.__version__}; {_INSTALL}")
    return trt


class TensorRT:
    """Engines on the first GPU."""

    name = "tensorrt"

    def __init__(self) -> None:
        self._refusals: dict[str, None] = {}
        self._state: DeviceState | None = None
        self._wait_s = 0.0

    @staticmethod
    def missing() -> str | None:
        """Returns why this runtime cannot be used here and what to do about it; None where it can."""
        try:
            library()
            Cuda.find().device()
        except TargetError as error:
            return str(error)
        return None

    def version(self) -> str:
        """Returns the library's name and version."""
        return f"tensorrt {library().__version__}"

    def device(self) -> str:
        """Returns the GPU's name."""
        return self._cuda.device().name

    def capabilities(self) -> Capabilities:
        """Returns what the GPU's generation runs well."""
        return capabilities(self._cuda.device().capability)

    def state(self) -> DeviceState:
        """Returns the GPU's clocks, power mode and temperature."""
        return gpu_state(self._cuda.bus_id())

    def deployable(self, model: bytes) -> bytes:
        """Returns the model as it is: symmetric s8 is the form that TensorRT reads."""
        return model

    def open(self, stages: Sequence[bytes], plan: Steps, threads: int, confidence: str = "softmax") -> EngineSession:  # noqa: ARG002
        """Returns engines that are built for a batch size when it is first asked for; `threads` is not used.

        Raises:
            TargetError: blocks may be skipped.
        """
        thresholds = exit_thresholds(plan)
        stream = self._stream(len(stages))
        return EngineSession(
            partial(self._load, tuple(stages), stream), stream, thresholds, inspect, confidence=confidence
        )

    def open_engines(
        self, description: bytes, folder: Path, thresholds: Sequence[float], confidence: str = "softmax"
    ) -> EngineSession:
        """Returns engines that `extras` made, loaded without being built again.

        Args:
            description: the content of `engines.json`.
            folder: where the engines lie.
            thresholds: the confidence from which each exit answers.
            confidence: what tells it.
        """
        told = json.loads(description)
        plans = [Plan((folder / e["file"]).read_bytes(), e["source"], tuple(e["results"])) for e in told["engines"]]
        stream = self._stream(len(plans))
        ready: list[Callable[[Shape], Plan]] = [lambda _, plan=plan: plan for plan in plans]  # type: ignore[misc]
        return EngineSession(
            partial(self._load_plans, ready, stream), stream, thresholds, inspect, confidence=confidence
        )

    def tensors(self, model: bytes) -> TensorReader:
        """Returns a function from a batch to all outputs of a file, from an engine built for that batch."""
        opened = self.open([model], [], 1)

        def watch(images: Images) -> dict[str, Images]:
            (stage,) = opened.stages(images.shape)
            names = self._builder.plan(model, images.shape).results
            return dict(zip(names, stage.everything(images), strict=True))

        return watch

    def extras(self, stages: Sequence[bytes], images: Images) -> dict[str, bytes]:
        """Returns the engines for this TensorRT, this kind of GPU and batches as large as `images`, and what they are.

        `engines.json` has their inputs and outputs, the timing cache's key, and of each layer the precisions from the
        inspector and the seconds from a pass of its own.
        """
        loaded = self._load(tuple(stages), TimedStream(self._cuda), images.shape)
        shapes = [images.shape, *(stage.results[0].shape for stage in loaded[:-1])]
        plans = [self._builder.plan(stage, shape) for stage, shape in zip(stages, shapes, strict=True)]
        files = {f"stage{index + 1}.engine": plan.engine for index, plan in enumerate(plans)}
        described = [
            {
                "file": file,
                "source": plan.source,
                "results": plan.results,
                "layers": [asdict(row) for row in inspect(stage.engine)],
                "seconds": layer_seconds(stage, _profile()),
            }
            for file, plan, stage in zip(files, plans, loaded, strict=True)
        ]
        told = {"timing_cache": timing_cache_file(library().__version__, self._cuda).stem, "engines": described}
        return files | {"engines.json": json.dumps(told, indent=1).encode()}

    def remarks(self) -> list[str]:
        """Returns why engines ran without a CUDA graph, what a synchronisation costs, and how the GPU's state moved."""
        moved = state_moved(self._state, self.state()) if self._state else []
        waits = [f"one synchronisation with the GPU takes {self._wait_s * 1e6:.0f} us"] if self._wait_s else []
        return [*self._refusals, *waits, *moved]

    def _stream(self, stages: int) -> TimedStream:
        stream = TimedStream(self._cuda)
        self._state = self._state or self.state()
        if stages > 1 and not self._wait_s:
            self._wait_s = stream.wait_s()
        return stream

    def _load(self, stages: Sequence[bytes], stream: TimedStream, shape: Shape) -> list[EngineStage]:
        return self._load_plans([partial(self._builder.plan, stage) for stage in stages], stream, shape)

    def _load_plans(
        self, plans: Sequence[Callable[[Shape], Plan]], stream: TimedStream, shape: Shape
    ) -> list[EngineStage]:
        """Returns stages, each of which reads the buffer that the one before it writes."""
        loaded: list[EngineStage] = []
        for plan in plans:
            feed = loaded[-1].results[0] if loaded else None
            wanted = feed.shape if feed else shape
            loaded.append(load_stage(plan(wanted), wanted, stream, feed))
        self._refusals |= dict.fromkeys(stage.graph_refusal for stage in loaded if stage.graph_refusal)
        return loaded

    @cached_property
    def _cuda(self) -> Cuda:
        return Cuda.find()

    @cached_property
    def _builder(self) -> "EngineBuilder":
        return EngineBuilder(timing_cache_file(library().__version__, self._cuda), self.capabilities().sparse_2_4)


class EngineBuilder:
    """Builds ONNX stages into plans; the latest of them are kept, because a reference is opened again and again.

    Args:
        timing_cache: the file that makes the next build faster.
        sparse: whether layers whose weights are 2:4 may use the GPU's sparse kernels.
    """

    def __init__(self, timing_cache: Path, sparse: bool = False) -> None:
        self._sparse = sparse
        self._trt = library()
        self._timing_cache = timing_cache
        self._plans: dict[tuple[bytes, Shape], Plan] = {}

    def plan(self, stage: bytes, shape: Shape) -> Plan:
        """Returns a stage built for inputs of one shape, `(n, c, h, w)`.

        Raises:
            EngineError: TensorRT cannot read or build the stage; its own words are passed on.
            OutOfDeviceMemoryError: the GPU has no room for it.
        """
        key = hashlib.sha256(stage).digest(), shape
        if key not in self._plans:
            built = self._build(stage, shape)
            while len(self._plans) >= _PLANS_KEPT:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = built
        return self._plans[key]

    def _build(self, stage: bytes, shape: Shape) -> Plan:
        trt = self._trt
        builder: Builder = _started(trt.Builder)
        typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network: INetworkDefinition = builder.create_network(typed)
        self._parse(stage, network)
        config = self._config(builder, network, shape, allows(stage, "tf32"))
        self._read_timings(config)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise _refusal("TensorRT builds every stage", "keep the layer that it names at fp32, or change the model")
        self._write_timings(config)
        outputs = tuple(network.get_output(index).name for index in range(network.num_outputs))
        return Plan(bytes(engine), network.get_input(0).name, outputs)

    def _parse(self, stage: bytes, network: INetworkDefinition) -> None:
        parser: OnnxParser = self._trt.OnnxParser(network, _log())
        if not parser.parse(stage):
            errors = [_parser_line(parser.get_error(index)) for index in range(parser.num_errors)]
            _log().errors.clear()  # the log says the same without the node's name
            raise _refusal("TensorRT reads every node of a stage", "replace the layer that it names", errors)

    def _config(self, builder: Builder, network: INetworkDefinition, shape: Shape, tf32: bool) -> IBuilderConfig:
        trt = self._trt
        config: IBuilderConfig = builder.create_builder_config()
        if tf32:
            config.set_flag(trt.BuilderFlag.TF32)
        else:
            config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and no fp32
        if self._sparse:
            config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # without it, precisions cannot be proved
        config.avg_timing_iterations = _TIMINGS_PER_TACTIC  # as trtexec does; the default of 1 picks worse tactics
        source = _fitting_input(network, shape)
        if -1 in tuple(source.shape):
            profile: IOptimizationProfile = builder.create_optimization_profile()
            profile.set_shape(source.name, shape, shape, shape)
            config.add_optimization_profile(profile)
        return config

    def _read_timings(self, config: IBuilderConfig) -> None:
        stored = self._timing_cache.read_bytes() if self._timing_cache.is_file() else b""
        timings: ITimingCache = config.create_timing_cache(stored)
        if timings is None or not config.set_timing_cache(timings, False):
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def _write_timings(self, config: IBuilderConfig) -> None:
        timings: ITimingCache = config.get_timing_cache()
        if timings is None:
            return
        with suppress(OSError):  # it only saves time, so a full or read-only disk stops nothing
            write_atomically(self._timing_cache, bytes(timings.serialize()))


def _fitting_input(network: INetworkDefinition, shape: Shape) -> ITensor:
    """Returns the network's input, which takes `shape`."""
    if network.num_inputs != 1:
        raise EngineError(f"a stage has one input, got {network.num_inputs}; export the network with one")
    source: ITensor = network.get_input(0)
    declared = tuple(source.shape)
    if len(declared) != len(shape) or any(
        size not in (-1, wanted) for size, wanted in zip(declared, shape, strict=True)
    ):
        raise EngineError(f"a stage takes inputs {shape}, got {declared} for {source.name!r}; export a free batch size")
    return source


def _parser_line(error: ParserError) -> str:
    node = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_name() else ""
    return f"{node}{error.desc()}"


@cache
def _log() -> Any:
    """Returns the logger, one for the process: TensorRT goes on using the first that it is given."""
    trt = library()
    kept = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)
    base: Any = trt.ILogger

    class ErrorLog(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in kept:
                self.errors.append(msg)

    return ErrorLog()


def _started(create: Callable[[Any], Any]) -> Any:
    _log().errors.clear()  # what an earlier capture or run has said
    try:
        return create(_log())
    except TypeError as error:  # what the bindings raise when the library returns nothing
        raise _refusal("TensorRT starts", "check the driver with nvidia-smi") from error


def _refusal(rule: str, remedy: str, lines: Sequence[str] = ()) -> TargetError:
    """Returns what TensorRT has just refused, in one line with its own words."""
    said = "; ".join(" ".join(line.split()) for line in [*lines, *_log().errors]) or "no reason"
    _log().errors.clear()
    if _NO_MEMORY.search(said):
        return OutOfDeviceMemoryError(f"an engine fits the GPU's memory, got {said}; {_FREE_MEMORY}")
    return EngineError(f"{rule}, got {said}; {remedy}")


def load_stage(plan: Plan, shape: Shape, stream: TimedStream, feed: Buffer | None) -> EngineStage:
    """Returns a plan, loaded onto the GPU.

    Args:
        plan: built for `shape`.
        shape: of the inputs.
        stream: where it will run.
        feed: holds the inputs; a new one where not given.

    Raises:
        EngineError: TensorRT cannot load it.
        OutOfDeviceMemoryError: the GPU has no room for it.
    """
    trt = library()
    runtime: Runtime = _started(trt.Runtime)
    engine: ICudaEngine = runtime.deserialize_cuda_engine(plan.engine)
    context: IExecutionContext = None if engine is None else engine.create_execution_context()
    if context is None or not context.set_input_shape(plan.source, shape):
        raise _refusal("TensorRT loads what it has built", "build it on this machine")

    def buffer(name: str) -> Buffer:
        return Buffer(stream.cuda, tuple(context.get_tensor_shape(name)), trt.nptype(engine.get_tensor_dtype(name)))

    feed = feed or buffer(plan.source)
    results = [buffer(name) for name in plan.results]
    for name, held in zip((plan.source, *plan.results), (feed, *results), strict=True):
        context.set_tensor_address(name, held.address)
    return EngineStage(stream, context, feed, results, engine)


def inspect(engine: ICudaEngine) -> list[LayerRow]:
    """Returns the layers of an engine, with the precision that each of them really got.

    Raises:
        InspectionError: the engine was built without detailed profiling.
    """
    trt = library()
    inspector: EngineInspector = engine.create_engine_inspector()
    return layer_rows(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _profile() -> Any:
    base: Any = library().IProfiler

    class Profile(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.taken: dict[str, list[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.taken.setdefault(layer_name, []).append(ms / 1e3)

    return Profile()
