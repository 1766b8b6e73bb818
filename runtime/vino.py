"""The OpenVINO backend: runs an encoder file on the CPU."""

import threading
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openvino
from numpy.typing import NDArray

from .backends import Border
from .errors import BackendUnavailable, FrameError, UnsupportedFormat

Hint = Literal["f32", "bf16"]
LONGEST = 300  # letters of a message
_TYPES = {"frames": np.uint8, "tokens": np.int32}


class VinoEncoder:
    """An encoder file, compiled by OpenVINO: one input, `embeddings` float32 [N, D] out.

    `hint` is the type of what is not int8; left alone OpenVINO takes bf16 where the CPU has it.
    Frames one by one have a model of that fixed size, which is faster; the one for any other number
    is compiled when it is first needed. Safe to call from several threads. Raises UnsupportedFormat
    where the file is no such encoder.
    """

    name = "openvino"

    def __init__(
        self, path: Path, border: Border, threads: int | None = None, hint: Hint = "f32"
    ) -> None:
        self._path, self._border, self._hint = path, border, hint
        self._options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint}
        if threads:
            self._options["INFERENCE_NUM_THREADS"] = str(threads)
        self._fixes = border.name == "frames"  # texts come in batches of every size
        self._compiled: dict[bool, _Requests] = {}
        self._lock = threading.Lock()
        self._requests(fixed=self._fixes)

    def __call__(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Embeds a batch: uint8 frames [N, H, W, 3] or int32 tokens [N, L]."""
        wanted = _TYPES[self._border.name]
        if batch.dtype != wanted or batch.shape[1:] != self._border.shape:
            raise FrameError(
                f"the encoder takes {np.dtype(wanted)} {['N', *self._border.shape]}, "
                f"not {batch.dtype} {list(batch.shape)}"
            )
        requests = self._requests(fixed=self._fixes and len(batch) == 1)
        try:
            return requests.run(batch)
        except RuntimeError as error:
            raise BackendUnavailable(f"OpenVINO failed on a batch: {_reason(error)}") from error

    def _requests(self, fixed: bool) -> "_Requests":
        with self._lock:
            if fixed not in self._compiled:
                self._compiled[fixed] = _Requests(self._compile(fixed))
            return self._compiled[fixed]

    def _compile(self, fixed: bool) -> Any:
        core = openvino.Core()
        try:
            model = core.read_model(self._path)
            self._check(model)
            if fixed:
                model.reshape([1, *self._border.shape])
            return core.compile_model(model, "CPU", self._options)
        except RuntimeError as error:
            raise UnsupportedFormat(
                f"{self._path} does not load in OpenVINO: {_reason(error)}"
            ) from error

    def _check(self, model: Any) -> None:
        """Names and sizes are the manifest's, after a batch that may have any name."""
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
        return f"openvino {openvino.__version__.partition('-')[0]}, CPU{half}"


class _Requests:
    """A compiled model with its requests, each of which serves one call at a time."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._idle = [compiled.create_infer_request()]

    def run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
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
    """Whether the CPU has instructions for bf16, as OpenVINO finds."""
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _sizes(port: Any) -> tuple[int | None, ...]:
    return tuple(d.get_length() if d.is_static else None for d in port.partial_shape)[1:]


def _reason(error: RuntimeError) -> str:
    """The beginning of what it says, which can fill pages, without the places in its source."""
    lines = (line.strip() for line in str(error).splitlines())
    words = " ".join(line for line in lines if line and not line.startswith("Exception from"))
    return words if len(words) <= LONGEST else f"{words[:LONGEST]}..."
