"""The part of the CUDA runtime that runs, captures and times engines, called through ctypes.

It needs neither torch nor cuda-python, so it works on a server and on a Jetson. The device is the first one in
`CUDA_VISIBLE_DEVICES`.
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
    """No libcudart was found."""


class NoDriverError(CudaError):
    """There is no NVIDIA driver, or it is too old."""


class NoGpuError(CudaError):
    """There is a driver, but no GPU to use."""


class OutOfDeviceMemoryError(CudaError):
    """The GPU's memory is full."""


class LaunchError(CudaError):
    """A kernel failed, or the GPU was lost."""


class CaptureError(CudaError):
    """Work that cannot be captured as a CUDA graph; the stream is still usable."""


@dataclass(frozen=True)
class _ErrorKind:
    """How an error code is reported to the user."""

    kind: type[CudaError]
    rule: str
    remedy: str


_NO_DRIVER = _ErrorKind(
    NoDriverError, "CUDA needs an NVIDIA driver as new as itself", "install or update the driver; nvidia-smi shows it"
)
_NO_GPU = _ErrorKind(NoGpuError, "CUDA sees a free GPU", "see nvidia-smi, and CUDA_VISIBLE_DEVICES if it is set")
_FULL = _ErrorKind(OutOfDeviceMemoryError, "an engine fits the GPU's memory", "use a smaller batch, or free the GPU")
_LOST = _ErrorKind(
    LaunchError,
    "the GPU finishes what it is given",
    "start again: this process can no longer use the GPU; the system log tells more (dmesg, lines with Xid)",
)
_ERROR_KINDS: Mapping[int, _ErrorKind] = (
    {2: _FULL}
    | dict.fromkeys((34, 35, 803, 804), _NO_DRIVER)
    | dict.fromkeys((46, 100, 101), _NO_GPU)
    | dict.fromkeys((214, 226, 700, 701, 702, 710, 714, 715, 716, 717, 718, 719, 999), _LOST)
)
"""Error codes that have a remedy of their own. Source: CUDA Runtime API, cudaError_t."""


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
    """An object of the CUDA runtime, destroyed when it is garbage collected.

    Args:
        value: its address.
        destroy: called with the address.
    """

    def __init__(self, value: int, destroy: Callable[[int], object]) -> None:
        self.value = value
        weakref.finalize(self, destroy, value)

    @property
    def pointer(self) -> ctypes.c_void_p:
        """The value as an argument of a call; a plain int would be truncated to 32 bits."""
        return ctypes.c_void_p(self.value)


