"""The OpenVINO backend: runs an encoder file on the CPU."""

import functools
import os
import threading
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from openvino import Core, __version__

from .backends import Border
from .errors import BackendUnavailable, BundleError, FrameError, UnsupportedFormat
from .remembered import usable_cores

Hint = Literal["f32", "bf16"]
LONGEST = 300  # letters of a message
MOST_STREAMS = 8  # calls at once; each takes memory for its activations (10 to 30 MiB of a ViT-B)
_TYPES = {"frames": np.uint8, "tokens": np.int32}


class VinoEncoder:
    """An encoder file, compiled by OpenVINO: one input, `embeddings` float32 [N, D] out.

    `hint` is the type of what is not int8; left alone OpenVINO takes bf16 where the CPU has it.
    `threads` are those of one call; the other cores then serve calls from other threads. Frames one
    by one have a model of that fixed size, which is faster; the one for any other number is
    compiled when it is first needed. Safe to call from several threads.

    Raises UnsupportedFormat where the file is no such encoder, and BackendUnavailable where
    OpenVINO does not start. A call raises BundleError where it needs a file that was changed.
    """

    name = "openvino"

    def __init__(
        self, path: Path, border: Border, threads: int | None = None, hint: Hint = "f32"
    ) -> None:
        self._path, self._border, self._hint = path, border, hint
        self._stamp = _stamp(path)
        self._lock = threading.Lock()
        is_image = border.name == "frames"  # texts come in batches of every size
        self._options = _options(hint, threads, MOST_STREAMS if is_image else 1)
        self._one = self._compiled(fixed=True) if is_image else None
        self._any = None if is_image else self._compiled(fixed=False)

    def __call__(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Embeds a batch: uint8 frames [N, H, W, 3] or int32 tokens [N, L]."""
        wanted = _TYPES[self._border.name]
        if batch.dtype != wanted or batch.shape[1:] != self._border.shape:
            raise FrameError(
                f"the encoder takes {np.dtype(wanted)} {['N', *self._border.shape]}, "
                f"not {batch.dtype} {list(batch.shape)}"
            )
        requests = self._one if self._one and len(batch) == 1 else self._of_any_number()
        try:
            return requests.run(batch)
        except RuntimeError as error:
            raise BackendUnavailable(f"OpenVINO failed on a batch: {_reason(error)}") from error

    def _of_any_number(self) -> "_Requests":
        """The model for any number of frames. While it is compiled, single frames go on."""
        with self._lock:
            if self._any is None:
                self._any = self._compiled(fixed=False)
            return self._any

    def _compiled(self, fixed: bool) -> "_Requests":
        core = _core()
        try:
            model = core.read_model(self._path)
            self._check(model)
            if fixed:
                model.reshape([1, *self._border.shape])
            compiled = core.compile_model(model, "CPU", self._options)
        except RuntimeError as error:
            raise UnsupportedFormat(
                f"{self._path} does not load in OpenVINO: {_reason(error)}"
            ) from error
        return _Requests(compiled)

    def _check(self, model: Any) -> None:
        """The file is the one that was opened first; names and sizes are the manifest's, after a
        batch that may have any name."""
        if _stamp(self._path) != self._stamp:
            raise BundleError(
                f"{self._path} was changed since it was loaded; load the bundle again"
            )
        found = [(port.any_name, _sizes(port)) for port in (*model.inputs, *model.outputs)]
        border = self._border
        expected = [(border.name, border.shape), ("embeddings", (border.dim,))]
        if found != expected:
            raise UnsupportedFormat(
                f"{self._path} has the inputs and outputs {found}, "
                f"the manifest asks for {expected}; export the bundle again"
            )

    def __repr__(self) -> str:
        half = "" if self._hint == "f32" else f", {self._hint}"
        return f"openvino {__version__.partition('-')[0]}, CPU{half}"


class _Requests:
    """A compiled model with its requests, each of which serves one call at a time."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._idle = [compiled.create_infer_request()]

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Embeds a batch by a request that is idle, or one more."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        try:
            (embeddings,) = request.infer([batch], share_inputs=True).values()
        finally:
            self._idle.append(request)
        return np.asarray(embeddings, dtype=np.float32)


def computes_bf16() -> bool:
    """Whether the CPU has instructions for bf16, as OpenVINO finds. Raises BackendUnavailable."""
    try:
        return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    except RuntimeError as error:
        raise BackendUnavailable(f"OpenVINO does not start: {_reason(error)}") from error


@functools.cache
def _core() -> Any:
    """The process's one Core, which is never closed.

    Its CPU plugin gives the thread that opens it a stack for signals, and unmaps that when the last
    model of a closed Core goes: from another thread, or after a later Core was opened, the thread
    keeps a stack that is gone, and the next signal (Ctrl-C, the end of a child process) kills the
    process (OpenVINO 2026.4, CPUSpecialSetup).
    """
    try:
        return Core()
    except RuntimeError as error:
        raise BackendUnavailable(f"OpenVINO does not start: {_reason(error)}") from error


def _options(hint: Hint, threads: int | None, most_streams: int) -> dict[str, str]:
    """Of a model. All cores serve one call, or `threads` of them and the rest other calls."""
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint}
    if threads:
        streams = max(1, min(usable_cores() // threads, most_streams))
        options["NUM_STREAMS"] = str(streams)
        options["INFERENCE_NUM_THREADS"] = str(threads * streams)
    return options


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What is another one when a file was replaced or written to; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _sizes(port: Any) -> tuple[int | None, ...]:
    return tuple(d.get_length() if d.is_static else None for d in port.partial_shape)[1:]


def _reason(error: RuntimeError) -> str:
    """The beginning of what it says, which can fill pages, without the places in its source."""
    lines = (line.strip() for line in str(error).splitlines())
    words = " ".join(line for line in lines if line and not line.startswith("Exception from"))
    return words if len(words) <= LONGEST else f"{words[:LONGEST]}..."
