"""The ONNX Runtime backend: what its optimisations must leave as it is."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from runtime.backends import Border
from runtime.ort import OrtEncoder


def int8_fp16_convolution(path: Path) -> None:
    """Frames [n, 8, 8, 3] to embeddings [n, 4] by an int8 convolution with fp16 scales and bias.
    The product of its scales is less than fp16 can hold."""
    half = TensorProto.FLOAT16
    weight = np.random.default_rng(0).integers(-127, 128, (4, 3, 8, 8), dtype=np.int8)
    constants = {
        "small": np.float16(2**-8),
        "x_scale": np.float16(2**-8),
        "x_zero": np.int8(0),
        "weight": weight,
        "w_scale": np.full(4, 2**-18, np.float16),
        "w_zero": np.zeros(4, np.int8),
        "y_scale": np.float16(2**-6),
        "bias": np.array([0.5, -0.25, 0.125, 1], np.float16),
        "shape": np.array([-1, 4], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["frames"], ["half"], to=half),
        helper.make_node("Mul", ["half", "small"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["x"], perm=[0, 3, 1, 2]),
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_q"]),
        helper.make_node("DequantizeLinear", ["x_q", "x_scale", "x_zero"], ["x_dq"]),
        helper.make_node("DequantizeLinear", ["weight", "w_scale", "w_zero"], ["w_dq"], axis=0),
        helper.make_node("Conv", ["x_dq", "w_dq", "bias"], ["maps"]),
        helper.make_node("QuantizeLinear", ["maps", "y_scale", "x_zero"], ["maps_q"]),
        helper.make_node("DequantizeLinear", ["maps_q", "y_scale", "x_zero"], ["maps_dq"]),
        helper.make_node("Reshape", ["maps_dq", "shape"], ["rows"]),
        helper.make_node("Cast", ["rows"], ["embeddings"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("frames", TensorProto.UINT8, ["n", 8, 8, 3])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opset = helper.make_opsetid("", 19)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), path)


def test_biases_of_int8_with_fp16_scales(tmp_path: Path) -> None:
    """As without optimisation: ONNX Runtime would turn the bias into int32 by a scale of zero."""
    path = tmp_path / "image.int8_fp16.onnx"
    int8_fp16_convolution(path)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    frames = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    (expected,) = plain.run(None, {"frames": frames})
    found = OrtEncoder(path, Border("frames", (8, 8, 3), 4))(frames)
    np.testing.assert_allclose(found, expected, atol=2e-3)