class Cuda:
    """The functions of one libcudart.

    Args:
        library: libcudart, loaded.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self._library.cudaGetErrorString.restype = ctypes.c_char_p

    @staticmethod
    def find() -> "Cuda":
        """Returns the newest libcudart that this machine's driver supports.

        Raises:
            NoCudaLibraryError: there is none.
        """
        libraries = list(_libraries())
        if not libraries:
            raise NoCudaLibraryError(
                f"TensorRT needs the CUDA runtime, got none of {', '.join(_LIBRARIES)}; pip install nvidia-cuda-runtime"
            )
        supported = [library for library in libraries if library.cudaGetDeviceCount(_out_int()) != _OLD_DRIVER]
        return Cuda((supported or libraries)[0])

    def call(self, function: str, *arguments: Any) -> None:
        """Calls a function of the library.

        Raises:
            CudaError: it failed; the subclass and its message tell the remedy.
        """
        self._check(function, getattr(self._library, function)(*arguments))

    def raise_last(self) -> None:
        """Raises the last error of a CUDA call that another library made, if there was one, and clears it."""
        self._check("cudaGetLastError", self._library.cudaGetLastError())

    def device(self) -> Device:
        """Returns the GPU.

        Raises:
            NoDriverError: there is no driver, or it is too old.
            NoGpuError: there is no GPU.
        """
        count = ctypes.c_int()
        self.call("cudaGetDeviceCount", ctypes.byref(count))
        if not count.value:
            raise NoGpuError(f"{_NO_GPU.rule}, got 0 GPUs; {_NO_GPU.remedy}")
        properties = _Properties()
        self.call("cudaGetDeviceProperties", ctypes.byref(properties), ctypes.c_int(0))
        capability = (self._attribute(_CAPABILITY_MAJOR), self._attribute(_CAPABILITY_MINOR))
        return Device(properties.name.decode(errors="replace"), capability, properties.memory)

    def runtime_version(self) -> str:
        """Returns the version of the CUDA runtime, such as 12.6."""
        return self._version("cudaRuntimeGetVersion")

    def driver_version(self) -> str:
        """Returns the newest version of CUDA that the driver supports; 0.0 without a driver."""
        return self._version("cudaDriverGetVersion")

    def stream(self) -> Handle:
        """Returns a new stream that does not synchronise with the default stream."""
        return self._create("cudaStreamCreateWithFlags", "cudaStreamDestroy", ctypes.c_uint(_NON_BLOCKING))

    def event(self) -> Handle:
        """Returns a new event that records time."""
        return self._create("cudaEventCreate", "cudaEventDestroy")

    def allocate(self, size: int) -> Handle:
        """Returns `size` bytes of device memory."""
        return self._create("cudaMalloc", "cudaFree", ctypes.c_size_t(size))

    def allocate_host(self, size: int) -> Handle:
        """Returns `size` bytes of page-locked host memory, from which copies do not stall the stream."""
        return self._create("cudaMallocHost", "cudaFreeHost", ctypes.c_size_t(size))

    def capture(self, stream: Handle, enqueue: Callable[[], object]) -> Handle:
        """Returns the work that `enqueue` puts on a stream as a CUDA graph.

        Raises:
            CaptureError: it cannot be captured.
            OutOfDeviceMemoryError: there is no memory for the graph.
            LaunchError: the GPU was lost.
        """
        graph = ctypes.c_void_p()
        try:
            self.call("cudaStreamBeginCapture", stream.pointer, ctypes.c_int(_CAPTURE_THREAD_LOCAL))
            enqueue()
            self.call("cudaStreamEndCapture", stream.pointer, ctypes.byref(graph))
            return self._instantiate(graph)
        except (OutOfDeviceMemoryError, LaunchError):
            raise
        except CudaError as error:
            self._library.cudaStreamEndCapture(stream.pointer, ctypes.byref(graph))
            self._library.cudaGetLastError()
            raise CaptureError(f"an engine becomes a CUDA graph, got {error}; it runs without one") from error

    def launch(self, graph: Handle, stream: Handle) -> None:
        """Launches a graph on a stream."""
        self.call("cudaGraphLaunch", graph.pointer, stream.pointer)

    def copy(self, target: Handle, source: Handle, size: int, kind: int, stream: Handle) -> None:
        """Enqueues a copy of `size` bytes on a stream."""
        arguments = target.pointer, source.pointer, ctypes.c_size_t(size), ctypes.c_int(kind), stream.pointer
        self.call("cudaMemcpyAsync", *arguments)

    def _instantiate(self, graph: ctypes.c_void_p) -> Handle:
        try:
            flags = ctypes.c_ulonglong(0)
            return self._create("cudaGraphInstantiateWithFlags", "cudaGraphExecDestroy", graph, flags)
        finally:
            self._library.cudaGraphDestroy(graph)

    def _create(self, create: str, destroy: str, *arguments: Any) -> Handle:
        handle = ctypes.c_void_p()
        self.call(create, ctypes.byref(handle), *arguments)
        return Handle(handle.value or 0, partial(self._destroy, destroy))

    def _destroy(self, destroy: str, value: int) -> None:
        # The error code is ignored: when a GPU is lost, its handles are gone, too.
        getattr(self._library, destroy)(ctypes.c_void_p(value))

    def bus_id(self) -> str:
        """Returns the device's PCI bus id; "" if it has none."""
        text = ctypes.create_string_buffer(32)
        try:
            self.call("cudaDeviceGetPCIBusId", text, ctypes.c_int(len(text)), ctypes.c_int(0))
        except CudaError:
            return ""
        return text.value.decode()

    def _attribute(self, attribute: int) -> int:
        value = ctypes.c_int()
        self.call("cudaDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), ctypes.c_int(0))
        return value.value

    def _version(self, function: str) -> str:
        version = ctypes.c_int()
        self.call(function, ctypes.byref(version))
        return f"{version.value // 1000}.{version.value % 1000 // 10}"

    def _check(self, function: str, code: int) -> None:
        if code == _SUCCESS:
            return
        message = f"{self._library.cudaGetErrorString(ctypes.c_int(code)).decode()} ({function}, error {code})"
        known = _ERROR_KINDS.get(code)
        if known is None:
            raise CudaError(f"a call of the CUDA runtime succeeds, got {message}; check the driver with nvidia-smi")
        raise known.kind(f"{known.rule}, got {message}; {known.remedy}")


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
        """Its address on the device."""
        return self._device.value

    def upload(self, stream: Handle) -> None:
        """Enqueues the copy from the host to the device on a stream."""
        self._cuda.copy(self._device, self._pinned, self._size, _TO_DEVICE, stream)

    def download(self, stream: Handle) -> None:
        """Enqueues the copy from the device to the host on a stream."""
        self._cuda.copy(self._pinned, self._device, self._size, _TO_HOST, stream)


class TimedStream:
    """A stream, and the GPU's time from the first to the last work on it since `restart`.

    That includes copies to the device, kernels, copies to the host and, between stages, the host's decision; trtexec
    calls it latency.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.stream = cuda.stream()
        self._begin, self._end = cuda.event(), cuda.event()
        self._started = False

    def restart(self) -> None:
        """Begins a new measurement."""
        self._started = False

    def start(self) -> None:
        """Records the begin of the work, unless it has been recorded already."""
        if not self._started:
            self.cuda.call("cudaEventRecord", self._begin.pointer, self.stream.pointer)
            self._started = True

    def finish(self) -> None:
        """Records the end of the work so far, and waits until it is done.

        Raises:
            LaunchError: the GPU did not finish it.
        """
        self.cuda.call("cudaEventRecord", self._end.pointer, self.stream.pointer)
        self.cuda.call("cudaStreamSynchronize", self.stream.pointer)

    def synchronisation_s(self, repeats: int = 100) -> float:
        """Returns the median wall-clock seconds of one synchronisation of an idle stream."""
        seconds = []
        for _ in range(repeats):
            begin = time.perf_counter()
            self.cuda.call("cudaStreamSynchronize", self.stream.pointer)
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds)

    def elapsed_s(self) -> float:
        """Returns the GPU's seconds from the begin to the end of the work."""
        elapsed_ms = ctypes.c_float()
        self.cuda.call("cudaEventElapsedTime", ctypes.byref(elapsed_ms), self._begin.pointer, self._end.pointer)
        return elapsed_ms.value / 1e3


def _out_int() -> Any:
    return ctypes.byref(ctypes.c_int())


def _libraries() -> Iterator[ctypes.CDLL]:
    """Yields every libcudart that can be loaded: the system's, then those installed by pip, the newest first."""
    for name in (*_LIBRARIES, *_installed_by_pip()):
        try:
            yield ctypes.CDLL(name)
        except OSError:
            continue


def _installed_by_pip() -> list[str]:
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    files = [path for folder in folders for path in folder.glob("*/lib/libcudart.so.*")]
    return [str(path) for path in sorted(files, key=lambda path: path.name, reverse=True)]
