"""A tensorrt module whose engines run on a scripted GPU, and layers as its inspector writes them."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.helpers.scripted_gpu import CLASSES, ScriptedEngine, ScriptedGpu, first_half, second_half


class ScriptedTensorRT(SimpleNamespace):
    """A tensorrt module whose engines run on a scripted GPU; a stage's file is `first`, `second` or the like."""

    __version__ = "10.9.0.34"
    IProfiler = type("IProfiler", (), {})
    ILogger = type("ILogger", (), {"Severity": SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)})
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    BuilderFlag = SimpleNamespace(TF32="TF32", SPARSE_WEIGHTS="SPARSE_WEIGHTS")
    ProfilingVerbosity = SimpleNamespace(DETAILED="DETAILED")
    LayerInformationFormat = SimpleNamespace(JSON=1)
    information = "{}"

    def __init__(self, gpu: ScriptedGpu) -> None:
        super().__init__(gpu=gpu, says="", configs=[])
        self.nptype = lambda datatype: datatype

    def Builder(self, log: Any) -> Any:  # noqa: N802
        def build(network: Any, config: Any) -> bytes | None:
            if self.says:
                log.log(1, self.says)
                return None
            self.configs.append(config)
            return bytes(network.stage)

        profile = SimpleNamespace(set_shape=lambda name, *shapes: profile.__dict__.update({name: shapes}))
        return SimpleNamespace(
            create_network=lambda flags: SimpleNamespace(num_inputs=1, flags=flags),
            create_builder_config=self.config,
            create_optimization_profile=lambda: profile,
            build_serialized_network=build,
        )

    def config(self) -> Any:
        made = SimpleNamespace(cleared=[], set=[], profiles=[], timings=None)
        made.set_flag = made.set.append
        made.clear_flag, made.add_optimization_profile = made.cleared.append, made.profiles.append
        made.create_timing_cache = lambda stored: SimpleNamespace(stored=stored, serialize=lambda: stored + b"t")
        made.set_timing_cache = lambda timings, _: made.__dict__.update(timings=timings) or True
        made.get_timing_cache = lambda: made.timings
        return made

    def OnnxParser(self, network: Any, log: Any) -> Any:  # noqa: N802
        def parse(stage: bytes) -> bool:
            names = {b"first": ["features", "logits"]}.get(stage, ["logits"])
            network.stage, network.num_outputs = stage, len(names)
            network.get_input = lambda _: SimpleNamespace(name="in", shape=(-1, -1, -1, -1))
            network.get_output = lambda index: SimpleNamespace(name=names[index])
            return stage != b"bad"

        error = SimpleNamespace(node_name=lambda: "/a/Bogus", node_operator=lambda: "Bogus", desc=lambda: "no importer")
        return SimpleNamespace(parse=parse, num_errors=1, get_error=lambda _: error)

    def Runtime(self, log: Any) -> Any:  # noqa: N802
        context = lambda plan: ScriptedContext(self.gpu, bytes(plan))  # noqa: E731
        return SimpleNamespace(
            deserialize_cuda_engine=lambda plan: SimpleNamespace(
                create_execution_context=lambda: context(plan),
                get_tensor_dtype=lambda _: np.float32,
                create_engine_inspector=lambda: SimpleNamespace(get_engine_information=lambda _: self.information),
            )
        )


class ScriptedContext:
    """An execution context, which learns its shape and addresses before it runs."""

    def __init__(self, gpu: ScriptedGpu, plan: bytes) -> None:
        self._gpu, self._plan = gpu, plan
        self._shape: tuple[int, ...] = ()
        self._addresses: dict[str, int] = {}
        self.profiler: Any = None

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shape = shape
        return name == "in"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self._shape[0], CLASSES) if name == "logits" else self._shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        compute = first_half if self._plan == b"first" else second_half
        names = [name for name in self._addresses if name != "in"]
        places = [(self._addresses[name], self.get_tensor_shape(name)) for name in ("in", *names)]
        if self.profiler is not None:
            self.profiler.report_layer_time("/stem/Conv", 1.0)
        return ScriptedEngine(self._gpu, "c", 1e-3, compute, places[0], places[1:]).execute_async_v3(stream)


def layer(name: str, source: Any, result: Any, weights: str | None = None, kind: str = "CaskConvolution") -> Any:
    """Returns one layer as the inspector writes it, its tensors' fields as that version has them."""
    tensors = {"Inputs": [{"Name": "in", **source}], "Outputs": [{"Name": "out", **result}]}
    told = {"Weights": {"Type": weights, "Count": 432}} if weights else {}
    return {"Name": name, "LayerType": kind, **tensors, **told, "TacticName": "t", "StreamId": 0, "Metadata": ""}


def v10(text: str) -> dict[str, Any]:
    return {"Location": "Device", "Dimensions": [4, 16, 8, 8], "Format/Datatype": text}


def v11(datatype: str) -> dict[str, Any]:
    return {"Location": "Device", "Dimensions": [4, 16, 8, 8], "Format": "Row major linear", "DataType": datatype}
