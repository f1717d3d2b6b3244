"""The CUDA runtime through ctypes: what it takes to run, capture and time engines, without torch or cuda-python.

So the same file works on a server and on a Jetson. The device is the first one that `CUDA_VISIBLE_DEVICES` leaves.
"""

import ctypes
import importlib.util
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from evaluators.runtimes.base import TargetError

_LIBRARIES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")

_NON_BLOCKING = 1
_CAPTURE_THREAD_LOCAL = 1
_TO_DEVICE, _TO_HOST = 1, 2
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_SUCCESS, _OLD_DRIVER = 0, 35


class CudaError(TargetError):
    """A call of the CUDA runtime that failed."""


class NoCudaLibraryError(CudaError):
    """There is no libcudart."""


class NoDriverError(CudaError):
    """There is no NVIDIA driver, or one that is too old."""


class NoGpuError(CudaError):
    """There is a driver, but no GPU to use."""


class OutOfDeviceMemoryError(CudaError):
    """The GPU's memory is full."""


class LaunchError(CudaError):
    """The GPU did not finish what it was given, or was lost on the way."""


class CaptureError(CudaError):
    """Work that cannot become a CUDA graph; the stream goes on as before."""


@dataclass(frozen=True)
class _Meaning:
    """What an error code is to the user."""

    kind: type[CudaError]
    rule: str
    remedy: str


_NO_DRIVER = _Meaning(
    NoDriverError, "CUDA needs an NVIDIA driver as new as itself", "install or update the driver; nvidia-smi shows it"
)
_NO_GPU = _Meaning(NoGpuError, "CUDA sees a free GPU", "see nvidia-smi, and CUDA_VISIBLE_DEVICES if it is set")
_FULL = _Meaning(OutOfDeviceMemoryError, "an engine fits the GPU's memory", "use a smaller batch, or free the GPU")
_LOST = _Meaning(
    LaunchError,
    "the GPU finishes what it is given",
    "start again: this process can no longer use the GPU; the system log tells more (dmesg, lines with Xid)",
)
_MEANINGS: Mapping[int, _Meaning] = (
    {2: _FULL}
    | dict.fromkeys((34, 35, 803, 804), _NO_DRIVER)
    | dict.fromkeys((46, 100, 101), _NO_GPU)
    | dict.fromkeys((214, 226, 700, 701, 702, 710, 714, 715, 716, 717, 718, 719, 999), _LOST)
)
"""Source: CUDA Runtime API, cudaError_t. Every other code is an error without a remedy of its own."""


