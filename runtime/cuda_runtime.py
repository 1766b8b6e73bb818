"""The CUDA interface over CUDA's runtime API, whoever calls it."""

from abc import ABC, abstractmethod
from ctypes import c_byte
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .cuda import CudaError, Device, HostArray

# From driver_types.h; the same in CUDA 11, 12 and 13.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _INTEGRATED = 75, 76, 18
_HOST_PORTABLE, _HOST_MAPPED = 1, 2
_TO_DEVICE, _TO_HOST = 1, 2
_STREAM_NON_BLOCKING = 1
_CAPTURE_THREAD_LOCAL = 1


class RuntimeCuda(ABC):
    """What cuda-bindings and ctypes share: both call CUDA's runtime by its functions' names."""

    name: str
    graphs = True
    notes: tuple[str, ...] = ()

    @abstractmethod
    def _call(self, function: str, *args: Any) -> Any:
        """Calls a function of the runtime: its inputs in, its outputs out (several: a tuple).
        Raises CudaError."""

    @abstractmethod
    def _device_name(self) -> bytes:
        """The name of device 0, with or without the zeros after it."""

    def _enum(self, kind: str, value: int) -> Any:
        """A constant, as `_call` takes it."""
        return value

    def _here(self, function: str, *args: Any) -> Any:
        """The same as `_call`, with device 0 made this thread's device before."""
        self._call("cudaSetDevice", 0)
        return self._call(function, *args)

    def _attribute(self, attribute: int) -> int:
        return int(self._here("cudaDeviceGetAttribute", self._enum("cudaDeviceAttr", attribute), 0))

    def device(self) -> Device:
        name = self._device_name().partition(b"\0")[0].decode(errors="replace")
        capability = self._attribute(_CAPABILITY_MAJOR), self._attribute(_CAPABILITY_MINOR)
        return Device(name, capability, bool(self._attribute(_INTEGRATED)), self.memory()[1])

    def memory(self) -> tuple[int, int]:
        free, total = self._here("cudaMemGetInfo")
        return int(free), int(total)

    def alloc(self, size: int) -> int:
        return int(self._here("cudaMalloc", size))

    def free(self, pointer: int) -> None:
        self._call("cudaFree", pointer)

    def host(self, shape: tuple[int, ...], dtype: DTypeLike, mapped: bool = False) -> HostArray:
        """A pinned array; freed again where the GPU gives it no address."""
        size = max(1, prod(shape) * np.dtype(dtype).itemsize)
        flags = _HOST_PORTABLE | (_HOST_MAPPED if mapped else 0)
        pointer = int(self._here("cudaHostAlloc", size, flags))
        try:
            device = int(self._here("cudaHostGetDevicePointer", pointer, 0)) if mapped else 0
        except CudaError:
            self._call("cudaFreeHost", pointer)
            raise
        memory = memoryview((c_byte * size).from_address(pointer))
        array: NDArray[Any] = np.ndarray(shape, dtype, buffer=memory)
        return HostArray(array, pointer, device)

    def free_host(self, host: HostArray) -> None:
        self._call("cudaFreeHost", host.pointer)

    def upload(self, device: int, host: HostArray, size: int, stream: int) -> None:
        host.part(size)
        kind = self._enum("cudaMemcpyKind", _TO_DEVICE)
        self._call("cudaMemcpyAsync", device, host.pointer, size, kind, stream)

    def download(self, host: HostArray, device: int, size: int, stream: int) -> None:
        host.part(size)
        kind = self._enum("cudaMemcpyKind", _TO_HOST)
        self._call("cudaMemcpyAsync", host.pointer, device, size, kind, stream)

    def stream(self) -> int:
        return int(self._here("cudaStreamCreateWithFlags", _STREAM_NON_BLOCKING))

    def free_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", stream)

    def event(self) -> int:
        return int(self._here("cudaEventCreate"))

    def free_event(self, event: int) -> None:
        self._call("cudaEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        self._call("cudaEventRecord", event, stream)

    def elapsed(self, start: int, end: int) -> float:
        self._call("cudaEventSynchronize", end)
        return float(self._call("cudaEventElapsedTime", start, end))

    def begin_capture(self, stream: int) -> None:
        mode = self._enum("cudaStreamCaptureMode", _CAPTURE_THREAD_LOCAL)
        self._here("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        graph = int(self._call("cudaStreamEndCapture", stream))
        try:
            # with flags: the one way to do it that CUDA 11.4, 12 and 13 have alike
            return int(self._call("cudaGraphInstantiateWithFlags", graph, 0))
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: int, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def free_graph(self, graph: int) -> None:
        self._call("cudaGraphExecDestroy", graph)
