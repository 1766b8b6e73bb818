"""CUDA through ctypes: the runtime library that is on every Jetson, and no package."""

import ctypes
from collections.abc import Callable, Iterator
from ctypes import POINTER, c_char_p, c_float, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .cuda_runtime import RuntimeCuda
from .errors import BackendUnavailable, CudaError

LIBRARIES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0")
FOLDERS = ("/usr/local/cuda/lib64",)
_PIP_FOLDERS = ("cu13/lib", "cuda_runtime/lib")  # of NVIDIA's packages, in site-packages/nvidia
_PROPERTIES = 16384  # bytes, far more than cudaDeviceProp has; the name is its first field

# The parameters in their order; a pointer type is an output.
_VOID, _INT, _SIZE = POINTER(c_void_p), POINTER(c_int), POINTER(c_size_t)
_FLOAT = POINTER(c_float)
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cudaSetDevice": (c_int,),
    "cudaGetLastError": (),
    "cudaDeviceGetAttribute": (_INT, c_int, c_int),
    "cudaMemGetInfo": (_SIZE, _SIZE),
    "cudaMalloc": (_VOID, c_size_t),
    "cudaFree": (c_void_p,),
    "cudaHostAlloc": (_VOID, c_size_t, c_uint),
    "cudaHostGetDevicePointer": (_VOID, c_void_p, c_uint),
    "cudaFreeHost": (c_void_p,),
    "cudaMemcpyAsync": (c_void_p, c_void_p, c_size_t, c_int, c_void_p),
    "cudaStreamCreateWithFlags": (_VOID, c_uint),
    "cudaStreamDestroy": (c_void_p,),
    "cudaStreamSynchronize": (c_void_p,),
    "cudaStreamBeginCapture": (c_void_p, c_int),
    "cudaStreamEndCapture": (c_void_p, _VOID),
    "cudaEventCreate": (_VOID,),
    "cudaEventDestroy": (c_void_p,),
    "cudaEventRecord": (c_void_p, c_void_p),
    "cudaEventSynchronize": (c_void_p,),
    "cudaEventElapsedTime": (_FLOAT, c_void_p, c_void_p),
    "cudaGraphInstantiateWithFlags": (_VOID, c_void_p, c_ulonglong),
    "cudaGraphLaunch": (c_void_p, c_void_p),
    "cudaGraphDestroy": (c_void_p,),
    "cudaGraphExecDestroy": (c_void_p,),
}


def typed(
    library: ctypes.CDLL,
    name: str,
    types: tuple[Any, ...],
    checked: Callable[[str, int, tuple[Any, ...]], tuple[Any, ...]],
) -> Any:
    """A function of a library that takes its inputs, gives its outputs, and lets go of the GIL.

    `types` are its parameters in their order, a pointer type an output; `checked` gets its name,
    its result and its arguments, and returns these or raises. Raises AttributeError.
    """
    made = ctypes.CFUNCTYPE(c_int, *types)
    outputs = (_VOID, _INT, _SIZE, _FLOAT)
    function: Any = made((name, library), tuple((1 + (t in outputs),) for t in types))
    function.errcheck = lambda code, _, args: checked(name, code, args)
    return function


class CtypesCuda(RuntimeCuda):
    """CUDA over one runtime library. Raises BackendUnavailable where it does not load or lacks a
    function, CudaError where there is no GPU, or a driver too old for it."""

    name = "ctypes"

    def __init__(self, library: str) -> None:
        try:
            self._library = ctypes.CDLL(library)
            self._functions = {
                name: typed(self._library, name, types, self._checked)
                for name, types in _FUNCTIONS.items()
            }
            for name in ("cudaGetErrorName", "cudaGetErrorString"):
                getattr(self._library, name).restype = c_char_p
        except (OSError, AttributeError) as error:
            raise BackendUnavailable(str(error)) from error
        self.memory()

    def _checked(self, function: str, code: int, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if code == 0 or function == "cudaGetLastError":
            return args
        self._functions["cudaGetLastError"]()  # forgets it, for the next library that asks
        name = self._library.cudaGetErrorName(code).decode()
        raise CudaError(function, name, self._library.cudaGetErrorString(code).decode())

    def _call(self, function: str, *args: Any) -> Any:
        found = self._functions[function](*args)
        return 0 if found is None else found

    def _device_name(self) -> bytes:
        # CUDA 12 has the old layout under the plain name; CUDA 11 and 13 have only that name
        library, properties = self._library, ctypes.create_string_buffer(_PROPERTIES)
        function = getattr(library, "cudaGetDeviceProperties_v2", library.cudaGetDeviceProperties)
        self._checked("cudaGetDeviceProperties", function(properties, 0), ())
        return properties.raw[:256]


def _places(library: str) -> Iterator[str]:
    """The names and paths to load a library by: the system's first."""
    yield library
    spec = find_spec("nvidia")
    pip = [] if spec is None else list(spec.submodule_search_locations or ())
    folders = [Path(folder) / inner for folder in pip for inner in _PIP_FOLDERS]
    for folder in (*folders, *map(Path, FOLDERS)):
        if (folder / library).is_file():
            yield str(folder / library)


def open_ctypes() -> CtypesCuda:
    """CUDA over the newest runtime library that loads and has a driver.

    Raises BackendUnavailable, with what each of them said.
    """
    reasons = []
    for place in (place for library in LIBRARIES for place in _places(library)):
        try:
            return CtypesCuda(place)
        except BackendUnavailable as error:
            reason = str(error)
            reasons.append(reason if place in reason else f"{place}: {reason}")
    raise BackendUnavailable(
        f"ctypes finds no CUDA runtime that works ({'; '.join(reasons)}): on a Jetson, "
        "sudo apt-get install nvidia-jetpack; elsewhere install NVIDIA's driver, and the runtime "
        "with pip install 'edgeclip[tensorrt]' (or nvidia-cuda-runtime-cu12, for CUDA 12)"
    )