@dataclass(frozen=True)
class Device:
    """A GPU: its name, its compute capability, and its memory in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int


class _Properties(ctypes.Structure):
    """The beginning of cudaDeviceProp, which is the same from CUDA 10 to 13, and room for the rest."""

    _fields_ = (
        ("name", ctypes.c_char * 256),
        ("uuid", ctypes.c_byte * 16),
        ("luid", ctypes.c_byte * 8),
        ("luid_mask", ctypes.c_uint),
        ("memory", ctypes.c_size_t),
        ("rest", ctypes.c_byte * 4096),
    )


class Handle:
    """Something that belongs to the CUDA runtime, given back when nobody refers to it any more."""

    def __init__(self, value: int, give_back: Callable[[int], object]) -> None:
        self.value = value
        weakref.finalize(self, give_back, value)

    @property
    def pointer(self) -> ctypes.c_void_p:
        """The value as an argument; a plain int would be cut to 32 bits."""
        return ctypes.c_void_p(self.value)


class Cuda:
    """The calls of one libcudart.

    Args:
        library: libcudart, loaded.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self._library.cudaGetErrorString.restype = ctypes.c_char_p

    @staticmethod
    def find() -> "Cuda":
        """Returns the newest libcudart that this machine's driver can serve.

        Raises:
            NoCudaLibraryError: there is none.
        """
        libraries = list(_libraries())
        if not libraries:
            raise NoCudaLibraryError(
                f"TensorRT needs the CUDA runtime, got none of {', '.join(_LIBRARIES)}; pip install nvidia-cuda-runtime"
            )
        served = [library for library in libraries if library.cudaGetDeviceCount(_out_int()) != _OLD_DRIVER]
        return Cuda((served or libraries)[0])

    def call(self, function: str, *arguments: Any) -> None:
        """Calls a function of the library.

        Raises:
            CudaError: it failed; the class tells what the user can do.
        """
        self._check(function, getattr(self._library, function)(*arguments))

    def raise_last(self) -> None:
        """Raises the error that a library above this one has met, if there is one, and forgets it."""
        self._check("cudaGetLastError", self._library.cudaGetLastError())

    def device(self) -> Device:
        """Returns the GPU.

        Raises:
            NoDriverError: there is no driver, or one that is too old.
            NoGpuError: there is no GPU.
        """
        count = ctypes.c_int()
        self.call("cudaGetDeviceCount", ctypes.byref(count))
        if not count.value:
            raise NoGpuError(f"{_NO_GPU.rule}, got 0 GPUs; {_NO_GPU.remedy}")
        found = _Properties()
        self.call("cudaGetDeviceProperties", ctypes.byref(found), ctypes.c_int(0))
        capability = (self._attribute(_CAPABILITY_MAJOR), self._attribute(_CAPABILITY_MINOR))
        return Device(found.name.decode(errors="replace"), capability, found.memory)

    def runtime_version(self) -> str:
        """Returns the version of the CUDA runtime, such as 12.6."""
        return self._version("cudaRuntimeGetVersion")

    def driver_version(self) -> str:
        """Returns the newest version of CUDA that the driver serves; 0.0 without a driver."""
        return self._version("cudaDriverGetVersion")

    def stream(self) -> Handle:
        """Returns a new stream that does not wait for the default one."""
        return self._made("cudaStreamCreateWithFlags", "cudaStreamDestroy", ctypes.c_uint(_NON_BLOCKING))

    def event(self) -> Handle:
        """Returns a new event that keeps the time."""
        return self._made("cudaEventCreate", "cudaEventDestroy")

    def allocate(self, size: int) -> Handle:
        """Returns `size` bytes of device memory."""
        return self._made("cudaMalloc", "cudaFree", ctypes.c_size_t(size))

    def allocate_host(self, size: int) -> Handle:
        """Returns `size` bytes of page-locked host memory, from which copies do not stall the stream."""
        return self._made("cudaMallocHost", "cudaFreeHost", ctypes.c_size_t(size))

    def capture(self, stream: Handle, enqueue: Callable[[], object]) -> Handle:
        """Returns what `enqueue` puts on the stream as a graph that can be launched.

        Raises:
            CaptureError: it cannot be captured.
            OutOfDeviceMemoryError: there is no room for the graph.
            LaunchError: the GPU was lost.
        """
        graph = ctypes.c_void_p()
        try:
            self.call("cudaStreamBeginCapture", stream.pointer, ctypes.c_int(_CAPTURE_THREAD_LOCAL))
            enqueue()
            self.call("cudaStreamEndCapture", stream.pointer, ctypes.byref(graph))
            return self._instantiated(graph)
        except (OutOfDeviceMemoryError, LaunchError):
            raise
        except CudaError as error:
            self._library.cudaStreamEndCapture(stream.pointer, ctypes.byref(graph))
            self._library.cudaGetLastError()
            raise CaptureError(f"an engine becomes a CUDA graph, got {error}; it runs without one") from error

    def launch(self, graph: Handle, stream: Handle) -> None:
        """Puts a graph on a stream."""
        self.call("cudaGraphLaunch", graph.pointer, stream.pointer)

    def copy(self, target: Handle, source: Handle, size: int, kind: int, stream: Handle) -> None:
        """Puts a copy of `size` bytes on a stream."""
        arguments = target.pointer, source.pointer, ctypes.c_size_t(size), ctypes.c_int(kind), stream.pointer
        self.call("cudaMemcpyAsync", *arguments)

    def _instantiated(self, graph: ctypes.c_void_p) -> Handle:
        try:
            flags = ctypes.c_ulonglong(0)
            return self._made("cudaGraphInstantiateWithFlags", "cudaGraphExecDestroy", graph, flags)
        finally:
            self._library.cudaGraphDestroy(graph)

    def _made(self, create: str, destroy: str, *arguments: Any) -> Handle:
        handle = ctypes.c_void_p()
        self.call(create, ctypes.byref(handle), *arguments)
        return Handle(handle.value or 0, partial(self._give_back, destroy))

    def _give_back(self, destroy: str, value: int) -> None:
        # The code is not looked at: a GPU that is lost has lost its handles as well.
        getattr(self._library, destroy)(ctypes.c_void_p(value))

    def bus_id(self) -> str:
        """Returns the place of the device on the PCI bus; "" where it has none."""
        text = ctypes.create_string_buffer(32)
        try:
            self.call("cudaDeviceGetPCIBusId", text, ctypes.c_int(len(text)), ctypes.c_int(0))
        except CudaError:
            return ""
        return text.value.decode()

    def _attribute(self, attribute: int) -> int:
        found = ctypes.c_int()
        self.call("cudaDeviceGetAttribute", ctypes.byref(found), ctypes.c_int(attribute), ctypes.c_int(0))
        return found.value

    def _version(self, function: str) -> str:
        found = ctypes.c_int()
        self.call(function, ctypes.byref(found))
        return f"{found.value // 1000}.{found.value % 1000 // 10}"

    def _check(self, function: str, code: int) -> None:
        if code == _SUCCESS:
            return
        said = f"{self._library.cudaGetErrorString(ctypes.c_int(code)).decode()} ({function}, error {code})"
        meaning = _MEANINGS.get(code)
        if meaning is None:
            raise CudaError(f"a call of the CUDA runtime succeeds, got {said}; check the driver with nvidia-smi")
        raise meaning.kind(f"{meaning.rule}, got {said}; {meaning.remedy}")


