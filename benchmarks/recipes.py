"""INT8 of an encoder file by the recipes of others, on given frames.

onnxruntime.quantization's `quantize_static`: with its defaults; with Linears (and convolutions)
alone, symmetric int8, weights by output channel. nvidia-modelopt's `quantize` with its defaults,
where it is installed.
"""

import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from calibration.layers import OPERATORS, find_layers

Batches = Callable[[], Iterator[NDArray[np.uint8]]]
# Its own requirements would replace onnx and ONNX Runtime by older ones; these five are enough.
INSTALL_MODELOPT = (
    "pip install --no-deps nvidia-modelopt onnx-graphsurgeon onnxslim lief nvidia-ml-py"
)
_BETWEEN = ("DequantizeLinear", "QuantizeLinear", "Cast", "Transpose")  # a weight and its layer


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """The calibration frames, one by one, as onnxruntime.quantization takes them."""

    def __init__(self, batches: Iterator[NDArray[np.uint8]]) -> None:
        self._frames = (batch[i : i + 1] for batch in batches for i in range(len(batch)))

    def get_next(self) -> Any:
        frame = next(self._frames, None)
        return None if frame is None else {"frames": frame}


def static_recipes(source: Path, batches: Batches) -> dict[str, ModelProto]:
    """The encoder file by `quantize_static`, min-max, in each of its forms."""
    signed: dict[str, Any] = {
        "activation_type": QuantType.QInt8,
        "per_channel": True,
        "extra_options": {"ActivationSymmetric": True, "WeightSymmetric": True},
    }
    found = {
        "quantize_static": static(source, batches()),
        "static, layers alone": static(
            source, batches(), op_types_to_quantize=["MatMul", "Gemm", "Conv"], **signed
        ),
    }
    kinds = [layer.operator for layer in find_layers(onnx.load(source))]
    if 2 * kinds.count("Conv") < len(kinds):
        linears = ["MatMul", "Gemm"]
        found["static, Linears alone"] = static(
            source, batches(), op_types_to_quantize=linears, **signed
        )
    return found


def static(source: Path, batches: Iterator[NDArray[np.uint8]], **options: Any) -> ModelProto:
    """`quantize_static` of an encoder file."""
    out = source.with_suffix(".static.onnx")
    quantize_static(source, out, Reader(batches), **options)
    return onnx.load(out)


def has_modelopt() -> bool:
    """Whether nvidia-modelopt is installed."""
    return importlib.util.find_spec("modelopt") is not None


def modelopt_recipes(source: Path, batches: Batches) -> dict[str, ModelProto]:
    """The encoder file by nvidia-modelopt's defaults, what is not int8 in fp16 as they are, and in
    fp32."""
    out = source.with_suffix(".modelopt.onnx")
    frames = np.concatenate(list(batches()))
    found = {}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from modelopt.onnx.quantization import quantize

        for rest in ("fp16", "fp32"):
            quantize(
                str(source),
                calibration_data={"frames": frames},
                calibration_eps=["cpu"],
                high_precision_dtype=rest,
                output_path=str(out),
                log_level="ERROR",
            )
            found[f"modelopt, rest in {rest}"] = onnx.load(out)
    return found


def int8_weights(model: ModelProto) -> float:
    """The share of the weights of a quantised encoder's Linears and convolutions that is int8,
    whether it is stored so or made from float in the graph."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {node.output[0]: node for node in model.graph.node}
    sizes = {True: 0, False: 0}
    for node in model.graph.node:
        if node.op_type not in OPERATORS:
            continue
        name, int8 = node.input[1], False
        while name in makers and makers[name].op_type in _BETWEEN:
            int8 |= makers[name].op_type == "DequantizeLinear"
            name = makers[name].input[0]
        if name in constants and len(constants[name].dims) > 1:
            sizes[int8] += int(np.prod(constants[name].dims))
    return sizes[True] / max(sum(sizes.values()), 1)
