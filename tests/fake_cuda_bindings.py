"""What `cuda.bindings.runtime` is, over the stub library that `library` is set to.

It has the functions that runtime/ uses, with the real ones' parameters and results (12.9 and
13.5): they return (error, outputs...), with None for the outputs of what failed.
"""

import ctypes
import enum
import functools
import types
from ctypes import byref, c_float, c_int, c_size_t, c_void_p
from typing import Any

library: Any = None

_ERRORS = {
    "cudaSuccess": 0, "cudaErrorInvalidValue": 1, "cudaErrorMemoryAllocation": 2,
    "cudaErrorInsufficientDriver": 35, "cudaErrorNoDevice": 100, "cudaErrorECCUncorrectable": 214,
    "cudaErrorInvalidResourceHandle": 400, "cudaErrorIllegalState": 401,
    "cudaErrorIllegalAddress": 700, "cudaErrorLaunchFailure": 719,
    "cudaErrorStreamCaptureUnsupported": 900, "cudaErrorStreamCaptureInvalidated": 901,
    "cudaErrorTimeout": 909,
}  # fmt: skip


class _Handle:
    """cudaStream_t and its like: made by the runtime, read with int()."""

    def __init__(self, value: int) -> None:
        self._value = value

    def __int__(self) -> int:
        return self._value


_MODES = ("Global", "ThreadLocal", "Relaxed")
_COPIES = ("HostToHost", "HostToDevice", "DeviceToHost", "DeviceToDevice", "Default")


cudaError_t = enum.IntEnum("cudaError_t", _ERRORS)  # type: ignore[misc]
cudaStreamCaptureMode = enum.IntEnum(  # type: ignore[misc]
    "cudaStreamCaptureMode", {f"cudaStreamCaptureMode{n}": i for i, n in enumerate(_MODES)}
)
cudaMemcpyKind = enum.IntEnum(  # type: ignore[misc]
    "cudaMemcpyKind", {f"cudaMemcpy{n}": i for i, n in enumerate(_COPIES)}
)


class cudaDeviceAttr(enum.IntEnum):
    cudaDevAttrIntegrated = 18
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


# Inputs (int: a number, _Handle: a handle or a number, or an enum), then outputs, then where
# the outputs stand among C's parameters.
_FUNCTIONS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...], int]] = {
    "cudaSetDevice": ((int,), (), 0),
    "cudaDeviceGetAttribute": ((cudaDeviceAttr, int), (c_int,), 0),
    "cudaMemGetInfo": ((), (c_size_t, c_size_t), 0),
    "cudaMalloc": ((int,), (c_void_p,), 0),
    "cudaFree": ((int,), (), 0),
    "cudaHostAlloc": ((int, int), (c_void_p,), 0),
    "cudaHostGetDevicePointer": ((int, int), (c_void_p,), 0),
    "cudaFreeHost": ((int,), (), 0),
    "cudaMemcpyAsync": ((int, int, int, cudaMemcpyKind, _Handle), (), 0),
    "cudaStreamCreateWithFlags": ((int,), (_Handle,), 0),
    "cudaStreamDestroy": ((_Handle,), (), 0),
    "cudaStreamSynchronize": ((_Handle,), (), 0),
    "cudaStreamBeginCapture": ((_Handle, cudaStreamCaptureMode), (), 0),
    "cudaStreamEndCapture": ((_Handle,), (_Handle,), 1),
    "cudaEventCreate": ((), (_Handle,), 0),
    "cudaEventDestroy": ((_Handle,), (), 0),
    "cudaEventRecord": ((_Handle, _Handle), (), 0),
    "cudaEventSynchronize": ((_Handle,), (), 0),
    "cudaEventElapsedTime": ((_Handle, _Handle), (c_float,), 0),
    "cudaGraphInstantiateWithFlags": ((_Handle, int), (_Handle,), 0),
    "cudaGraphLaunch": ((_Handle, _Handle), (), 0),
    "cudaGraphDestroy": ((_Handle,), (), 0),
    "cudaGraphExecDestroy": ((_Handle,), (), 0),
}


def _converted(value: Any, kind: Any) -> Any:
    if issubclass(kind, enum.IntEnum):
        return c_int(kind(value.value))  # older releases read .value, which an int has not
    return c_void_p(int(value)) if kind is _Handle or value > 2**31 else value


def _call(name: str, *args: Any) -> tuple[Any, ...]:
    inputs, outputs, place = _FUNCTIONS[name]
    passed = [_converted(value, kind) for value, kind in zip(args, inputs, strict=True)]
    made = [(c_void_p if kind is _Handle else kind)() for kind in outputs]
    passed[place:place] = [byref(each) for each in made]
    error = cudaError_t(getattr(library, name)(*passed))
    if error:
        return (error, *(None for _ in made))
    values = [each.value or 0 for each in made]
    wrap = [_Handle if kind is _Handle else lambda value: value for kind in outputs]
    return (error, *(w(value) for w, value in zip(wrap, values, strict=True)))


globals().update({name: functools.partial(_call, name) for name in _FUNCTIONS})


def cudaGetDeviceProperties(device: int) -> tuple[Any, ...]:
    room = ctypes.create_string_buffer(2048)
    error = cudaError_t(library.cudaGetDeviceProperties_v2(room, device))
    return error, None if error else types.SimpleNamespace(name=room.value)


def cudaGetLastError() -> tuple[Any]:
    return (cudaError_t(library.cudaGetLastError()),)


def cudaGetErrorName(error: Any) -> tuple[Any, bytes]:
    return cudaError_t(0), library.cudaGetErrorName(int(error))


def cudaGetErrorString(error: Any) -> tuple[Any, bytes]:
    return cudaError_t(0), library.cudaGetErrorString(int(error))