class Buffer:
    """An array on the device and its copy in page-locked host memory.

    Args:
        cuda: the runtime.
        shape: of the array.
        dtype: of its elements.
    """

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.shape = shape
        self._cuda = cuda
        count = math.prod(shape)
        self._size = max(1, count * np.dtype(dtype).itemsize)
        self._device = cuda.allocate(self._size)
        self._pinned = cuda.allocate_host(self._size)
        memory = (ctypes.c_byte * self._size).from_address(self._pinned.value)
        self.host: NDArray[Any] = np.frombuffer(memoryview(memory), dtype=dtype, count=count).reshape(shape)
        self.host[...] = 0

    @property
    def address(self) -> int:
        """Where it is on the device."""
        return self._device.value

    def upload(self, stream: Handle) -> None:
        """Puts the copy from the host to the device on a stream."""
        self._cuda.copy(self._device, self._pinned, self._size, _TO_DEVICE, stream)

    def download(self, stream: Handle) -> None:
        """Puts the copy from the device to the host on a stream."""
        self._cuda.copy(self._pinned, self._device, self._size, _TO_HOST, stream)


class TimedStream:
    """A stream, and the GPU's time between the first and the last thing that was put on it since `restart`.

    That spans copies in, kernels, copies out and, between stages, the host's decision: what trtexec calls latency.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.stream = cuda.stream()
        self._begin, self._end = cuda.event(), cuda.event()
        self._started = False

    def restart(self) -> None:
        """Forgets what was put on the stream before."""
        self._started = False

    def start(self) -> None:
        """Marks the first thing, unless that has been done."""
        if not self._started:
            self.cuda.call("cudaEventRecord", self._begin.pointer, self.stream.pointer)
            self._started = True

    def finish(self) -> None:
        """Marks the last thing so far, and waits for it.

        Raises:
            LaunchError: the GPU did not get that far.
        """
        self.cuda.call("cudaEventRecord", self._end.pointer, self.stream.pointer)
        self.cuda.call("cudaStreamSynchronize", self.stream.pointer)

    def wait_s(self, times: int = 100) -> float:
        """Returns the median wall-clock seconds of one synchronisation with nothing to wait for."""
        taken = []
        for _ in range(times):
            begin = time.perf_counter()
            self.cuda.call("cudaStreamSynchronize", self.stream.pointer)
            taken.append(time.perf_counter() - begin)
        return statistics.median(taken)

    def elapsed_s(self) -> float:
        """Returns the seconds between the two marks."""
        taken = ctypes.c_float()
        self.cuda.call("cudaEventElapsedTime", ctypes.byref(taken), self._begin.pointer, self._end.pointer)
        return taken.value / 1e3


def _out_int() -> Any:
    return ctypes.byref(ctypes.c_int())


def _libraries() -> Iterator[ctypes.CDLL]:
    """Yields every libcudart that can be loaded: the system's, then those that pip installed, the newest first."""
    for name in (*_LIBRARIES, *_from_pip()):
        try:
            yield ctypes.CDLL(name)
        except OSError:
            continue


def _from_pip() -> list[str]:
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    found = [path for folder in folders for path in folder.glob("*/lib/libcudart.so.*")]
    return [str(path) for path in sorted(found, key=lambda path: path.name, reverse=True)]
