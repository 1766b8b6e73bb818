"""What of an ONNX graph is quantised: its Linears and convolutions, and what feeds them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx.numpy_helper
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from .metrics import Floats

OPERATORS = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True)
class Layer:
    """One MatMul, Gemm or Conv whose second input is a constant.

    `input` is the tensor that it takes and `weight` its constant; `out_axis` and `in_axis` are the
    weight's axes of output and input channels (`in_axis` None: grouped, so that an output does
    not see every input channel); `bias` is the constant added to its output, if any.
    """

    name: str
    title: str
    operator: str
    input: str
    weight: str
    out_axis: int
    in_axis: int | None
    bias: str | None
    size: int

    @property
    def channel_axis(self) -> int:
        """The axis of the channels in its input."""
        return 1 if self.operator == "Conv" else -1


def find_layers(model: ModelProto) -> tuple[Layer, ...]:
    """The layers that can be quantised, in the order in which they run."""
    constants = initializers(model)
    consumers = consumers_of(model)
    return tuple(
        _layer(node, constants, consumers)
        for node in model.graph.node
        if node.op_type in OPERATORS
        and node.input[1] in constants
        and node.input[0] not in constants
        and constants[node.input[1]].ndim >= 2
    )


def initializers(model: ModelProto) -> dict[str, NDArray[np.generic]]:
    """The model's constants by name."""
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def consumers_of(model: ModelProto) -> dict[str, list[NodeProto]]:
    """The nodes that take each tensor."""
    found: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in dict.fromkeys(node.input):
            found.setdefault(name, []).append(node)
    return found


def _layer(
    node: NodeProto,
    constants: Mapping[str, NDArray[np.generic]],
    consumers: Mapping[str, list[NodeProto]],
) -> Layer:
    weight = node.input[1]
    bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
    if node.op_type == "MatMul":
        bias = _added(node, constants, consumers)
    attributes = {a.name: a.i for a in node.attribute}
    out_axis, in_axis = _axes(node.op_type, attributes)
    return Layer(
        node.name,
        _title(node, bias),
        node.op_type,
        node.input[0],
        weight,
        out_axis,
        in_axis if attributes.get("group", 1) == 1 else None,
        bias,
        constants[weight].size,
    )


def _axes(operator: str, attributes: Mapping[str, int]) -> tuple[int, int]:
    if operator == "Conv" or attributes.get("transB"):
        return 0, 1
    return 1, 0


def _added(
    node: NodeProto,
    constants: Mapping[str, NDArray[np.generic]],
    consumers: Mapping[str, list[NodeProto]],
) -> str | None:
    """The constant vector that is added to a MatMul's output, and to nothing else."""
    after = consumers.get(node.output[0], [])
    if len(after) != 1 or after[0].op_type != "Add":
        return None
    (other,) = [name for name in after[0].input if name != node.output[0]] or [""]
    return other if other in constants and constants[other].ndim == 1 else None


def _title(node: NodeProto, bias: str | None) -> str:
    """A name to read: the module's, by its weight or its bias, else the node's."""
    for name in (node.input[1], bias or ""):
        path, _, kind = name.rpartition(".")
        if kind in ("weight", "bias") and path:
            return path.removeprefix("tower.").removeprefix("trunk.")
    return node.name


def by_input_channel(values: Floats, layer: Layer) -> Floats:
    """A factor for each input channel [K], in the shape that multiplies the layer's weight."""
    assert layer.in_axis is not None
    shape = [1] * (4 if layer.operator == "Conv" else 2)
    shape[layer.in_axis] = -1
    return values.reshape(shape)
