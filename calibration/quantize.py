"""Writes the int8 form of an encoder: Q/DQ on the inputs and weights of its layers alone."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from .layers import Layer, by_input_channel, consumers_of, initializers
from .metrics import Floats
from .ranges import Range, quantized_weight


def folded(model: ModelProto, layers: Sequence[Layer], ranges: Mapping[str, Range]) -> ModelProto:
    """The same float function with every smoothing that costs nothing: LayerNormalization divides
    by the factors, the Linears behind it multiply by them."""
    made = ModelProto()
    made.CopyFrom(model)
    constants = initializers(model)
    nodes = {node.name: node for node in made.graph.node}
    makers = {node.output[0]: node for node in made.graph.node}
    for tensor, own in ranges.items():
        if not own.folded:
            continue
        assert own.smooth is not None
        norm = makers[tensor]
        for place in range(1, len(norm.input)):
            value = np.asarray(constants[norm.input[place]], np.float32) / own.smooth
            norm.input[place] = _add(made, f"{norm.name}.{place}", value)
        for layer in (layer for layer in layers if layer.input == tensor):
            weight = np.asarray(constants[layer.weight], np.float32)
            value = weight * by_input_channel(own.smooth, layer)
            nodes[layer.name].input[1] = _add(made, f"{layer.name}.weight", value)
    return without_unused(made)


def quantize(
    model: ModelProto,
    layers: Sequence[Layer],
    ranges: Mapping[str, Range],
    keep_float: Collection[str] = (),
    residuals: bool = False,
) -> ModelProto:
    """The int8 encoder of `model` (as `folded` gives it, with its layers), opset 17.

    Symmetric int8: each layer's input by one scale, its weight by one for each output channel;
    one Q/DQ pair for a tensor that feeds several layers; biases give back what int8 takes from the
    outputs on average, or are rounded where a range is to be `exact`. Layers named in `keep_float`
    stay as they are. With `residuals`, where a convolution's output is added to a tensor that is
    int8 for another layer, the sum takes that int8: TensorRT then runs convolution and sum as one,
    and keeps no float copy of the tensor.

    onnxruntime.quantization also puts Q/DQ on the attention's own products, which TensorRT
    does not gain by, and knows neither smoothing nor one range for each tensor.
    """
    made = ModelProto()
    made.CopyFrom(model)
    writer = _Writer(made, ranges)
    chosen = {layer.name: layer for layer in layers if layer.name not in keep_float}
    sums = residual_sums(model, tuple(chosen.values())) if residuals else {}
    nodes = list(made.graph.node)
    del made.graph.node[:]
    for node in nodes:
        if node.name in chosen:
            made.graph.node.extend(writer.around(node, chosen[node.name]))
        elif node.op_type == "Add":
            writer.sum(node, sums.get(node.name))
        made.graph.node.append(node)
    return without_unused(made)


def residual_sums(model: ModelProto, layers: Sequence[Layer]) -> dict[str, str]:
    """The sums, by their nodes' names, of what a convolution among the layers alone makes and a
    tensor that another layer takes: that tensor."""
    names = {layer.name for layer in layers if layer.operator == "Conv"}
    convolved = {node.output[0] for node in model.graph.node if node.name in names}
    taken, users = {layer.input for layer in layers}, consumers_of(model)
    found = {}
    for node in model.graph.node:
        for own, other in (node.input, node.input[::-1]) if node.op_type == "Add" else ():
            if own in convolved and len(users[own]) == 1 and other in taken - {own}:
                found[node.name] = other
    return found


class _Writer:
    """Makes the nodes that quantise a layer, and changes what it takes."""

    def __init__(self, model: ModelProto, ranges: Mapping[str, Range]) -> None:
        self._model, self._ranges = model, ranges
        self._constants = initializers(model)
        self._done: dict[str, str] = {}
        self._biases: dict[str, tuple[str, str]] = {}  # by a MatMul's output: the old and the new
        self._zero = ""

    def around(self, node: NodeProto, layer: Layer) -> list[NodeProto]:
        """The nodes to put before a layer's node, which then takes what they give."""
        own = self._ranges[layer.input]
        weight = np.asarray(self._constants[node.input[1]], np.float32)
        if own.smooth is not None and not own.folded:
            weight = weight * by_input_channel(own.smooth, layer)
        made = self._input(layer, own)
        node.input[0] = self._done[layer.input]
        name = f"{layer.name}.weight"
        levels, scales = quantized_weight(weight, layer.out_axis, own.exact)
        inputs = [
            _add(self._model, f"{name}.int8", levels),
            _add(self._model, f"{name}.scale", scales),
            _add(self._model, f"{name}.zero", np.zeros(len(scales), np.int8)),
        ]
        node.input[1] = f"{name}.float"
        made.append(_node("DequantizeLinear", inputs, node.input[1], axis=layer.out_axis))
        self._bias(node, layer, own, scales)
        return made

    def sum(self, node: NodeProto, residual: str | None) -> None:
        """Has an Add take the corrected bias of a MatMul, or the int8 form of `residual`."""
        renamed = {}
        for name in node.input:
            if name in self._biases:
                old, new = self._biases[name]
                renamed[old] = new
        if residual in self._done and self._ranges[residual].smooth is None:
            renamed[residual] = self._done[residual]
        node.input[:] = [renamed.get(name, name) for name in node.input]

    def _bias(self, node: NodeProto, layer: Layer, own: Range, scales: Floats) -> None:
        """Has the layer take the bias that its int8 asks for."""
        shift = own.shifts.get(layer.name)
        if (shift is None and not own.exact) or layer.bias not in self._constants:
            return
        if any(a.name == "beta" and a.f != 1 for a in node.attribute):
            return  # its bias is scaled; our exports have none
        bias = np.asarray(self._constants[layer.bias], np.float32)
        bias = bias if shift is None else bias + shift
        if own.exact:
            unit = scales * np.float32(own.scale)
            bias = np.rint(bias / unit) * unit
        name = _add(self._model, f"{layer.name}.bias", bias)
        if node.op_type == "MatMul":
            self._biases[node.output[0]] = layer.bias, name
        else:
            node.input[2] = name

    def _input(self, layer: Layer, own: Range) -> list[NodeProto]:
        """The Q/DQ pair of a layer's input, where an earlier layer has not brought it."""
        tensor, made = layer.input, []
        if tensor in self._done:
            return []
        source = tensor
        if own.smooth is not None and not own.folded:
            factor = 1 / own.smooth
            factor = factor.reshape(-1, 1, 1) if layer.operator == "Conv" else factor
            source = f"{tensor}.smooth"
            name = _add(self._model, f"{source}.factor", factor.astype(np.float32))
            made.append(_node("Mul", [tensor, name], source))
        self._zero = self._zero or _add(self._model, "int8.zero", np.array(0, np.int8))
        scale = _add(self._model, f"{tensor}.scale", np.array(own.scale, np.float32))
        self._done[tensor] = f"{tensor}.float"
        made.append(_node("QuantizeLinear", [source, scale, self._zero], f"{tensor}.int8"))
        inputs = [f"{tensor}.int8", scale, self._zero]
        return [*made, _node("DequantizeLinear", inputs, self._done[tensor])]


def _node(operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> NodeProto:
    return onnx.helper.make_node(operator, inputs, [output], name=f"{output}.node", **attributes)


def _add(model: ModelProto, name: str, value: NDArray[np.generic]) -> str:
    """Adds a constant; returns its name, `name` but for a mark where that is taken."""
    taken = {tensor.name for tensor in model.graph.initializer}
    while name in taken:
        name += "_"
    tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name)
    model.graph.initializer.append(tensor)
    return name


def without_unused(model: ModelProto) -> ModelProto:
    """The model, in place, without constants that no node takes."""
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def int8_share(layers: Sequence[Layer], keep_float: Collection[str]) -> float:
    """The share of the layers' weights that is int8."""
    total = sum(layer.size for layer in layers)
    return sum(layer.size for layer in layers if layer.name not in keep_float) / max(total, 1)
