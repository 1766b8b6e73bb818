"""An fp32 encoder in half precision, with the precision of every node in the graph itself.

TensorRT from 10 on is strongly typed: it runs what the file says, and so does ONNX Runtime. The
file therefore says it all: fp16 weights, convolutions and Linears; float where half would cost
accuracy (see `to_half`); and a Cast wherever the two meet.

The pass is our own, not onnxconverter-common's `float16`: that one casts around every node of a
blocked kind, leaves pairs of Casts behind, and clips weights that do not fit; which nodes stay in
float must be ours to choose, by their place in the encoder as well as by their kind.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.version_converter
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from runtime.errors import DataError

from .typed_graph import (
    CARRIERS,
    DEQUANTIZE,
    FLOAT,
    HALF,
    QUANTIZE,
    TypedGraph,
    name_of,
    read_graph,
    types_of,
)

LARGEST = 65504.0  # of float16
HALF_SCALES_OPSET, HALF_SCALES_IR = 19, 9  # the first with scales of Q/DQ in float16
LOST = 0.01  # of a constant's norm: more, and its node stays in float

GEMMS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
MEANS = {"GlobalAveragePool", "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare"}
# Statistics, and the functions whose range or slope is too much for half.
FLOAT_OPS = MEANS | {
    "BatchNormalization", "Exp", "InstanceNormalization", "LayerNormalization", "Log", "LogSoftmax",
    "LpNormalization", "MeanVarianceNormalization", "Reciprocal", "ReduceL1", "ReduceLogSum",
    "ReduceLogSumExp", "ReduceProd", "Sqrt",
}  # fmt: skip


def to_half(model: ModelProto, keep_float: Collection[str] = ()) -> ModelProto:
    """The encoder with fp16 weights, convolutions and Linears; `model` itself is left as it is.

    Inputs stay as they are and outputs stay float32. These nodes compute in float, on float
    constants, with one Cast for each tensor that goes from half to float or back:

    - what is done to integers before the first convolution or Linear: the normalisation of uint8
      frames, the search for the end of a text;
    - LayerNormalization, means, sums and other statistics. (`stash_type` 1 asks for float
      statistics of half inputs too, but a backend may take no notice);
    - the last Linear, the projection, and all that follows from it: the L2 norm;
    - nodes with a constant that half cannot hold: beyond 65504, or lost between its steps of
      6e-8, as an epsilon of 1e-12 is;
    - those named in `keep_float` (see `overflowing`; a node without a name goes by its output).

    Softmax runs in half: its results lie in 0..1, and TensorRT fuses attention only where no Cast
    is inside. Reshapes and their like run in the type around them, and so do Q/DQ (of opset 19 on,
    which has float16 scales). The same model gives the same bytes, in the opset and IR version it
    came in.

    Raises UnsupportedFormat for a graph that is not fp32 or not of ONNX's own operators, and
    DataError for a name in `keep_float` that no node has.
    """
    graph = read_graph(model)
    unknown = sorted(set(keep_float) - {name_of(node) for node in graph.nodes})
    if unknown:
        raise DataError(
            f"keep_float names {unknown[0]!r}, and the graph has no such node; "
            f"its last one is {name_of(graph.nodes[-1])!r}"
        )
    made = onnx.helper.make_model(
        _Forms(graph, _in_float(graph, keep_float)).assembled(model.graph),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
        producer_name=model.producer_name,
    )
    onnx.checker.check_model(made, full_check=True)
    return made


def int8_in_half(model: ModelProto, keep_float: Collection[str] = ()) -> ModelProto:
    """The int8 encoder of `quantize` with fp16 for what is float32 in it, its scales included.

    Only opset 19 has such scales. What Q/DQ holds of `keep_float` is taken as it comes: a layer
    that is no longer quantised has none.
    """
    newer = onnx.version_converter.convert_version(model, HALF_SCALES_OPSET)
    newer.ir_version = HALF_SCALES_IR
    names = {name_of(node) for node in newer.graph.node}
    return to_half(newer, set(keep_float) & names)


def in_float(half: ModelProto, named: Collection[str] = ()) -> set[str]:
    """The Linears and convolutions that an encoder of `to_half` leaves in float, but for the last
    one, which always is; and of the nodes `named`, those that are no Q/DQ."""
    types = types_of(half)
    gemms = [node for node in half.graph.node if node.op_type in GEMMS][:-1]
    found = {name_of(n) for n in gemms if HALF not in {types.get(x) for x in n.output}}
    others = {name_of(n) for n in half.graph.node if n.op_type not in (QUANTIZE, DEQUANTIZE)}
    return found | (set(named) & others)


def _in_float(graph: TypedGraph, keep: Collection[str]) -> set[int]:
    """The nodes that compute in float; the others compute in half."""
    fixed = _head(graph) | _tail(graph)
    for i, node in enumerate(graph.nodes):
        inputs, outputs = list(graph.inputs_of(i)), list(graph.outputs_of(i))
        if (
            name_of(node) in keep
            or node.op_type in FLOAT_OPS
            or not any(can for _, can in inputs + outputs)
            or not (inputs or node.op_type in CARRIERS)  # makes numbers from nothing
            or not all(_fits(graph.constants[n]) for n, _ in inputs if n in graph.constants)
        ):
            fixed.add(i)
    return _with_carriers(graph, _with_pairs(graph, fixed | _squares(graph)))


def _head(graph: TypedGraph) -> set[int]:
    """What computes on integers made float, before the first convolution or Linear."""
    after: set[int] = set()
    found: set[int] = set()
    for i, node in enumerate(graph.nodes):
        parents = graph.parents(i)
        if node.op_type in GEMMS | {QUANTIZE} or parents & after:
            after.add(i)
        elif parents & found or graph.casts_integers(i):
            found.add(i)
    return {i for i in found if graph.nodes[i].op_type not in CARRIERS}


def _tail(graph: TypedGraph) -> set[int]:
    """The last convolution or Linear, and what follows from it."""
    gemms = [i for i, node in enumerate(graph.nodes) if node.op_type in GEMMS]
    found = set(gemms[-1:])
    for i in range(len(graph.nodes)):
        if graph.parents(i) & found:
            found.add(i)
    return found


def _fits(constant: TensorProto) -> bool:
    """Whether half can hold a constant: nothing is beyond it, and little is lost in rounding."""
    values = onnx.numpy_helper.to_array(constant).astype(np.float32)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16).astype(np.float32)
    if not np.isfinite(half).all():
        return False
    return bool(np.linalg.norm(values - half) <= LOST * np.linalg.norm(values))


def _squares(graph: TypedGraph) -> set[int]:
    """The squares that a mean or sum is taken of: 256 * 256 is beyond half."""
    means = [i for i, node in enumerate(graph.nodes) if node.op_type in MEANS]
    nodes = {i: graph.nodes[i] for mean in means for i in graph.parents(mean)}
    return {
        i
        for i, node in nodes.items()
        if node.op_type == "Pow" or (node.op_type == "Mul" and node.input[0] == node.input[1])
    }


def _with_pairs(graph: TypedGraph, fixed: set[int]) -> set[int]:
    """Adds what must be of a float node's type for Q/DQ to be fused: a layer, the pairs on its
    input and its weight, and the other layers that share one."""
    found, left = set(fixed), list(fixed)
    while left:
        i = left.pop()
        makes_pair = graph.nodes[i].op_type in (QUANTIZE, DEQUANTIZE)
        users = {user for name in graph.nodes[i].output for user in graph.users[name]}
        pairs = {p for p in graph.parents(i) if graph.nodes[p].op_type in (QUANTIZE, DEQUANTIZE)}
        near = pairs | users if makes_pair else pairs
        left += near - found
        found |= near
    return found


def _with_carriers(graph: TypedGraph, fixed: set[int]) -> set[int]:
    """Adds the carriers between two float nodes, where half would mean a Cast there and back.

    A carrier of constants or integers is as good as after a float node, and a node without a
    float output (Shape, Equal, a Cast to integers) as good as before one.
    """
    after, before = set(fixed), set(fixed)
    for i in range(len(graph.nodes)):
        names = {name for name, _ in graph.inputs_of(i)} - graph.constants.keys()
        made = {graph.makers.get(name) for name in names}  # None: an input of the graph
        if graph.carries(i) and (not names or None in made or made & after):
            after.add(i)
    for i in reversed(range(len(graph.nodes))):
        names = {name for name, _ in graph.outputs_of(i)}
        users = {user for name in names for user in graph.users[name]}
        if graph.carries(i) and (not names or names & graph.borders or users & before):
            before.add(i)
    return after & before


class _Forms:
    """The forms, float and half, in which each float tensor is made or asked for.

    The float form has the tensor's name, and so has the half one where it is the only one.
    """

    def __init__(self, graph: TypedGraph, floats: set[int]) -> None:
        self._graph, self._floats = graph, floats
        self._kinds: dict[str, set[int]] = defaultdict(set)
        for name in graph.borders:
            self._kinds[name].add(FLOAT)
        for i in range(len(graph.nodes)):
            for name, can in (*graph.inputs_of(i), *graph.outputs_of(i)):
                self._kinds[name].add(self._kind(i, can))

    def assembled(self, source: GraphProto) -> GraphProto:
        """The graph again, on these forms."""
        nodes: list[NodeProto] = []
        for value in source.input:
            nodes += self._casts(value.name, FLOAT, value.name)
        for i in range(len(self._graph.nodes)):
            nodes.append(self._node(i))
            for name, can in self._graph.outputs_of(i):
                made = self._kind(i, can)
                start = nodes[-1].input[0] if self._graph.casts_integers(i) else None
                nodes += self._casts(name, made, start or self._called(name, made))
        constants = [t for name in self._graph.constants for t in self._constants(name)]
        return onnx.helper.make_graph(nodes, source.name, source.input, source.output, constants)

    def _kind(self, i: int, can: bool) -> int:
        return HALF if can and i not in self._floats else FLOAT

    def _called(self, name: str, kind: int) -> str:
        return name if kind == FLOAT or FLOAT not in self._kinds[name] else f"{name}.half"

    def _node(self, i: int) -> NodeProto:
        ports = (*self._graph.inputs_of(i), *self._graph.outputs_of(i))
        names = {name: self._called(name, self._kind(i, can)) for name, can in ports}
        node = NodeProto()
        node.CopyFrom(self._graph.nodes[i])
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        if node.op_type == "Cast" and any(self._graph.outputs_of(i)):
            next(a for a in node.attribute if a.name == "to").i = self._kind(i, True)
        return node

    def _casts(self, name: str, made: int, start: str) -> list[NodeProto]:
        """The Cast from `start` to the form that the tensor is not made in, if one is asked for."""
        forms = {self._called(name, kind): kind for kind in self._kinds[name] - {made}}
        return [
            onnx.helper.make_node("Cast", [start], [form], f"{form}.cast", to=kind)
            for form, kind in forms.items()
        ]

    def _constants(self, name: str) -> Iterator[TensorProto]:
        tensor = self._graph.constants[name]
        values = onnx.numpy_helper.to_array(tensor)
        if tensor.data_type != FLOAT:
            yield onnx.numpy_helper.from_array(values, name)
        for kind in sorted(self._kinds[name]):
            form = values if kind == FLOAT else values.astype(np.float16)
            yield onnx.numpy_helper.from_array(form, self._called(name, kind))
