"""CUDA through NVIDIA's package cuda-bindings, which brings the CUDA runtime with it."""

from importlib import import_module
from typing import Any

from .cuda_runtime import RuntimeCuda
from .errors import BackendUnavailable, CudaError


class BindingsCuda(RuntimeCuda):
    """CUDA over `cuda.bindings.runtime`, of release 12 or 13. Raises BackendUnavailable."""

    name = "cuda-bindings"

    def __init__(self) -> None:
        try:
            self._runtime: Any = import_module("cuda.bindings.runtime")
        except ImportError as error:
            raise BackendUnavailable(_unusable(error)) from error
        try:
            self.memory()
        except CudaError as error:
            raise BackendUnavailable(_unusable(error)) from error

    def _call(self, function: str, *args: Any) -> Any:
        error, *values = getattr(self._runtime, function)(*args)
        if int(error):
            raise self._error(function, error)
        return values[0] if len(values) == 1 else tuple(values)

    def _error(self, function: str, error: Any) -> CudaError:
        runtime = self._runtime
        runtime.cudaGetLastError()  # forgets it, for the next library that asks
        name, text = runtime.cudaGetErrorName(error)[1], runtime.cudaGetErrorString(error)[1]
        return CudaError(function, name.decode(), text.decode())

    def _enum(self, kind: str, value: int) -> Any:
        return getattr(self._runtime, kind)(value)

    def _device_name(self) -> bytes:
        return bytes(self._call("cudaGetDeviceProperties", 0).name)


def _unusable(error: Exception) -> str:
    return (
        f"cuda-bindings cannot be used ({error}): it needs NVIDIA's driver, and the release of the "
        "driver's CUDA: pip install 'cuda-bindings<13' for CUDA 12 (JetPack 6), "
        "pip install 'cuda-bindings<14' for CUDA 13 (JetPack 7)"
    )
