"""A graph as the passes read it: in topological order, with the types of all its tensors."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import ModelProto, NodeProto, TensorProto
from onnx.defs import OpSchema

from runtime.errors import UnsupportedFormat

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
# What moves numbers and does not compute: it takes the type that is there.
CARRIERS = {
    "Cast", "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND",
    "Identity", "Pad", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose",
    "Unsqueeze",
}  # fmt: skip


def name_of(node: NodeProto) -> str:
    """The name that a node is kept in float by: its own, or its first output's."""
    return node.name or node.output[0]


@dataclass(frozen=True)
class TypedGraph:
    """A graph with what the pass asks of it. Nodes go by their place in topological order."""

    nodes: Sequence[NodeProto]
    schemas: Sequence[OpSchema]
    types: Mapping[str, int]  # element types of all tensors
    constants: Mapping[str, TensorProto]
    makers: Mapping[str, int]  # the node that each computed tensor comes from
    users: Mapping[str, Sequence[int]]
    borders: set[str]  # the graph's own inputs and outputs

    def inputs_of(self, i: int) -> Iterator[tuple[str, bool]]:
        """A node's float inputs, and whether its operator takes them as half too."""
        return self._ports(self.nodes[i].input, self.schemas[i].inputs)

    def outputs_of(self, i: int) -> Iterator[tuple[str, bool]]:
        """A node's float outputs, and whether its operator gives them as half too."""
        return self._ports(self.nodes[i].output, self.schemas[i].outputs)

    def carries(self, i: int) -> bool:
        """Whether a node takes the type that is there: it moves numbers, or makes none."""
        kind = self.nodes[i].op_type
        return kind in CARRIERS or not (kind == QUANTIZE or any(self.outputs_of(i)))

    def casts_integers(self, i: int) -> bool:
        """Whether a node is a Cast from integers or booleans."""
        return self.nodes[i].op_type == "Cast" and not any(self.inputs_of(i))

    def parents(self, i: int) -> set[int]:
        """The nodes that a node takes its inputs from."""
        return {self.makers[name] for name in self.nodes[i].input if name in self.makers}

    def _ports(
        self, names: Iterable[str], formal: Sequence[OpSchema.FormalParameter]
    ) -> Iterator[tuple[str, bool]]:
        for position, name in enumerate(names):
            if self.types.get(name) == FLOAT:
                kind = formal[min(position, len(formal) - 1)]  # the last one may be variadic
                yield name, "tensor(float16)" in kind.types


def read_graph(model: ModelProto) -> TypedGraph:
    """The graph in topological order, typed. Raises UnsupportedFormat where it is not an fp32 graph
    of ONNX's own operators."""
    constants = {t.name: t for t in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
        else:
            nodes.append(node)
    schemas, types = [_schema(node, model) for node in nodes], types_of(model)
    half = [name for name, kind in types.items() if kind == HALF]
    if half:
        raise UnsupportedFormat(f"{half[0]} is float16 already; convert the fp32 file of the model")
    users = defaultdict(list)
    for i, node in enumerate(nodes):
        for name in node.input:
            users[name].append(i)
    return TypedGraph(
        nodes=nodes,
        schemas=schemas,
        types=types,
        constants=constants,
        makers={name: i for i, node in enumerate(nodes) for name in node.output if name},
        users=users,
        borders={value.name for value in (*model.graph.input, *model.graph.output)},
    )


def _schema(node: NodeProto, model: ModelProto) -> OpSchema:
    if any(a.HasField("g") or a.graphs for a in node.attribute):
        raise UnsupportedFormat(
            f"{name_of(node)}: {node.op_type} holds a graph of its own, which cannot go to half "
            "precision; export the model without control flow"
        )
    opsets = {o.domain: o.version for o in model.opset_import}
    try:
        return onnx.defs.get_schema(node.op_type, opsets.get(node.domain, 0), node.domain)
    except onnx.defs.SchemaError as error:
        raise UnsupportedFormat(
            f"{name_of(node)}: the operator {node.op_type} is not ONNX's own; "
            "convert the file as it was exported, before any optimiser"
        ) from error


def types_of(model: ModelProto) -> dict[str, int]:
    """Element types of all tensors. The weights are shown to the inference as inputs: it would
    copy them."""
    light = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    light.graph.name = model.graph.name
    light.graph.node.extend(model.graph.node)
    light.graph.input.extend(model.graph.input)
    light.graph.output.extend(model.graph.output)
    for t in model.graph.initializer:
        if t.data_type in (FLOAT, HALF):
            value = onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims)
            light.graph.input.append(value)
        else:
            light.graph.initializer.append(t)
    try:
        graph = onnx.shape_inference.infer_shapes(light, strict_mode=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise UnsupportedFormat(f"the graph does not hold together: {error}") from error
    types = {t.name: t.data_type for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    return types
