"""OpenVINO on the CPU: stages compiled for the batch sizes that they meet.

This is the only module that imports openvino to measure, and only when it is needed, so that it can be asked what is
missing anywhere.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np

from evaluators.inference.sessions import BatchSizes, PaddedStage, openvino_has_bf16, openvino_settings
from evaluators.inference.staged import Steps
from evaluators.runtimes.base import Capabilities, Images, Proof, TargetError, TensorReader, TimedBatch, allows
from evaluators.runtimes.cpu import weight_bits
from evaluators.runtimes.local import LoadedStage, LocalRuntime, LocalSession
from evaluators.runtimes.onnx_rewrites.unsigned_activations import unsigned_activations

_INSTALL = "pip install 'openvino>=2025.0'"
_KEPT_BYTES = 256_000_000
"""So much of what was compiled last is kept: a reference is opened again and again."""
_FLOATS = {"f32", "bf16"}
_RUN_AS: Mapping[str, set[str]] = {"fp32": _FLOATS, "int4": _FLOATS, "int8": {"u8", "i8"}}
"""The types that OpenVINO may run a layer in, by the precision that it was written in."""
_LAYERS = {"Convolution", "FullyConnected", "MatMul"}


def library() -> Any:
    """Returns the openvino module.

    Raises:
        TargetError: it is not installed, or too old.
    """
    try:
        import openvino
    except (ImportError, OSError) as error:
        raise TargetError(f"the openvino package must be importable, got {str(error)!r}; {_INSTALL}") from error
    if int(openvino.__version__.split(".")[0]) < 2025:
        raise TargetError(f"OpenVINO is 2025.0 or later, got {openvino.__version__}; {_INSTALL}")
    return openvino


class OpenVino(LocalRuntime):
    """Compiled models of OpenVINO's CPU plugin, one for each stage and shape."""

    name = "openvino"

    def __init__(self) -> None:
        self._kept: dict[tuple[str, ...], bytes] = {}
        self._lacks_bf16 = False

    @staticmethod
    def missing() -> str | None:
        """Returns why this runtime cannot be used here and what to do about it; None where it can."""
        try:
            library()
        except TargetError as error:
            return str(error)
        return None

    def version(self) -> str:
        """Returns the library's name and version."""
        return f"openvino {library().__version__.partition('-')[0]}"

    def capabilities(self) -> Capabilities:
        """Returns fp32 and int8, channels in eights, 4-bit weights as storage, and bf16 where the CPU multiplies it.

        Kernels work on 16 channels, but the last 8 of them cost less than the first, so eights are worth offering.
        Stages that hand on u8 take 1% less time at batch 1 than with floats, 3% less at 16; channels-last, more.
        """
        return Capabilities(
            ("fp32", "int8"),
            {"fp32": 8, "int8": 8},
            weight_bits(),
            dynamic_batch=True,
            fp32_in=("bf16",) if openvino_has_bf16(self._core) else (),
            storage=("int4",),
            skips=True,
            features="u8",
        )

    def deployable(self, model: bytes) -> bytes:
        """Returns the model with u8 activations, which need no correction: 10 to 15% faster for ResNet-20."""
        return unsigned_activations(model)

    def open(
        self,
        stages: Sequence[bytes],
        plan: Steps,
        threads: int,
        confidence: str = "softmax",
        input_size: int | None = None,
    ) -> "OpenedModels":
        """Returns stages that are compiled at the first call with a batch size."""
        settings, sizes = self._settings(stages, threads), BatchSizes()
        loaded = [PaddedStage(partial(self._compiled, stage, settings), sizes) for stage in stages]
        return OpenedModels(loaded, plan, threads, confidence, input_size)

    def load(self, model: bytes, threads: int) -> LoadedStage:
        """Returns one file, compiled at the first call with a batch size."""
        return PaddedStage(partial(self._compiled, model, self._settings([model], threads)), BatchSizes())

    def _settings(self, stages: Sequence[bytes], threads: int) -> Mapping[str, Any]:
        """Returns OpenVINO's settings, and notes where files want a type that this CPU lacks."""
        wanted, able = any(allows(stage, "bf16") for stage in stages), openvino_has_bf16(self._core)
        self._lacks_bf16 |= wanted and not able
        return openvino_settings(threads, wanted and able)

    def tensors(self, model: bytes) -> TensorReader:
        """Returns a function from a batch to all outputs of a file, as float32; half precision runs in f32."""
        settings = openvino_settings(1, allows(model, "bf16") and openvino_has_bf16(self._core))

        def watch(images: Images) -> dict[str, Images]:
            compiled = self._compiled(model, settings, images.shape)
            found = compiled(images.astype(compiled.input(0).element_type.to_dtype(), copy=False))
            return {output.get_any_name(): found[output].astype(np.float32) for output in compiled.outputs}

        return watch

    def remarks(self) -> list[str]:
        """Returns whether a file wanted bf16 from a CPU that has none."""
        return ["fp32 layers ran in fp32: this CPU does not multiply the bf16 that the file allows"] * self._lacks_bf16

    @cached_property
    def _core(self) -> Any:
        return library().Core()

    def _compiled(self, stage: bytes, settings: Mapping[str, Any], shape: tuple[int, ...]) -> Any:
        """Returns a stage's compiled model for inputs of one shape, read from what was kept of an equal one."""
        key = (hashlib.sha256(stage).hexdigest(), str(settings), str(shape))
        kept = self._kept.pop(key, None)
        if kept is None:
            model = self._core.read_model(stage)
            model.reshape(list(shape))
            compiled = self._core.compile_model(model, "CPU", dict(settings))
            kept = compiled.export_model().getvalue()
        else:
            compiled = self._core.import_model(kept, "CPU", dict(settings))
        self._kept[key] = kept
        while len(self._kept) > 1 and sum(map(len, self._kept.values())) > _KEPT_BYTES:
            del self._kept[next(iter(self._kept))]
        return compiled


