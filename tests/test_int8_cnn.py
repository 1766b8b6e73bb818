"""Convolutions: biases that give back what int8 loses, sums in int8, and what half loses."""

import dataclasses
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from conftest import COLORS, square
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto
from rich.progress import Progress

from calibration.activations import observe, session_of
from calibration.gate import Judge, Limits
from calibration.half import to_half
from calibration.layers import Layer, find_layers
from calibration.overflow import rounding
from calibration.precisions import half_candidate
from calibration.quantize import quantize, residual_sums
from calibration.ranges import Range, choose_ranges
from calibration.sensitivity import Search, encoder
from export.lint import lint
from export.to_onnx import write_onnx
from export.towers import ImageEncoder
from training.model import create

Frames = NDArray[np.uint8]
Ranges = dict[str, Range]


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> ModelProto:
    path = tmp_path_factory.mktemp("cnn") / "image.onnx"
    write_onnx(
        ImageEncoder(create("nano")), torch.zeros(2, 32, 32, 3, dtype=torch.uint8), "frames", path
    )
    return onnx.load(path)


@pytest.fixture(scope="module")
def frames() -> Frames:
    rng = np.random.default_rng(0)
    return np.stack([square(color, rng)[:32, :32] for color in COLORS.values() for _ in range(8)])


@pytest.fixture(scope="module")
def layers(cnn: ModelProto) -> tuple[Layer, ...]:
    return find_layers(cnn)


@pytest.fixture(scope="module")
def ranges(cnn: ModelProto, layers: tuple[Layer, ...], frames: Frames) -> Ranges:
    return choose_ranges(cnn, layers, observe(cnn, layers, [frames]))


