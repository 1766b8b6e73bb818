"""CUDA graphs for pycuda, which has none: through ctypes, on the driver's library beneath it."""

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_ulonglong, c_void_p
from typing import Any

from .cuda_ctypes import typed
from .errors import BackendUnavailable, CudaError

LIBRARY = "libcuda.so.1"  # as the driver installs it, and pycuda has loaded it
_CAPTURE_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
_HANDLE = POINTER(c_void_p)

# As cuda.h declares them. The header gives the first its number, and CUDA 11.4 brought the third.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, _HANDLE),
    "cuGraphInstantiateWithFlags": (_HANDLE, c_void_p, c_ulonglong),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphExecDestroy": (c_void_p,),
}


class DriverGraphs:
    """Records and replays streams of the context that is current in the calling thread.

    Streams and graphs are the driver's own handles, as ints. Raises BackendUnavailable where the
    driver's library, or one of its functions, is missing; its methods raise CudaError.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(LIBRARY)
            self._functions = {
                name: typed(self._library, name, types, self._checked)
                for name, types in _FUNCTIONS.items()
            }
        except (OSError, AttributeError) as error:
            raise BackendUnavailable(f"the driver has no CUDA graphs: {error}") from error

    def _checked(self, function: str, code: int, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if code:
            name = self._told("cuGetErrorName", code)
            raise CudaError(function, name, self._told("cuGetErrorString", code))
        return args

    def _told(self, function: str, code: int) -> str:
        text = c_char_p()
        getattr(self._library, function)(code, byref(text))
        return (text.value or b"").decode()

    def begin(self, stream: int) -> None:
        self._functions["cuStreamBeginCapture_v2"](stream, _CAPTURE_THREAD_LOCAL)

    def end(self, stream: int) -> int:
        graph = self._functions["cuStreamEndCapture"](stream)
        try:
            return int(self._functions["cuGraphInstantiateWithFlags"](graph, 0))
        finally:
            self._functions["cuGraphDestroy"](graph)

    def launch(self, graph: int, stream: int) -> None:
        self._functions["cuGraphLaunch"](graph, stream)

    def free(self, graph: int) -> None:
        self._functions["cuGraphExecDestroy"](graph)
