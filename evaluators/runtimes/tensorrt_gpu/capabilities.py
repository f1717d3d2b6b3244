"""The capabilities of a GPU with TensorRT, by its compute capability, and the file of its timing cache."""

import os
from pathlib import Path

from evaluators.runtimes.base import Capabilities
from evaluators.runtimes.tensorrt_gpu.cuda import Cuda
from spaces import cache

_FIRST_CAPABILITY = {"fp32": (0, 0), "fp16": (7, 0), "fp8": (8, 9), "int8": (6, 1)}
"""The compute capability from which each precision has fast instructions. Source: TensorRT support matrix."""
_AMPERE = (8, 0)
"""The first compute capability with TF32 and sparse tensor cores."""
_CHANNEL_STEPS = {"fp32": 8, "tf32": 4, "fp16": 8, "fp16 2:4": 16, "fp8": 16, "int8": 32}
"""Numbers of channels are padded to multiples of these. fp32 needs no padding; with multiples of 8 a layer may be fp16
in another version.

Source: TensorRT documentation, Optimizing performance, tensor cores; fp8: 16 bytes, the width of one load.
"""


def capabilities(capability: tuple[int, int]) -> Capabilities:
    """Returns the precisions of a GPU's generation, and TF32 and 2:4 from Ampere on.

    TF32 is not among the precisions: it is a flag of a whole engine, while precision is searched per layer, and fp16
    has the same ten bits of mantissa at twice the peak rate. `target.fp32_in = "tf32"` in a study turns it on for all
    fp32 layers.

    An int8 residual addition has Q/DQ on its residual input only, so that it fuses into the convolution. Layers of
    fewer than 16 channels stay out of 8 bits, in which they are slower.
    Source: TensorRT documentation, Working with quantized types.
    """
    precisions = tuple(name for name, first in _FIRST_CAPABILITY.items() if capability >= first)
    ampere = capability >= _AMPERE
    supported = {*precisions, *(("tf32", "fp16 2:4") if ampere else ())}
    return Capabilities(
        precisions,
        channel_steps={name: step for name, step in _CHANNEL_STEPS.items() if name in supported},
        weight_bits=8,
        dynamic_batch=False,
        quantized_add="residual",
        int8_channels=16,
        sparse_2_4=ampere,
        compiles=True,
        fp32_in=("tf32",) if ampere else (),
        clock="gpu",
    )


def timing_cache_file(version: str, cuda: Cuda) -> Path:
    """Returns the file with the timings of kernels, which are valid for one TensorRT, CUDA, driver and GPU."""
    device = cuda.device()
    key = (version, cuda.runtime_version(), cuda.driver_version(), device.name, device.capability)
    folder = os.environ.get("DEPLOYFRONT_CACHE")
    if not folder:
        import platformdirs  # a board may lack it; there the worker sets the variable

        folder = platformdirs.user_cache_dir("deployfront")
    return Path(folder) / "tensorrt" / f"timing-{cache.key(repr(key))}.cache"