def one_layer(kind: str) -> ModelProto:
    """A grouped convolution, a Gemm, or a MatMul with an Add, with weights that round badly."""
    rng = np.random.default_rng(0)
    weight = rng.uniform(0.2, 1, (8, 1, 3, 3) if kind == "Conv" else (8, 8)).astype(np.float32)
    (weight if kind == "MatMul" else weight.reshape(8, -1).T)[0] = 60.0  # coarse steps
    bias = np.zeros(8, np.float32)
    inputs = ["x", "w"] if kind == "MatMul" else ["x", "w", "b"]
    options: dict[str, Any] = {"Conv": {"group": 8}, "Gemm": {"transB": 1}, "MatMul": {}}[kind]
    nodes = [onnx.helper.make_node(kind, inputs, ["y"], name="layer", **options)]
    if kind == "MatMul":
        nodes[0].output[0] = "product"
        nodes.append(onnx.helper.make_node("Add", ["b", "product"], ["y"], name="bias"))
    value = onnx.helper.make_tensor_value_info
    shape: list[str | int | None] = ["n", 8, "h", "w"] if kind == "Conv" else ["n", 8]
    graph = onnx.helper.make_graph(
        nodes,
        "layer",
        [value("x", onnx.TensorProto.FLOAT, shape)],
        [value("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(weight, "w"), onnx.numpy_helper.from_array(bias, "b")],
    )
    opset = onnx.helper.make_opsetid("", 17)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)


@pytest.mark.parametrize("kind", ["Conv", "Gemm", "MatMul"])
def test_biases_give_back_what_int8_takes_on_average(kind: str) -> None:
    model = one_layer(kind)
    rng = np.random.default_rng(1)
    shape = (64, 8, 6, 6) if kind == "Conv" else (64, 8)
    batches = [rng.uniform(0, 1, shape).astype(np.float32) for _ in range(8)]
    layers = find_layers(model)
    ranges = choose_ranges(model, layers, observe(model, layers, batches))
    plain = {name: dataclasses.replace(own, shifts={}) for name, own in ranges.items()}
    fresh = rng.uniform(0, 1, shape).astype(np.float32)
    want = run(model, fresh)
    other = (0, 2, 3) if kind == "Conv" else 0
    lost, left = (
        np.abs((run(quantize(model, layers, own), fresh) - want).mean(axis=other))
        for own in (plain, ranges)
    )
    assert left.mean() < 0.5 * lost.mean()


def run(model: ModelProto, values: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(session_of(model).run(None, {"x": values})[0])


def test_the_sum_after_a_convolution_takes_the_int8_of_its_neighbour(
    cnn: ModelProto, layers: tuple[Layer, ...], ranges: Ranges, frames: Frames
) -> None:
    ((name, tensor),) = residual_sums(cnn, layers).items()
    without, made = (quantize(cnn, layers, ranges, residuals=flag) for flag in (False, True))
    assert tensor in node_of(without, name).input
    assert f"{tensor}.float" in node_of(made, name).input
    assert list(lint(made, "int8")) == []
    cosines = (encoder(without)(frames) * encoder(made)(frames)).sum(axis=1)
    assert 0.99 < cosines.min() < 1


def node_of(model: ModelProto, name: str) -> NodeProto:
    found: NodeProto
    (found,) = [node for node in model.graph.node if node.name == name]
    return found


def test_no_int8_in_the_sum_after_a_float_convolution(
    cnn: ModelProto, layers: tuple[Layer, ...], ranges: Ranges
) -> None:
    """There TensorRT would fuse nothing; and the rules refuse it."""
    ((name, _),) = residual_sums(cnn, layers).items()
    made = quantize(cnn, layers, ranges, residuals=True)
    convolution = next(
        node
        for node in made.graph.node
        if node.op_type == "Conv" and node.output[0] in node_of(made, name).input
    )
    kept = [convolution.name]
    assert not residual_sums(cnn, [layer for layer in layers if layer.name not in kept])
    convolution.input[:2] = [i.removesuffix(".float") for i in convolution.input[:2]]
    convolution.input[1] = node_of(cnn, convolution.name).input[1]
    weight = next(t for t in cnn.graph.initializer if t.name == convolution.input[1])
    made.graph.initializer.append(weight)
    assert any(f"Q/DQ feeds {name}" in fault for fault in lint(made, "int8", kept))


@pytest.mark.parametrize("holds", [True, False])
def test_sums_are_int8_only_where_the_gate_holds(
    cnn: ModelProto,
    layers: tuple[Layer, ...],
    ranges: Ranges,
    frames: Frames,
    holds: bool,
) -> None:
    judge = Judge(lambda: iter([frames]), encoder(cnn)(frames))
    search = Search(cnn, layers, ranges, judge, Limits(min_cosine=-1.0))
    plain = dataclasses.replace(search.cost([]), cosine_p1=1.0)
    if not holds:
        with_sums = dataclasses.replace(search, residuals=True).cost([])
        search = dataclasses.replace(search, limits=Limits(min_cosine=with_sums.cosine_p1 + 1e-6))
    found, cost = search.with_residuals([], plain)
    assert found.residuals is holds and (cost != plain) is holds


def test_fp16_keeps_in_float_what_loses_most(cnn: ModelProto, frames: Frames) -> None:
    """Channels of an early convolution are tiny, as batch norm folded in leaves some: half has not
    their digits, and the layer behind makes them large again. The function is the same."""
    hard = with_tiny_channels(cnn)
    reference = encoder(cnn)(frames)
    assert (encoder(hard)(frames) * reference).sum(axis=1).min() > 0.99999
    judge = Judge(lambda: iter([frames]), reference)
    naive = judge.cost(encoder(rounding(to_half(hard)), optimise=False))
    with Progress(disable=True) as progress:
        found = half_candidate(hard, lambda: iter([frames]), judge, Limits(), progress)
    assert naive.cosine_p1 < 0.9999 <= found.cost.cosine_p1
    assert 0 < len(found.float_layers) <= 2
    assert list(lint(found.model, "fp16", found.float_layers)) == []


def with_tiny_channels(model: ModelProto) -> ModelProto:
    """Divides channels of the first convolution, and multiplies the weights that take them."""
    made = ModelProto()
    made.CopyFrom(model)
    convolutions = [node for node in made.graph.node if node.op_type == "Conv"][:2]
    tensors = {tensor.name: tensor for tensor in made.graph.initializer}
    first, second = ([tensors[name] for name in node.input[1:]] for node in convolutions)
    for tensor in first:
        scale(tensor, (slice(8),), 2e-6)
    scale(second[0], (slice(None), slice(8)), 5e5)
    return made


def scale(tensor: onnx.TensorProto, where: tuple[int | slice, ...], factor: float) -> None:
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[where] *= factor
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
