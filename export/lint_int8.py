"""The rules of Q/DQ: symmetric int8 with sound scales, on Linears and convolutions alone."""

from collections.abc import Collection, Iterator

import numpy as np
from onnx import NodeProto

from calibration.layers import OPERATORS
from calibration.typed_graph import DEQUANTIZE, HALF, QUANTIZE, name_of

from .encoder_graph import Graph, attributes, type_name


def quantisers(graph: Graph, scales: set[int]) -> Iterator[str]:
    """Symmetric int8 with sound scales, between activations, constants and layers alone."""
    for node in graph.nodes:
        if node.op_type in (QUANTIZE, DEQUANTIZE):
            own = _quantizer if node.op_type == QUANTIZE else _dequantizer
            for fault in (*_parameters(graph, node, scales), *own(graph, node)):
                yield f"{name_of(node)}: {fault}"


def _parameters(graph: Graph, node: NodeProto, scales: set[int]) -> Iterator[str]:
    scale = graph.constants.get(node.input[1])
    if scale is None or graph.types.get(node.input[1]) not in scales:
        yield f"its scale is not a {' or '.join(map(type_name, sorted(scales)))} constant"
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
        if position == 0 and _fused_sum(graph, user):
            continue
        if user.op_type not in OPERATORS:
            yield f"Q/DQ feeds {name_of(user)}, which is no Linear or convolution: {user.op_type}"
        elif positions != {position}:
            what = "a weight" if position else "an activation"
            yield f"Q/DQ of {what} feeds input {max(positions)} of {name_of(user)}: {user.op_type}"
    if node.output[0] in graph.outputs:
        yield "Q/DQ feeds an output of the graph"


def _fused_sum(graph: Graph, node: NodeProto) -> bool:
    """Whether a node adds what an int8 convolution makes, for it alone: TensorRT runs them as one,
    and then gains by int8 on the other side."""
    makers = [graph.makers.get(name) for name in node.input]
    return node.op_type == "Add" and any(
        maker is not None
        and maker.op_type == "Conv"
        and all(map(graph.dequantized, maker.input[:2]))
        and len(graph.users[maker.output[0]]) == 1
        for maker in makers
    )


def layers(graph: Graph, float_layers: Collection[str]) -> Iterator[str]:
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
    if HALF in graph.types.values():
        in_float |= {name_of(node) for node in graph.nodes if HALF not in graph.kinds(node)}
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
    if node.op_type == "Conv" or attributes(node).get("transB"):
        wanted = 0
    if scale.shape != (weight.shape[wanted],):
        yield f"{scale.size} weight scales, expected one for each of {weight.shape[wanted]} outputs"
    elif attributes(pair).get("axis", 1) % weight.ndim != wanted:
        yield f"its weight scales run along the wrong axis, expected {wanted}: its output channels"
