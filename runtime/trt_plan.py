"""Loads a plan: one that may run here, with the input and output that its encoder has."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from .backends import Border
from .engine_file import EngineInfo
from .errors import BackendUnavailable, UnsupportedFormat

HOST_CODE = "EDGECLIP_ENGINE_HOST_CODE"
INPUT_TYPES = {"frames": ("UINT8", np.uint8), "tokens": ("INT32", np.int32)}


def quiet_logger(trt: Any) -> Any:
    """A logger that keeps TensorRT's errors, for our own messages to say them: `said()`."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

        def said(self) -> str:
            return "; ".join(self.errors[-3:]) or "it does not say why"

    return Logger()


def load_plan(
    trt: Any, plan: Path, info: EngineInfo, border: Border, trusted: bool
) -> tuple[Any, Any, Any]:
    """Deserialises a plan whose hash was checked: the engine, the runtime that has to live as long
    as it does, and the logger of both.

    A version compatible one holds code for the host, which runs in this process. It is let in where
    this process built it (`trusted`), or where the user of this machine says so, by
    EDGECLIP_ENGINE_HOST_CODE=1; nothing in a bundle can. TensorRT refuses such code by itself where
    a sidecar keeps silent about it.

    Raises UnsupportedFormat where the engine is not of such an encoder, BackendUnavailable where it
    does not load.
    """
    logger = quiet_logger(trt)
    runtime = trt.Runtime(logger)
    if info.version_compatible:
        if not trusted:
            _require_host_code(plan)
        runtime.engine_host_code_allowed = True
    try:
        content = plan.read_bytes()
    except OSError as error:  # a rebuild has just taken its place
        raise BackendUnavailable(f"{plan} cannot be read: {error.strerror}") from error
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise BackendUnavailable(
            f"TensorRT {trt.__version__} does not load {plan}: {logger.said()}; "
            "build it again here with edgeclip build"
        )
    _check(trt, engine, border)
    return engine, runtime, logger


def _require_host_code(plan: Path) -> None:
    if os.environ.get(HOST_CODE) != "1":
        raise BackendUnavailable(
            f"{plan} is version compatible: it holds code of its own, which would run in this "
            f"process. If you trust those who built it, set {HOST_CODE}=1; otherwise build an "
            f"engine of this machine's own with `edgeclip build {plan.parent.parent}`"
        )


def _check(trt: Any, engine: Any, border: Border) -> None:
    """The engine has the inputs and outputs that the manifest asks for."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    found = [
        (
            "in" if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "out",
            name,
            str(engine.get_tensor_dtype(name)).rpartition(".")[2],
            tuple(engine.get_tensor_shape(name))[1:],
        )
        for name in names
    ]
    kind, _ = INPUT_TYPES[border.name]
    expected = [
        ("in", border.name, kind, border.shape),
        ("out", "embeddings", "FLOAT", (border.dim,)),
    ]
    if sorted(found) != sorted(expected):
        raise UnsupportedFormat(
            f"the engine has {found}, the manifest asks for {expected}; "
            "build it again with edgeclip build"
        )
