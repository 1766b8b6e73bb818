"""An encoder's graph with what the rules ask of it."""

from collections.abc import Mapping
from typing import Any

import onnx.numpy_helper
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto

from calibration.layers import OPERATORS, consumers_of, initializers
from calibration.typed_graph import DEQUANTIZE, name_of, types_of


class Graph:
    """A model with what the rules ask of it: constants, types, makers and users of tensors."""

    def __init__(self, model: ModelProto) -> None:
        self.types: Mapping[str, int] = types_of(model)
        self.functions = [function.name for function in model.functions]
        self.constants: dict[str, NDArray[Any]] = dict(initializers(model))
        self.nodes = list(model.graph.node)
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                value = onnx.numpy_helper.to_array(node.attribute[0].t)
                self.constants[node.output[0]] = value
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.users = consumers_of(model)
        self.outputs = {value.name for value in model.graph.output}

    def weight(self, node: NodeProto) -> NDArray[Any] | None:
        """The constant that a Linear or convolution multiplies by, int8 or float; else None."""
        if node.op_type not in OPERATORS or node.input[0] in self.constants:
            return None
        name = node.input[1]
        name = self.makers[name].input[0] if self.dequantized(name) else name
        found = self.constants.get(name)
        return found if found is not None and found.ndim >= 2 else None

    def dequantized(self, name: str) -> bool:
        """Whether a tensor comes from a DequantizeLinear."""
        return name in self.makers and self.makers[name].op_type == DEQUANTIZE

    def kinds(self, node: NodeProto) -> set[int | None]:
        """The element types that go into a node and come out."""
        return {self.types.get(name) for name in (*node.input, *node.output)}

    def place(self, name: str) -> str:
        """Where a tensor is, in words: the node that makes or takes it."""
        nodes = [self.makers[name]] if name in self.makers else self.users.get(name, [])
        return f"{name_of(nodes[0])} ({name})" if nodes else name


def type_name(kind: int) -> str:
    """An element type in words."""
    name = TensorProto.DataType.Name(kind).lower()
    return "float32" if name == "float" else name


def attributes(node: NodeProto) -> dict[str, int]:
    return {a.name: a.i for a in node.attribute}
