"""The ONNX Runtime backend: runs an encoder file on the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from .errors import BackendUnavailable, UnsupportedFormat


class OrtEncoder:
    """An encoder file in an ONNX Runtime session: one input, `embeddings` float32 [N, D] out.

    Safe to call from several threads. Raises UnsupportedFormat where the file is no such encoder.
    """

    name = "onnxruntime"

    def __init__(self, path: Path, input_name: str, threads: int | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the library's exceptions have no common base of their own
            raise UnsupportedFormat(f"{path} does not load in ONNX Runtime: {error}") from error
        names = [i.name for i in self._session.get_inputs()]
        outputs = [o.name for o in self._session.get_outputs()]
        if names != [input_name] or outputs != ["embeddings"]:
            raise UnsupportedFormat(
                f"{path} has inputs {names} and outputs {outputs}; "
                f"an encoder has {input_name!r} and 'embeddings'"
            )
        self._input = input_name

    def __call__(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Embeds a batch: uint8 frames [N, H, W, 3] or int32 tokens [N, L]."""
        try:
            (embeddings,) = self._session.run(["embeddings"], {self._input: batch})
        except Exception as error:
            raise BackendUnavailable(f"ONNX Runtime failed on a batch: {error}") from error
        return np.asarray(embeddings, dtype=np.float32)

    def __repr__(self) -> str:
        return f"onnxruntime {onnxruntime.__version__}, CPU"