class OpenedModels(LocalSession):
    """An artifact whose stages OpenVINO has compiled.

    With one thread OpenVINO runs a stage in the thread that calls it, whose CPU time is all of the work.

    Args:
        stages: each maps a batch to what its step wants.
        plan: the confidence from which each exit answers, or the steps.
        threads: that the stages use.
        confidence: what the gates ask for.
        input_size: height and width that images are resized to; None for their own.
    """

    def __init__(
        self,
        stages: Sequence[PaddedStage],
        plan: Steps,
        threads: int,
        confidence: str,
        input_size: int | None = None,
    ) -> None:
        super().__init__(stages, plan, threads, confidence, input_size=input_size)
        self._stages = tuple(stages)

    def proof(self, images: Images, precisions: Mapping[str, str]) -> Proof:
        """Returns which layers run in another precision than the file says, as OpenVINO's own graph tells.

        A Gemm in float is named after its output there, so it is not asked for.
        """
        self._call(images, TimedBatch(0, len(images), longest=True))()  # so that every stage is compiled
        # Only the files of gates alone are not; what is in them is in the stages before them as well.
        ran = [told for stage in self._stages if stage.requests for told in _types(stage)]
        differences, unproven = [], []
        for node, given in precisions.items():
            kinds = {kind for names, kind in ran if any(f"{name}/".startswith(f"{node}/") for name in names)}
            differences += [f"{node}: asked for {given}, but runs in {kind}" for kind in kinds - _RUN_AS[given]]
            unproven += [node] * (given == "int8" and not kinds)
        return Proof(tuple(differences), tuple(unproven))


def _types(stage: PaddedStage) -> Iterator[tuple[list[str], str]]:
    """Yields the names that the file has for each convolution and product of a stage, and the type that it runs in."""
    request = next(iter(stage.requests.values()))
    for operation in request.get_compiled_model().get_runtime_model().get_ordered_ops():
        told = {name: _text(value) for name, value in operation.get_rt_info().items()}
        if told["layerType"] in _LAYERS:
            yield told["originalLayersNames"].split(","), told["runtimePrecision"]


def _text(value: Any) -> str:
    return str(value.astype(str)) if hasattr(value, "astype") else str(value)
