"""An encoder file in OpenVINO on the CPU, as a device would run it: one frame as fast as can be."""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import openvino
from onnx import ModelProto

from calibration.gate import Encode

# By default it computes in bf16 where the CPU can.
EXACT = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}


def openvino_encoder(model: ModelProto) -> Encode:
    """A function from frames [n, H, W, 3] to unit rows [n, D]."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "image.onnx"
        onnx.save(model, path)
        compiled = openvino.Core().compile_model(path, "CPU", EXACT)
    frames = compiled.input(0).get_any_name()
    return lambda batch: np.array(compiled({frames: batch})[0], np.float32)
