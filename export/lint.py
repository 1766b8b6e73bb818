"""The rules that the graph of every encoder file holds to, and the nodes that break them.

They are what makes a file portable: operators and forms that TensorRT's parsers (8.6 to 11) and
ONNX Runtime read alike, and a precision that the graph itself states. A file that breaks one may
load, run, and be wrong or slow on one device only: that is why they are looked for here.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import onnx.numpy_helper
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto

from calibration.half import FLOAT, FLOAT_OPS, GEMMS, HALF, LARGEST, LOST, name_of, types_of
from calibration.layers import OPERATORS, consumers_of, initializers
from runtime.errors import EdgeClipError

from .to_onnx import OPSET, REDUCTIONS

PRECISIONS = ("fp32", "fp16", "int8", "int8_fp16")
IR_VERSION = 8  # the newest that readers of opset 17 know
HALF_SCALES_OPSET = 19  # from which on the scales of Q/DQ may be float16
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"

# What our exports are made of, and a few operators as old and as plain.
OPERATORS_READ_ALIKE = REDUCTIONS | {
    "Abs", "Add", "And", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat", "Constant",
    "ConstantOfShape", "Conv", "ConvTranspose", "DepthToSpace", "Div", "Equal", "Erf", "Exp",
    "Expand", "Flatten", "Floor", "Gather", "Gemm", "GlobalAveragePool", "GlobalMaxPool",
    "Greater", "HardSigmoid", "Identity", "InstanceNormalization", "LayerNormalization",
    "LeakyRelu", "Less", "Log", "MatMul", "Max", "MaxPool", "Min", "Mul", "Neg", "Not", "Or",
    "PRelu", "Pad", "Pow", "ReduceSum", "Relu", "Reshape", "Resize", "Shape", "Sigmoid",
    "Slice", "Softmax", "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Tile",
    "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
_INTEGERS = {TensorProto.UINT8, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL}


def lint(model: ModelProto, precision: str, float_layers: Collection[str] = ()) -> Iterator[str]:
    """Yields what in an encoder breaks the rules of its precision, each with its node.

    `model` is one that onnx.checker takes; `float_layers` are what the manifest says of it.
    """
    yield from _versions(model, precision)
    try:
        graph = Graph(model)
    except EdgeClipError as error:  # types that contradict each other
        yield str(error)
        return
    yield from _operators(graph, precision)
    if precision != "int8_fp16":  # its opset knows no other form
        yield from _reductions(graph)
    yield from _constants(graph)
    yield from _types(graph, precision)
    if precision.endswith("fp16"):
        yield from _halves(graph, float_layers)
    if precision.startswith("int8"):
        yield from _quantisers(graph, HALF if precision == "int8_fp16" else FLOAT)
        yield from _layers(graph, float_layers)


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


def _versions(model: ModelProto, precision: str) -> Iterator[str]:
    opsets = {o.domain or "ai.onnx": o.version for o in model.opset_import}
    if precision == "int8_fp16":
        if set(opsets) != {"ai.onnx"} or opsets["ai.onnx"] < HALF_SCALES_OPSET:
            yield f"opset {opsets}, expected {HALF_SCALES_OPSET} or later of the default domain"
        return
    if opsets != {"ai.onnx": OPSET}:
        yield f"opset {opsets}, expected {OPSET} of the default domain only"
    if model.ir_version > IR_VERSION:
        yield f"IR version {model.ir_version}: readers of opset {OPSET} know up to {IR_VERSION}"


def type_name(kind: int) -> str:
    """An element type in words."""
    name = TensorProto.DataType.Name(kind).lower()
    return "float32" if name == "float" else name


def _operators(graph: Graph, precision: str) -> Iterator[str]:
    for name in graph.functions:
        yield f"{name}: the file holds a function of its own; only ONNX's operators are read alike"
    pair = {QUANTIZE, DEQUANTIZE} if precision.startswith("int8") else set()
    for node in graph.nodes:
        if node.domain not in ("", "ai.onnx"):
            yield f"{name_of(node)}: {node.op_type} is of the custom domain {node.domain}"
        elif node.op_type not in OPERATORS_READ_ALIKE | pair:
            yield f"{name_of(node)}: {node.op_type} is not an operator of {precision} files"


def _reductions(graph: Graph) -> Iterator[str]:
    """TensorRT 8 takes no notice of axes that are an input (but ReduceSum's), and reduces all."""
    for node in graph.nodes:
        if node.op_type in REDUCTIONS and len(node.input) > 1:
            yield f"{name_of(node)}: {node.op_type} takes its axes as an input"
        elif node.op_type in REDUCTIONS and not any(a.name == "axes" for a in node.attribute):
            yield f"{name_of(node)}: {node.op_type} names no axes"
        elif node.op_type == "ReduceSum" and not set(node.input[1:2]) & graph.constants.keys():
            yield f"{name_of(node)}: ReduceSum names no constant axes"


def _constants(graph: Graph) -> Iterator[str]:
    """All are finite, and taken by some node: a dead copy of a weight is found here."""
    for name, values in graph.constants.items():
        if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
            yield f"{graph.place(name)} holds infinity or nan; masks are finite (-1e4)"
        if name not in graph.users and name not in graph.outputs:
            yield f"{name}: no node takes this constant"
    for node in graph.nodes:
        for a in node.attribute:
            held = onnx.numpy_helper.to_array(a.t) if a.HasField("t") else [a.f, *a.floats]
            if node.op_type != "Constant" and not np.isfinite(held).all():
                yield f"{name_of(node)}: its attribute {a.name} holds infinity or nan"


def _types(graph: Graph, precision: str) -> Iterator[str]:
    """No element type that the precision does not name: float16 in fp32, uint8 in Q/DQ."""
    allowed = _INTEGERS | {FLOAT, TensorProto.UNDEFINED}
    allowed |= {HALF} if precision.endswith("fp16") else set()
    allowed |= {TensorProto.INT8} if precision.startswith("int8") else set()
    for kind in sorted(set(graph.types.values()) - allowed):
        names = [name for name, found in graph.types.items() if found == kind]
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        yield f"{graph.place(names[0])}{more} is {type_name(kind)}: {precision} files hold none"


def _halves(graph: Graph, float_layers: Collection[str]) -> Iterator[str]:
    """Linears and convolutions in float16; statistics, the last layer and the norm in float32."""
    tail, known = _tail(graph), {name_of(node) for node in graph.nodes}
    layers = [node for node in graph.nodes if graph.weight(node) is not None]
    for node in layers:
        in_float = HALF not in graph.kinds(node)
        if in_float and name_of(node) not in tail | set(float_layers) and _fits(graph, node):
            yield f"{name_of(node)}: {node.op_type} has float32 weights, expected float16"
    for node in graph.nodes:
        if node.op_type == "LayerNormalization" and _attributes(node).get("stash_type", 1) != 1:
            yield f"{name_of(node)}: LayerNormalization with a stash_type other than float32"
        if HALF not in graph.kinds(node):
            continue
        if node.op_type in FLOAT_OPS:
            yield f"{name_of(node)}: {node.op_type} computes in float16, expected float32"
        elif name_of(node) in tail:
            yield f"{name_of(node)}: {node.op_type} after the last layer is float16, not float32"
        elif name_of(node) in float_layers:
            yield f"{name_of(node)}: {node.op_type} is float16, and listed in float_layers"
    for name in sorted(set(float_layers) - known):
        yield f"{name} is listed in float_layers, and the graph has no such node"


def _tail(graph: Graph) -> set[str]:
    """The last Linear or convolution, and what follows from it: the L2 norm."""
    last = [node for node in graph.nodes if node.op_type in GEMMS][-1:]
    tensors = {name for node in last for name in node.output}
    found = {name_of(node) for node in last}
    for node in graph.nodes:
        if tensors & set(node.input):
            tensors |= set(node.output)
            found.add(name_of(node))
    return found


def _fits(graph: Graph, node: NodeProto) -> bool:
    """Whether float16 can hold the constants of a node: none too large, little lost by rounding."""
    for name in node.input:
        values = np.asarray(graph.constants.get(name, 0), np.float32)
        half = values.clip(-LARGEST, LARGEST).astype(np.float16).astype(np.float32)
        if np.linalg.norm(values - half) > LOST * np.linalg.norm(values):
            return False
    return True


def _quantisers(graph: Graph, scales: int) -> Iterator[str]:
    """Symmetric int8 with sound scales, between activations, constants and layers alone."""
    for node in graph.nodes:
        if node.op_type in (QUANTIZE, DEQUANTIZE):
            own = _quantizer if node.op_type == QUANTIZE else _dequantizer
            for fault in (*_parameters(graph, node, scales), *own(graph, node)):
                yield f"{name_of(node)}: {fault}"


def _parameters(graph: Graph, node: NodeProto, scales: int) -> Iterator[str]:
    scale = graph.constants.get(node.input[1])
    if scale is None or graph.types.get(node.input[1]) != scales:
        yield f"its scale is not a {type_name(scales)} constant"
    elif not (np.isfinite(scale) & (scale > 0)).all():
        yield "its scales are not all positive and finite"
    zero = graph.constants.get(node.input[2]) if len(node.input) > 2 else None
    if zero is None or zero.dtype != np.int8 or zero.any():
        what = "missing" if zero is None else f"{zero.flat[0]} of {zero.dtype}"
        yield f"it is not symmetric int8: its zero point is {what}, expected 0 of int8"


def _quantizer(graph: Graph, node: NodeProto) -> Iterator[str]:
    if node.input[0] in graph.constants:
        yield f"it quantises the float constant {node.input[0]}; weights are stored as int8"
    elif graph.constants.get(node.input[1], np.zeros(())).size != 1:
        yield "an activation has one scale, not one for each channel"
    for user in graph.users.get(node.output[0], []):
        if user.op_type != DEQUANTIZE or user.input[1] != node.input[1]:
            yield f"{name_of(user)} does not undo it: {user.op_type}, or by another scale"


def _dequantizer(graph: Graph, node: NodeProto) -> Iterator[str]:
    """An activation's feeds first inputs, a weight's second ones: no Add, no attention product."""
    source = graph.makers.get(node.input[0])
    position = 1 if node.input[0] in graph.constants else 0
    if position == 0 and (source is None or source.op_type != QUANTIZE):
        yield "it takes neither int8 weights nor what a QuantizeLinear makes"
    for user in graph.users.get(node.output[0], []):
        positions = {i for i, name in enumerate(user.input) if name == node.output[0]}
        if user.op_type not in OPERATORS:
            yield f"Q/DQ feeds {name_of(user)}, which is no Linear or convolution: {user.op_type}"
        elif positions != {position}:
            what = "a weight" if position else "an activation"
            yield f"Q/DQ of {what} feeds input {max(positions)} of {name_of(user)}: {user.op_type}"
    if node.output[0] in graph.outputs:
        yield "Q/DQ feeds an output of the graph"


def _layers(graph: Graph, float_layers: Collection[str]) -> Iterator[str]:
    """Each layer is int8 as a whole, by channel, unless the manifest lists it as float."""
    in_float: set[str] = set()
    quantised: set[str] = set()
    for node in graph.nodes:
        if node.op_type not in OPERATORS:
            continue
        halves = [graph.dequantized(name) for name in node.input[:2]]
        if any(halves) and not all(halves):
            kept = "second" if halves[0] else "first"
            yield f"{name_of(node)}: {node.op_type} takes its {kept} input unquantised"
        if graph.weight(node) is not None:
            (quantised if all(halves) else in_float).add(name_of(node))
        if all(halves):
            yield from (f"{name_of(node)}: {fault}" for fault in _channels(graph, node))
    for name in sorted(in_float - set(float_layers)):
        yield f"{name} is not quantised, and the manifest does not list it in float_layers"
    for name in sorted(set(float_layers) - in_float):
        yield f"{name} is listed in float_layers, and is no float layer of the graph"
    if not quantised:
        yield "it has no quantised layer"


def _channels(graph: Graph, node: NodeProto) -> Iterator[str]:
    """The scales of a layer's weight: one for each output channel, along that axis."""
    weight, pair = graph.weight(node), graph.makers[node.input[1]]
    scale = graph.constants.get(pair.input[1])
    if weight is None or scale is None:
        return  # said elsewhere
    wanted = weight.ndim - 1
    if node.op_type == "Conv" or _attributes(node).get("transB"):
        wanted = 0
    if scale.shape != (weight.shape[wanted],):
        yield f"{scale.size} weight scales, expected one for each of {weight.shape[wanted]} outputs"
    elif _attributes(pair).get("axis", 1) % weight.ndim != wanted:
        yield f"its weight scales run along the wrong axis, expected {wanted}: its output channels"


def _attributes(node: NodeProto) -> dict[str, int]:
    return {a.name: a.i for a in node.attribute}
