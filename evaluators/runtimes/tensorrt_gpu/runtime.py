"""TensorRT 10.3 to 11: the main accelerator target, with one engine per stage and batch size.

The ONNX file determines precisions: engines are strongly typed, on 10 as on 11, and TF32 is off unless the file's
metadata allows it. This is the only module that imports tensorrt, and it does so when it is needed: without tensorrt,
`TensorRT.missing` says what to install.
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
from evaluators.runtimes.device_state import DeviceState, gpu_state, state_changes
from evaluators.runtimes.tensorrt_gpu.capabilities import capabilities, timing_cache_file
from evaluators.runtimes.tensorrt_gpu.cuda import Buffer, Cuda, OutOfDeviceMemoryError, TimedStream
from evaluators.runtimes.tensorrt_gpu.engines import (
    EngineError,
    EngineSession,
    EngineStage,
    SerializedEngine,
    Shape,
    layer_seconds,
)
from evaluators.runtimes.tensorrt_gpu.inspector import LayerRow, layer_rows
from spaces.cache import write_atomically

# tensorrt has no types. These are its classes' names. A test compares them with the real bindings: every attribute used
# of a variable with such an annotation has to exist, in every supported version.
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

EngineForShape: TypeAlias = Callable[[Shape], SerializedEngine]
"""Returns a stage's engine for inputs of a shape."""

_OLDEST, _FIRST_UNSUPPORTED = (10, 3), (12, 0)
_INSTALL = "pip install 'tensorrt>=10.3,<12'; on a Jetson it comes with JetPack 6 or newer"
_NO_MEMORY = re.compile(r"out of memory|OutOfMemory", re.IGNORECASE)
_FREE_MEMORY = "use a smaller batch, or free the GPU"
_TIMINGS_PER_TACTIC = 8
_ENGINES_KEPT = 8


def library() -> Any:
    """Returns the tensorrt module.

    Raises:
        TargetError: it is not installed, or its version is not supported.
    """
    try:
        import tensorrt as trt  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except (ImportError, OSError) as error:
        raise TargetError(f"the tensorrt package must be importable, got {str(error)!r}; {_INSTALL}") from error
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if not _OLDEST <= version < _FIRST_UNSUPPORTED:
        raise TargetError(f"TensorRT is 10.3 to 11.x, got {trt.__version__}; {_INSTALL}")
    return trt


