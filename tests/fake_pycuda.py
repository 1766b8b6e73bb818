"""What `pycuda.driver` is, over the stub library that `library` is set to.

It has what runtime/ uses of pycuda 2026.1: objects that belong to the context which is current
when they are made, errors that have a message only, and a stack of contexts for every thread.
"""

import ctypes
import gc
import threading
import warnings
from collections.abc import Callable
from ctypes import byref, c_float, c_int, c_size_t, c_void_p
from types import SimpleNamespace
from typing import Any

import numpy as np

library: Any = None
host_alloc_flags = SimpleNamespace(PORTABLE=1, DEVICEMAP=2, WRITECOMBINED=4)
device_attribute = SimpleNamespace(INTEGRATED=18)
_stack = threading.local()


class Error(Exception):
    pass


class MemoryError(Error):  # pycuda's names, as they are
    pass


class LogicError(Error):
    pass


class LaunchError(Error):
    pass


def _check(routine: str, code: int) -> None:
    if code:
        kind = {2: MemoryError, 719: LaunchError}.get(code, LogicError)
        raise kind(f"{routine} failed: {library.cudaGetErrorString(code).decode()}")


def _call(routine: str, function: Callable[..., int], *args: Any) -> None:
    if not getattr(_stack, "contexts", []):
        raise LogicError(f"{routine} failed: invalid device context")
    _check(routine, function(*args))


def _cleanup(what: str, function: Callable[..., int], handle: c_void_p) -> None:
    if not getattr(_stack, "contexts", []):
        warnings.warn(f"{what} in out-of-thread context could not be cleaned up", stacklevel=2)
    elif function(handle):
        print("PyCUDA WARNING: a clean-up operation failed (dead context maybe?)")


def init(flags: int = 0) -> None:
    _check("cuInit", library.cudaSetDevice(0))


class Context:
    detached = False

    def push(self) -> None:
        _check("cuCtxPushCurrent", library.cudaSetDevice(0))
        _stack.contexts = [*getattr(_stack, "contexts", []), self]

    @staticmethod
    def pop() -> None:
        if not getattr(_stack, "contexts", []):
            raise LogicError("context::pop failed: invalid device context - cannot")
        _stack.contexts.pop()

    def detach(self) -> None:
        self.detached = True

    def __del__(self) -> None:
        if not self.detached:
            warnings.warn("cuCtxDetach failed: invalid argument", stacklevel=2)


class Device:
    def __init__(self, number: int) -> None:
        _check("cuDeviceGet", library.cudaSetDevice(number))

    def name(self) -> str:
        room = ctypes.create_string_buffer(2048)
        _check("cuDeviceGetName", library.cudaGetDeviceProperties_v2(room, 0))
        return room.value.decode()

    def compute_capability(self) -> tuple[int, int]:
        return self.get_attribute(75), self.get_attribute(76)

    def total_memory(self) -> int:
        return 1 << 33

    def get_attribute(self, attribute: int) -> int:
        value = c_int()
        function = library.cudaDeviceGetAttribute
        _check("cuDeviceGetAttribute", function(byref(value), attribute, 0))
        return value.value

    def retain_primary_context(self) -> Context:
        return Context()


class DeviceAllocation:
    def __init__(self, size: int) -> None:
        self._pointer, self._valid = c_void_p(), False
        call = "cuMemAlloc", library.cudaMalloc, byref(self._pointer), c_size_t(size)
        try:
            _call(*call)
        except MemoryError:
            gc.collect()
            _call(*call)
        self._valid = True

    def __int__(self) -> int:
        return self._pointer.value or 0

    def free(self) -> None:
        if not self._valid:
            raise LogicError("device_allocation::free failed: invalid handle")
        self._valid = False
        _cleanup("device_allocation", library.cudaFree, self._pointer)

    def __del__(self) -> None:
        if self._valid:
            self.free()


class Stream:
    def __init__(self, flags: int = 0) -> None:
        self._handle = c_void_p()
        _call("cuStreamCreate", library.cudaStreamCreateWithFlags, byref(self._handle), flags)

    @property
    def handle(self) -> int:
        return self._handle.value or 0

    def synchronize(self) -> None:
        _call("cuStreamSynchronize", library.cudaStreamSynchronize, self._handle)

    def __del__(self) -> None:
        if self._handle:
            _cleanup("stream", library.cudaStreamDestroy, self._handle)


class Event:
    def __init__(self, flags: int = 0) -> None:
        self._handle = c_void_p()
        _call("cuEventCreate", library.cudaEventCreate, byref(self._handle))

    def record(self, stream: Stream | None = None) -> "Event":
        _call("cuEventRecord", library.cudaEventRecord, self._handle, _of(stream))
        return self

    def synchronize(self) -> "Event":
        _call("cuEventSynchronize", library.cudaEventSynchronize, self._handle)
        return self

    def time_till(self, end: "Event") -> float:
        ms = c_float()
        function = library.cudaEventElapsedTime
        _call("cuEventElapsedTime", function, byref(ms), self._handle, end._handle)
        return ms.value

    def __del__(self) -> None:
        if self._handle:
            _cleanup("event", library.cudaEventDestroy, self._handle)


def _of(stream: Stream | None) -> c_void_p | None:
    assert stream is None or isinstance(stream, Stream), "pycuda takes its own streams only"
    return None if stream is None else stream._handle


def pagelocked_empty(
    shape: tuple[int, ...], dtype: Any, order: str = "C", mem_flags: int = 0
) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    pointer = c_void_p()
    _call("cuMemHostAlloc", library.cudaHostAlloc, byref(pointer), c_size_t(size), mem_flags)

    class HostAllocation(ctypes.c_byte * size):  # type: ignore[misc]
        valid = True

        def get_device_pointer(self) -> int:
            device, function = c_void_p(), library.cudaHostGetDevicePointer
            _call("cuMemHostGetDevicePointer", function, byref(device), pointer, 0)
            return device.value or 0

        def free(self) -> None:
            if not self.valid:
                raise LogicError("pagelocked_host_allocation::free failed: invalid")
            self.valid = False
            _cleanup("pagelocked_host_allocation", library.cudaFreeHost, pointer)

        def __del__(self) -> None:
            if self.valid:
                self.free()

    return np.ndarray(shape, dtype, HostAllocation.from_address(pointer.value or 0))


def _copy(routine: str, to: int, source: int, size: int, kind: int, stream: Any) -> None:
    args = c_void_p(to), c_void_p(source), c_size_t(size), kind, _of(stream)
    _call(routine, library.cudaMemcpyAsync, *args)


def memcpy_htod_async(dest: int, src: np.ndarray, stream: Stream | None = None) -> None:
    _copy("cuMemcpyHtoDAsync", int(dest), src.ctypes.data, src.nbytes, 1, stream)


def memcpy_dtoh_async(dest: np.ndarray, src: int, stream: Stream | None = None) -> None:
    assert dest.flags.c_contiguous and dest.flags.writeable
    _copy("cuMemcpyDtoHAsync", dest.ctypes.data, int(src), dest.nbytes, 2, stream)


def mem_get_info() -> tuple[int, int]:
    free, total = c_size_t(), c_size_t()
    _call("cuMemGetInfo", library.cudaMemGetInfo, byref(free), byref(total))
    return free.value, total.value


mem_alloc = DeviceAllocation
