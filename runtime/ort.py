"""The ONNX Runtime backend: runs an encoder file on the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from .backends import Border
from .errors import BackendUnavailable, UnsupportedFormat

# The one takes the weights of an fp16 MobileCLIP for floats, and the file does not load. The other
# rounds the biases of int8 convolutions, to zero where scales are fp16 (both in 1.31).
DISABLED = ["AttentionFusion", "WeightBiasQuantization"]


class OrtEncoder:
    """An encoder file in an ONNX Runtime session: one input, `embeddings` float32 [N, D] out.

    Safe to call from several threads. Raises UnsupportedFormat where the file is no such encoder.
    """

    name = "onnxruntime"

    def __init__(self, path: Path, border: Border, threads: int | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Its threads wait busily for more work: within a run that is faster than sleep, between the
        # frames of a camera it takes all cores for nothing.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if threads:
            options.intra_op_num_threads = threads
        self._session = self._created(path, options)
        # the batch comes first and may have any name
        found = [(v.name, tuple(v.shape[1:])) for v in self._session.get_inputs()]
        found += [(v.name, tuple(v.shape[1:])) for v in self._session.get_outputs()]
        expected = [(border.name, border.shape), ("embeddings", (border.dim,))]
        if found != expected:
            raise UnsupportedFormat(
                f"{path} has the inputs and outputs {found}, "
                f"the manifest asks for {expected}; export the bundle again"
            )
        self._input = border.name

    def _created(self, path: Path, options: Any) -> Any:
        """The session. Raises UnsupportedFormat."""
        try:
            return onnxruntime.InferenceSession(
                str(path),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=DISABLED,
            )
        except Exception as error:  # the library's exceptions have no common base of their own
            raise UnsupportedFormat(f"{path} does not load in ONNX Runtime: {error}") from error

    def __call__(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Embeds a batch: uint8 frames [N, H, W, 3] or int32 tokens [N, L]."""
        try:
            (embeddings,) = self._session.run(["embeddings"], {self._input: batch})
        except Exception as error:
            reason = " ".join(str(error).split())
            raise BackendUnavailable(f"ONNX Runtime failed on a batch: {reason}") from error
        return np.asarray(embeddings, dtype=np.float32)

    def __repr__(self) -> str:
        return f"onnxruntime {onnxruntime.__version__}, CPU"