class TensorRT:
    """Runs artifacts as engines on the first GPU."""

    name = "tensorrt"

    def __init__(self) -> None:
        self._graph_errors: dict[str, None] = {}
        self._first_state: DeviceState | None = None
        self._synchronisation_s = 0.0

    @staticmethod
    def missing() -> str | None:
        """Returns why this runtime cannot be used here and what to do about it; None if it can."""
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
        """Returns the capabilities of the GPU's generation."""
        return capabilities(self._cuda.device().capability)

    def state(self) -> DeviceState:
        """Returns the GPU's clocks, power mode and temperature."""
        return gpu_state(self._cuda.bus_id())

    def deployable(self, model: bytes) -> bytes:
        """Returns the model unchanged: TensorRT reads symmetric int8."""
        return model

    def open(
        self,
        stages: Sequence[bytes],
        plan: Steps,
        threads: int,  # noqa: ARG002
        confidence: str = "softmax",
        input_size: int | None = None,
    ) -> EngineSession:
        """Returns a session that builds engines at the first call with a batch size; `threads` is not used.

        Raises:
            TargetError: the plan skips blocks, which this runtime cannot do.
        """
        thresholds = exit_thresholds(plan)
        stream = self._stream(len(stages))
        return EngineSession(
            partial(self._load, tuple(stages), stream),
            stream,
            thresholds,
            inspect,
            confidence=confidence,
            input_size=input_size,
        )

    def open_engines(
        self, description: bytes, folder: Path, thresholds: Sequence[float], confidence: str = "softmax"
    ) -> EngineSession:
        """Returns a session on the engines that `extras` returned, without building them again.

        Args:
            description: the content of `engines.json`.
            folder: of the engines' files.
            thresholds: the confidence from which each exit answers.
            confidence: measure of confidence: `softmax`, `margin` or `entropy`.
        """
        engines = [
            SerializedEngine((folder / entry["file"]).read_bytes(), entry["source"], tuple(entry["results"]))
            for entry in json.loads(description)["engines"]
        ]
        stream = self._stream(len(engines))
        built: list[EngineForShape] = [lambda _, engine=engine: engine for engine in engines]  # type: ignore[misc]
        return EngineSession(
            partial(self._load_engines, built, stream), stream, thresholds, inspect, confidence=confidence
        )

    def tensors(self, model: bytes) -> TensorReader:
        """Returns a function from a batch to all outputs of a file, from an engine built for that batch."""
        session = self.open([model], [], 1)

        def read(images: Images) -> dict[str, Images]:
            (stage,) = session.stages(images.shape)
            names = self._builder.build(model, images.shape).outputs
            return dict(zip(names, stage.all_outputs(images), strict=True))

        return read

    def extras(self, stages: Sequence[bytes], images: Images) -> dict[str, bytes]:
        """Returns the engines for this TensorRT, this kind of GPU and batches as large as `images`, and `engines.json`.

        `engines.json` has the names of inputs and outputs, the timing cache's key, and for each layer the precisions
        from the inspector and the seconds from separate profiled runs.
        """
        loaded = self._load(tuple(stages), TimedStream(self._cuda), images.shape)
        shapes = [images.shape, *(stage.outputs[0].shape for stage in loaded[:-1])]
        engines = [self._builder.build(stage, shape) for stage, shape in zip(stages, shapes, strict=True)]
        files = {f"stage{index + 1}.engine": each.content for index, each in enumerate(engines)}
        entries = [
            {
                "file": file,
                "source": each.input,
                "results": each.outputs,
                "layers": [asdict(row) for row in inspect(stage.engine)],
                "seconds": layer_seconds(stage, _layer_profiler()),
            }
            for file, each, stage in zip(files, engines, loaded, strict=True)
        ]
        description = {"timing_cache": timing_cache_file(library().__version__, self._cuda).stem, "engines": entries}
        return files | {"engines.json": json.dumps(description, indent=1).encode()}

    def remarks(self) -> list[str]:
        """Returns why engines ran without a CUDA graph, the cost of a synchronisation, and changes of the GPU's state.

        The last are the changes since the first session was opened.
        """
        changes = state_changes(self._first_state, self.state()) if self._first_state else []
        cost_us = self._synchronisation_s * 1e6
        costs = [f"one synchronisation with the GPU takes {cost_us:.0f} us"] if cost_us else []
        return [*self._graph_errors, *costs, *changes]

    def _stream(self, stages: int) -> TimedStream:
        stream = TimedStream(self._cuda)
        self._first_state = self._first_state or self.state()
        if stages > 1 and not self._synchronisation_s:
            self._synchronisation_s = stream.synchronisation_s()
        return stream

    def _load(self, stages: Sequence[bytes], stream: TimedStream, shape: Shape) -> list[EngineStage]:
        return self._load_engines([partial(self._builder.build, stage) for stage in stages], stream, shape)

    def _load_engines(self, engines: Sequence[EngineForShape], stream: TimedStream, shape: Shape) -> list[EngineStage]:
        """Returns the stages, each of which reads the output buffer of the one before it."""
        loaded: list[EngineStage] = []
        for engine_for in engines:
            input_buffer = loaded[-1].outputs[0] if loaded else None
            input_shape = input_buffer.shape if input_buffer else shape
            loaded.append(load_stage(engine_for(input_shape), input_shape, stream, input_buffer))
        self._graph_errors |= dict.fromkeys(stage.graph_error for stage in loaded if stage.graph_error)
        return loaded

    @cached_property
    def _cuda(self) -> Cuda:
        return Cuda.find()

    @cached_property
    def _builder(self) -> "EngineBuilder":
        return EngineBuilder(timing_cache_file(library().__version__, self._cuda), self.capabilities().sparse_2_4)


class EngineBuilder:
    """Builds engines from ONNX stages and keeps the latest ones, because a reference is opened again and again.

    Args:
        timing_cache: file with the timings of kernels, which make later builds faster.
        sparse: whether layers whose weights are 2:4 may use the GPU's sparse kernels.
    """

    def __init__(self, timing_cache: Path, sparse: bool = False) -> None:
        self._sparse = sparse
        self._trt = library()
        self._timing_cache = timing_cache
        self._engines: dict[tuple[bytes, Shape], SerializedEngine] = {}

    def build(self, stage: bytes, shape: Shape) -> SerializedEngine:
        """Returns the engine of a stage for inputs of one shape, `(n, c, h, w)`.

        Raises:
            EngineError: TensorRT cannot read or build the stage; its messages are included.
            OutOfDeviceMemoryError: the GPU has no memory for it.
        """
        key = hashlib.sha256(stage).digest(), shape
        if key not in self._engines:
            engine = self._build(stage, shape)
            while len(self._engines) >= _ENGINES_KEPT:
                del self._engines[next(iter(self._engines))]
            self._engines[key] = engine
        return self._engines[key]

    def _build(self, stage: bytes, shape: Shape) -> SerializedEngine:
        trt = self._trt
        builder: Builder = _created(trt.Builder)
        typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network: INetworkDefinition = builder.create_network(typed)
        self._parse(stage, network)
        config = self._config(builder, network, shape, allows(stage, "tf32"))
        self._read_timings(config)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise _engine_error(
                "TensorRT builds every stage", "keep the layer that it names at fp32, or change the model"
            )
        self._write_timings(config)
        outputs = tuple(network.get_output(index).name for index in range(network.num_outputs))
        return SerializedEngine(bytes(engine), network.get_input(0).name, outputs)

    def _parse(self, stage: bytes, network: INetworkDefinition) -> None:
        parser: OnnxParser = self._trt.OnnxParser(network, _log())
        if not parser.parse(stage):
            errors = [_parser_line(parser.get_error(index)) for index in range(parser.num_errors)]
            _log().errors.clear()  # the log has the same errors without the node's name
            raise _engine_error("TensorRT reads every node of a stage", "replace the layer that it names", errors)

    def _config(self, builder: Builder, network: INetworkDefinition, shape: Shape, tf32: bool) -> IBuilderConfig:
        trt = self._trt
        config: IBuilderConfig = builder.create_builder_config()
        if tf32:
            config.set_flag(trt.BuilderFlag.TF32)
        else:
            config.clear_flag(trt.BuilderFlag.TF32)  # it is on by default, and less precise than fp32
        if self._sparse:
            config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # reports precisions
        config.avg_timing_iterations = _TIMINGS_PER_TACTIC  # as in trtexec; the default of 1 selects worse kernels
        tensor = _checked_input(network, shape)
        if -1 in tuple(tensor.shape):
            profile: IOptimizationProfile = builder.create_optimization_profile()
            profile.set_shape(tensor.name, shape, shape, shape)
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
        with suppress(OSError):  # the cache only saves time, so a full or read-only disk is no error
            write_atomically(self._timing_cache, bytes(timings.serialize()))


