"""The rules that the graph of every encoder file holds to, and the nodes that break them.

They are what makes a file portable: operators and forms that TensorRT's parsers (8.6 to 11) and
ONNX Runtime read alike, and a precision that the graph itself states. A file that breaks one may
load, run, and be wrong or slow on one device only: that is why they are looked for here.
"""

from collections.abc import Collection, Iterator

import numpy as np
import onnx.numpy_helper
from onnx import ModelProto, NodeProto, TensorProto

from calibration.half import FLOAT_OPS, GEMMS, HALF_SCALES_OPSET, LARGEST, LOST
from calibration.typed_graph import DEQUANTIZE, FLOAT, HALF, QUANTIZE, name_of
from runtime.errors import EdgeClipError

from .encoder_graph import Graph, attributes, type_name
from .lint_int8 import layers, quantisers
from .to_onnx import OPSET, REDUCTIONS

PRECISIONS = ("fp32", "fp16", "int8", "int8_fp16")
IR_VERSION = 8  # the newest that readers of opset 17 know

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
        yield from _halves(graph, float_layers, int8=precision == "int8_fp16")
    if precision.startswith("int8"):
        # The layers that int8_fp16 computes in float have scales in float, so that types agree.
        yield from quantisers(graph, {FLOAT, HALF} if precision == "int8_fp16" else {FLOAT})
        yield from layers(graph, float_layers)


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


def _halves(graph: Graph, float_layers: Collection[str], int8: bool) -> Iterator[str]:
    """Linears and convolutions in float16; statistics, the last layer and the norm in float32."""
    tail, known = _tail(graph), {name_of(node) for node in graph.nodes}
    layers = [node for node in graph.nodes if graph.weight(node) is not None]
    for node in layers:
        in_float = HALF not in graph.kinds(node)
        if in_float and name_of(node) not in tail | set(float_layers) and _fits(graph, node):
            yield f"{name_of(node)}: {node.op_type} has float32 weights, expected float16"
    for node in graph.nodes:
        if node.op_type == "LayerNormalization" and attributes(node).get("stash_type", 1) != 1:
            yield f"{name_of(node)}: LayerNormalization with a stash_type other than float32"
        if HALF not in graph.kinds(node):
            continue
        if node.op_type in FLOAT_OPS:
            yield f"{name_of(node)}: {node.op_type} computes in float16, expected float32"
        elif name_of(node) in tail:
            yield f"{name_of(node)}: {node.op_type} after the last layer is float16, not float32"
        elif name_of(node) in float_layers and not int8:  # there it may also say: not int8
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
