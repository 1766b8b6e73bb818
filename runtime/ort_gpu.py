"""ONNX Runtime on an NVIDIA GPU: the backends `ort-cuda` and `ort-tensorrt`.

ONNX Runtime goes on with the CPU where a provider of the GPU does not load, and where it fails on a
batch. Here both are errors.
"""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from .backends import Border
from .errors import BackendUnavailable
from .ort import DISABLED, OrtEncoder

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
TEGRA = Path("/etc/nv_tegra_release")  # a Jetson has it
PROVIDERS = {"ort-cuda": CUDA, "ort-tensorrt": TENSORRT}
_TYPES = {"frames": np.uint8, "tokens": np.int32}


class GpuEncoder(OrtEncoder):
    """An encoder file on a provider of the GPU, after a first batch of one has run.

    `cache` is the folder for what `ort-tensorrt` builds: an engine when a batch is larger than all
    before it, which takes minutes, and seconds from the cache. Raises BackendUnavailable, with the
    reason and what to install, where the provider does not load or does not run.
    """

    def __init__(
        self,
        path: Path,
        border: Border,
        backend: str,
        precision: str,
        cache: Path,
        threads: int | None = None,
    ) -> None:
        self.name, self._provider = backend, PROVIDERS[backend]
        self._cache, self._precision = cache, precision
        super().__init__(path, border, threads)
        try:
            self(np.zeros((1, *border.shape), _TYPES[border.name]))
        except BackendUnavailable as error:
            raise self._unavailable(str(error)) from error

    def _created(self, path: Path, options: Any) -> Any:
        if self._provider not in onnxruntime.get_available_providers():
            raise self._unavailable(f"the ONNX Runtime here has no {self._provider}")
        providers: list[Any] = [CUDA]
        if self._provider == TENSORRT:
            wanted = tensorrt_options(_made(self._cache), self._precision)
            providers.insert(0, (TENSORRT, wanted))
        _preload(self._provider)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        try:
            session = onnxruntime.InferenceSession(
                str(path),
                options,
                providers=providers,
                disabled_optimizers=DISABLED,
                enable_fallback=0,
            )
        except Exception as error:  # the library's exceptions have no common base of their own
            why = _reason(self._provider) or " ".join(str(error).split())
            raise self._unavailable(f"{self._provider} fails: {why}") from error
        taken = session.get_providers()[0]
        if taken != self._provider:
            why = _reason(self._provider) or f"ONNX Runtime took {taken} instead"
            raise self._unavailable(f"{self._provider} does not load: {why}")
        self._elsewhere = _nodes_elsewhere(session, self._provider)
        return session

    def _unavailable(self, reason: str) -> BackendUnavailable:
        return BackendUnavailable(f"{reason}; {_how_to_get_it(self._provider)}")

    def __repr__(self) -> str:
        where = self._provider.removesuffix("ExecutionProvider").replace("Tensorrt", "TensorRT")
        rest = f", {self._elsewhere} nodes elsewhere" if self._elsewhere else ""
        return f"onnxruntime {onnxruntime.__version__}, {where}{rest}"


def tensorrt_options(cache: Path, precision: str) -> dict[str, Any]:
    """Options of the TensorRT provider: caches in a folder, and the types that the file has.

    The ranges of int8 are in the file, so there is no calibration table.
    """
    options: dict[str, Any] = {
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": str(cache),
    }
    if "fp16" in precision:
        options["trt_fp16_enable"] = True
    if "int8" in precision:
        options["trt_int8_enable"] = True
    return options


def _made(cache: Path) -> Path:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BackendUnavailable(
            f"ort-tensorrt keeps its engines in {cache}, which cannot be made: {error.strerror}; "
            "copy the bundle to where it can be written, or use the backend ort-cuda"
        ) from error
    return cache.resolve()


def _preload(provider: str) -> None:
    """Loads the libraries that pip's packages bring, where ONNX Runtime does not look for them."""
    if hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(None):  # it prints what it does not find
            onnxruntime.preload_dlls()
    if provider == TENSORRT:
        with contextlib.suppress(ImportError):
            import tensorrt  # noqa: F401


def _reason(provider: str) -> str:
    """Why a provider does not load, as a process finds that tries it on a tiny model; empty where
    that process can use it."""
    from .probes import ask

    return ask("provider", provider).error


def _nodes_elsewhere(session: Any, provider: str) -> int:
    """How many nodes another provider runs; 0 where ONNX Runtime is too old to tell."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return 0
    parts = session.get_provider_graph_assignment_info()
    return sum(len(part.get_nodes()) for part in parts if part.ep_name != provider)


def _how_to_get_it(provider: str) -> str:
    if TEGRA.exists():
        return (
            "on a Jetson use the backend tensorrt: the wheels of onnxruntime-gpu on PyPI have no "
            "kernels for its GPU (edgeclip doctor knows of others)"
        )
    how = "pip install 'onnxruntime-gpu[cuda,cudnn]' brings it, with CUDA 13 and cuDNN 9"
    if provider not in onnxruntime.get_available_providers():
        how += ", after pip uninstall --yes onnxruntime"
    if provider == TENSORRT:
        how += "; it needs TensorRT 10, no other: pip install 'tensorrt>=10,<11'"
    return f"{how}; edgeclip doctor says what is here"