def _checked_input(network: INetworkDefinition, shape: Shape) -> ITensor:
    """Returns the network's input.

    Raises:
        EngineError: there is not exactly one, or it does not accept `shape`.
    """
    if network.num_inputs != 1:
        raise EngineError(f"a stage has one input, got {network.num_inputs}; export the network with one")
    tensor: ITensor = network.get_input(0)
    declared = tuple(tensor.shape)
    if len(declared) != len(shape) or any(size not in (-1, given) for size, given in zip(declared, shape, strict=True)):
        raise EngineError(f"a stage takes inputs {shape}, got {declared} for {tensor.name!r}; export a free batch size")
    return tensor


def _parser_line(error: ParserError) -> str:
    node = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_name() else ""
    return f"{node}{error.desc()}"


@cache
def _log() -> Any:
    """Returns the process's only logger, because TensorRT keeps using the first one that it gets."""
    trt = library()
    severities = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)
    base: Any = trt.ILogger

    class ErrorLog(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in severities:
                self.errors.append(msg)

    return ErrorLog()


def _created(create: Callable[[Any], Any]) -> Any:
    """Returns a builder or a runtime with the logger.

    Raises:
        EngineError: TensorRT cannot be used here.
    """
    _log().errors.clear()  # errors of earlier captures and runs
    try:
        return create(_log())
    except TypeError as error:  # the bindings raise it when the library returns a null pointer
        raise _engine_error("TensorRT starts", "check the driver with nvidia-smi") from error


def _engine_error(rule: str, remedy: str, lines: Sequence[str] = ()) -> TargetError:
    """Returns the error for TensorRT's last failure, with its own messages in one line, and clears the log."""
    messages = "; ".join(" ".join(line.split()) for line in [*lines, *_log().errors]) or "no reason"
    _log().errors.clear()
    if _NO_MEMORY.search(messages):
        return OutOfDeviceMemoryError(f"an engine fits the GPU's memory, got {messages}; {_FREE_MEMORY}")
    return EngineError(f"{rule}, got {messages}; {remedy}")


def load_stage(
    serialized: SerializedEngine, shape: Shape, stream: TimedStream, input_buffer: Buffer | None
) -> EngineStage:
    """Returns an engine, loaded onto the GPU.

    Args:
        serialized: built for `shape`.
        shape: of the inputs.
        stream: where it will run.
        input_buffer: holds the inputs; None for a new one.

    Raises:
        EngineError: TensorRT cannot load it.
        OutOfDeviceMemoryError: the GPU has no memory for it.
    """
    trt = library()
    runtime: Runtime = _created(trt.Runtime)
    engine: ICudaEngine = runtime.deserialize_cuda_engine(serialized.content)
    context: IExecutionContext = None if engine is None else engine.create_execution_context()
    if context is None or not context.set_input_shape(serialized.input, shape):
        raise _engine_error("TensorRT loads what it has built", "build it on this machine")

    def buffer(name: str) -> Buffer:
        return Buffer(stream.cuda, tuple(context.get_tensor_shape(name)), trt.nptype(engine.get_tensor_dtype(name)))

    input_buffer = input_buffer or buffer(serialized.input)
    outputs = [buffer(name) for name in serialized.outputs]
    names = (serialized.input, *serialized.outputs)
    for name, tensor_buffer in zip(names, (input_buffer, *outputs), strict=True):
        context.set_tensor_address(name, tensor_buffer.address)
    return EngineStage(stream, context, input_buffer, outputs, engine)


def inspect(engine: ICudaEngine) -> list[LayerRow]:
    """Returns the layers of an engine, with the precisions that they run in.

    Raises:
        InspectionError: the engine was built without detailed profiling.
    """
    trt = library()
    inspector: EngineInspector = engine.create_engine_inspector()
    return layer_rows(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _layer_profiler() -> Any:
    """Returns a TensorRT profiler that collects the seconds of each layer's runs."""
    base: Any = library().IProfiler

    class LayerProfiler(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.seconds: dict[str, list[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.seconds.setdefault(layer_name, []).append(ms / 1e3)

    return LayerProfiler()
