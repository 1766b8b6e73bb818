"""Encoders in half precision: what runs in which type, that it holds, and what overflows."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime
import pytest
import torch
from conftest import COLORS, square
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto
from onnx.helper import make_node

from calibration.half import to_half
from calibration.metrics import row_cosines
from calibration.overflow import overflowing, rounding
from calibration.typed_graph import FLOAT, HALF
from export.bundle import PROBES, probe_frames
from export.to_onnx import OPSET, write_onnx
from export.towers import ImageEncoder
from runtime.errors import DataError, UnsupportedFormat
from runtime.tokenizer import Tokenizer
from training.model import create

Array = NDArray[Any]
FLOAT_KINDS = {"LayerNormalization", "ReduceMean", "ReduceSum", "Sqrt", "Clip", "Div"}
HALF_KINDS = {"Conv", "Softmax", "Sigmoid", "Relu", "MaxPool", "AveragePool"}


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> ModelProto:
    path = tmp_path_factory.mktemp("cnn") / "image.onnx"
    frames = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    write_onnx(ImageEncoder(create("nano")), frames, "frames", path)
    return onnx.load(path)


@pytest.fixture(scope="module")
def vit(bundle: Path) -> ModelProto:
    return onnx.load(bundle / "image.fp32.onnx")


@pytest.fixture(scope="module")
def text(bundle: Path) -> ModelProto:
    return onnx.load(bundle / "text.fp32.onnx")


@pytest.fixture(scope="module")
def frames() -> Array:
    """Squares of every colour, noise, black and white: uint8 [56, 32, 32, 3]."""
    rng = np.random.default_rng(0)
    squares = [square(color, rng)[:32, :32] for color in COLORS.values() for _ in range(16)]
    return np.concatenate([np.stack(squares), probe_frames(32, 32)])


def run(model: ModelProto, batch: Array, exact: bool = False) -> Array:
    """The first output; with `exact`, every half node's result is rounded to half."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if exact:
        model = rounding(model)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {session.get_inputs()[0].name: batch})[0])


def made(
    nodes: Sequence[NodeProto],
    constants: dict[str, Any],
    source: tuple[int, Sequence[int | str]] = (FLOAT, ("n", 4)),
) -> ModelProto:
    """A model from `x`, of the type and shape `source`, to float32 `y` of as many extents."""
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [onnx.helper.make_tensor_value_info("x", *source)],
        [onnx.helper.make_tensor_value_info("y", FLOAT, [None] * len(source[1]))],
        [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    opset = [onnx.helper.make_opsetid("", OPSET)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)


def weight(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def precisions(model: ModelProto) -> dict[str, int]:
    """The type that each node computes in, by name, where it computes on floats."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    types |= {t.name: t.data_type for t in graph.initializer}
    nodes = [n for n in graph.node if n.op_type != "Cast"]
    return {n.name: types[n.output[0]] for n in nodes if types[n.output[0]] in (FLOAT, HALF)}


def by_kind(model: ModelProto) -> dict[str, set[int]]:
    types: dict[str, set[int]] = {}
    kinds = {node.name: node.op_type for node in model.graph.node}
    for name, kind in precisions(model).items():
        types.setdefault(kinds[name], set()).add(kind)
    return types


def casts(model: ModelProto) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type == "Cast"]


def check_casts(model: ModelProto, most: int) -> None:
    """Few, none of a constant, none after another, none twice."""
    found = casts(model)
    sources = {node.input[0] for node in found}
    assert len(found) <= most
    assert not sources & {node.output[0] for node in found}
    assert not sources & {t.name for t in model.graph.initializer}
    assert len({(n.input[0], n.attribute[0].i) for n in found}) == len(found)


def dtypes(model: ModelProto) -> dict[str, int]:
    return {t.name: t.data_type for t in model.graph.initializer}


@pytest.mark.parametrize("encoder", ["vit", "cnn", "text"])
def test_the_embeddings_hold(
    encoder: str, frames: Array, tokenizer: Tokenizer, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(encoder)
    inputs = tokenizer(PROBES) if encoder == "text" else frames
    half, expected = to_half(model), run(model, inputs)
    for exact in (False, True):
        found = run(half, inputs, exact)
        assert found.dtype == np.float32
        assert np.percentile(row_cosines(expected, found), 1) >= 0.9999
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_any_batch_size(vit: ModelProto, frames: Array, batch: int) -> None:
    half = to_half(vit)
    found, expected = run(half, frames[:batch]), run(half, frames)[:batch]
    assert row_cosines(found, expected).min() > 0.99999


@pytest.mark.parametrize("encoder", ["vit", "cnn", "text"])
def test_the_file(encoder: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(encoder)
    before = model.SerializeToString(deterministic=True)
    half = to_half(model)
    assert half.SerializeToString() == to_half(model).SerializeToString()
    assert model.SerializeToString(deterministic=True) == before
    assert half.graph.input == model.graph.input
    assert half.graph.output == model.graph.output
    assert [(o.domain, o.version) for o in half.opset_import] == [("", OPSET)]
    assert half.ir_version == 8
    assert not half.graph.value_info
    assert half.ByteSize() < 0.6 * model.ByteSize()


@pytest.mark.parametrize(("encoder", "most"), [("vit", 2 * 6 + 3), ("cnn", 3), ("text", 2 * 3 + 4)])
def test_what_runs_in_which_precision(
    encoder: str, most: int, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(encoder)
    half = to_half(model)
    types = by_kind(half)
    for kind in FLOAT_KINDS & set(types):
        assert types[kind] == {FLOAT}, kind
    for kind in HALF_KINDS & set(types):
        assert types[kind] == {HALF}, kind
    check_casts(half, most)
    of_node = precisions(half)
    linears = [n.name for n in model.graph.node if n.op_type in ("MatMul", "Gemm", "Conv")]
    assert {of_node[name] for name in linears[:-1]} == {HALF}
    assert of_node[linears[-1]] == FLOAT
    for node in half.graph.node:
        if node.op_type in ("LayerNormalization", "Conv"):
            expected = FLOAT if node.op_type == "LayerNormalization" else HALF
            assert {dtypes(half)[name] for name in node.input[1:]} == {expected}


def test_frames_are_normalised_in_float(cnn: ModelProto) -> None:
    half = to_half(cnn)
    first = next(i for i, n in enumerate(half.graph.node) if n.op_type == "Conv")
    assert [n.op_type for n in half.graph.node[:first]] == "Cast Transpose Mul Add Cast".split()
    assert dtypes(half)["scale"] == dtypes(half)["shift"] == FLOAT


def test_embedding_table_is_half(text: ModelProto) -> None:
    assert dtypes(to_half(text))["embedding.weight"] == HALF


def test_layer_normalization_of_large_activations() -> None:
    nodes = [
        make_node("MatMul", ["x", "w"], ["h"], "linear"),
        make_node("LayerNormalization", ["h", "scale", "bias"], ["n"], "norm"),
        make_node("MatMul", ["n", "v"], ["y"], "last"),
    ]
    constants = {"w": weight(4, 4), "scale": weight(4), "bias": weight(4), "v": weight(4, 4)}
    model = made(nodes, constants)
    x = 2000 * weight(3, 4)  # 2000 * 2000 is beyond half
    np.testing.assert_allclose(run(to_half(model), x, exact=True), run(model, x), atol=0.02)


def test_a_constant_of_both_types_is_there_twice() -> None:
    nodes = [
        make_node("MatMul", ["x", "w"], ["h"], "linear"),
        make_node("Add", ["h", "shared"], ["b"], "bias"),
        make_node("LayerNormalization", ["b", "scale", "shared"], ["n"], "norm"),
        make_node("MatMul", ["n", "w"], ["y"], "last"),
    ]
    model = made(nodes, {"w": weight(4, 4), "shared": weight(4), "scale": weight(4)})
    half = to_half(model)
    assert dtypes(half) == {
        "w": FLOAT, "w.half": HALF, "shared": FLOAT, "shared.half": HALF, "scale": FLOAT
    }  # fmt: skip
    check_casts(half, most=2)
    x = weight(3, 4)
    np.testing.assert_allclose(run(half, x, exact=True), run(model, x), atol=0.02)


@pytest.mark.parametrize(
    ("constant", "kind"),
    [
        (0.5, HALF),
        ([65504.0, 1.0], HALF),
        ([1.0, 1e-9], HALF),  # what is lost does not show
        ([0.0, 0.0], HALF),
        (65536.0, FLOAT),
        (-1e5, FLOAT),
        (1e-12, FLOAT),
        ([1e-8, 2e-8], FLOAT),
        (-np.inf, FLOAT),
    ],
)
def test_constants_beyond_half(constant: float | list[float], kind: int) -> None:
    nodes = [
        make_node("MatMul", ["x", "w"], ["h"], "linear"),
        make_node("Max", ["h", "c"], ["m"], "floor"),
        make_node("MatMul", ["m", "v"], ["y"], "last"),
    ]
    c = np.asarray(constant, dtype=np.float32)
    half = to_half(made(nodes, {"w": weight(4, 2), "c": c, "v": weight(2, 2)}))
    assert precisions(half)["floor"] == kind
    assert dtypes(half)["c"] == kind


def test_what_moves_numbers_takes_the_type_around_it() -> None:
    nodes = [
        make_node("MatMul", ["x", "w"], ["h"], "linear"),
        make_node("Transpose", ["h"], ["t"], "half 1"),
        make_node("Transpose", ["t"], ["u"], "half 2"),
        make_node("LayerNormalization", ["u", "scale"], ["n"], "norm"),
        make_node("Unsqueeze", ["n", "axes"], ["o"], "float 1"),
        make_node("Squeeze", ["o", "axes"], ["p"], "float 2"),
        make_node("LayerNormalization", ["p", "scale"], ["q"], "norm 2"),
        make_node("Identity", ["q"], ["r"], "float 3"),
        make_node("MatMul", ["r", "v"], ["y"], "last"),
    ]
    constants = {"w": weight(4, 4), "scale": weight(4), "axes": np.array([1]), "v": weight(4, 2)}
    half = to_half(made(nodes, constants))
    assert {n for n, kind in precisions(half).items() if kind == HALF} == {
        "linear", "half 1", "half 2"
    }  # fmt: skip
    check_casts(half, most=2)


def test_integers_are_cast_once_to_each_type() -> None:
    nodes = [
        make_node("Cast", ["x"], ["f"], "cast", to=FLOAT),
        make_node("MatMul", ["f", "w"], ["h"], "linear"),
        make_node("Mul", ["f", "scale"], ["g"], "scaled"),
        make_node("Add", ["h", "g"], ["a"], "sum"),
        make_node("MatMul", ["a", "w"], ["y"], "last"),
    ]
    constants = {"w": weight(4, 4), "scale": np.float32(0.5)}
    model = made(nodes, constants, (TensorProto.INT32, ("n", 4)))
    half = to_half(model)
    assert precisions(half) == {"linear": HALF, "scaled": FLOAT, "sum": HALF, "last": FLOAT}
    check_casts(half, most=4)
    x = np.arange(12, dtype=np.int32).reshape(3, 4)
    np.testing.assert_allclose(run(half, x, exact=True), run(model, x), rtol=0.01, atol=0.05)


def test_ports_that_are_float_alone() -> None:
    """Resize takes its scales as float only; a Constant node and a made tensor work too."""
    nodes = [
        make_node("Constant", [], ["b"], value=onnx.numpy_helper.from_array(weight(1, 2, 1, 1))),
        make_node("Conv", ["x", "w"], ["h"], "conv"),
        make_node("Add", ["h", "b"], ["a"], "bias"),
        make_node("Resize", ["a", "", "scales"], ["r"], "resize", mode="nearest"),
        make_node("Shape", ["r"], ["s"], "shape"),
        make_node("ConstantOfShape", ["s"], ["z"], "zeros"),
        make_node("Add", ["r", "z"], ["t"], "with zeros"),
        make_node("Conv", ["t", "v"], ["y"], "last"),
    ]
    scales = np.array([1, 1, 2, 2], dtype=np.float32)
    constants = {"w": weight(2, 1, 1, 1), "scales": scales, "v": weight(1, 2, 1, 1)}
    model = made(nodes, constants, (FLOAT, ("n", 1, 4, 4)))
    half = to_half(model)
    assert dtypes(half) == {"w": HALF, "b": HALF, "scales": FLOAT, "v": FLOAT}
    assert precisions(half)["resize"] == HALF
    x = weight(2, 1, 4, 4)
    np.testing.assert_allclose(run(half, x), run(model, x), atol=0.02)


def test_squares_before_a_mean() -> None:
    """A root mean square norm, written out: its squares and its epsilon stay in float."""
    nodes = [
        make_node("MatMul", ["x", "w"], ["h"], "linear"),
        make_node("Mul", ["h", "h"], ["s"], "square"),
        make_node("ReduceMean", ["s"], ["m"], "mean", axes=[-1]),
        make_node("Add", ["m", "epsilon"], ["e"], "safe"),
        make_node("Sqrt", ["e"], ["r"], "root"),
        make_node("Div", ["h", "r"], ["n"], "norm"),
        make_node("MatMul", ["n", "v"], ["y"], "last"),
    ]
    constants = {"w": weight(4, 4), "v": weight(4, 4), "epsilon": np.float32(1e-8)}
    model = made(nodes, constants)
    x = np.concatenate([2000 * weight(3, 4), np.zeros((1, 4), np.float32)])
    np.testing.assert_allclose(run(to_half(model), x, exact=True), run(model, x), atol=0.02)


def scaled(model: ModelProto, name: str, factor: float) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    values = onnx.numpy_helper.to_array(tensor) * np.float32(factor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))


@pytest.fixture
def planted(cnn: ModelProto) -> ModelProto:
    """The CNN with its first activations near 1e5 and the second convolution the smaller: the
    same function in float."""
    model = ModelProto()
    model.CopyFrom(cnn)
    first, second = [n for n in model.graph.node if n.op_type == "Conv"][:2]
    scaled(model, first.input[1], 3e4)
    scaled(model, second.input[1], 1 / 3e4)
    return model


def test_planted_overflow(cnn: ModelProto, planted: ModelProto, frames: Array) -> None:
    expected = run(cnn, frames)
    assert row_cosines(expected, run(planted, frames)).min() > 0.99999
    assert overflowing(cnn, [frames]) == {}
    found = overflowing(planted, [frames])
    kinds = {n.name: n.op_type for n in cnn.graph.node}
    assert [kinds[name] for name in found] == ["Conv", "Relu", "Conv"]
    assert all(65504 < peak < 2e5 for peak in found.values())
    assert not np.isfinite(run(to_half(planted), frames, exact=True)).all()
    half = to_half(planted, keep_float=found)
    assert {precisions(half)[name] for name in found} == {FLOAT}
    assert row_cosines(expected, run(half, frames, exact=True)).min() >= 0.9999
    check_casts(half, most=4)


def test_overflow_is_the_largest_of_all_batches(planted: ModelProto, frames: Array) -> None:
    whole = overflowing(planted, [frames])
    assert overflowing(planted, (frames[i : i + 8] for i in range(0, len(frames), 8))) == (
        pytest.approx(whole, rel=1e-5)
    )
    dark = overflowing(planted, [frames[:8] // 4])
    assert all(dark[name] < whole[name] for name in dark)
    assert overflowing(planted, [frames], margin=0.25) == {}


def test_overflow_counts_what_is_no_number() -> None:
    nodes = [
        make_node("Log", ["x"], ["l"], "log"),
        make_node("MatMul", ["l", "w"], ["y"], "last"),
    ]
    model = made(nodes, {"w": weight(4, 4)})
    found = overflowing(model, [np.full((2, 4), -1, dtype=np.float32)])
    assert list(found) == ["log", "last"]
    assert all(np.isnan(peak) for peak in found.values())


def test_overflow_in_text(text: ModelProto, tokenizer: Tokenizer) -> None:
    tokens = tokenizer(PROBES)
    assert overflowing(text, [tokens]) == {}
    kinds = {n.name: n.op_type for n in text.graph.node}
    masked = overflowing(text, [tokens], margin=10)  # the mask holds -1e4
    assert [kinds[name] for name in masked] == ["Add", "Softmax"]


def test_no_batch_and_a_wrong_one(cnn: ModelProto) -> None:
    with pytest.raises(DataError, match="give at least one batch"):
        overflowing(cnn, [])
    with pytest.raises(DataError, match="a batch does not go into the model: .*frames"):
        overflowing(cnn, [np.zeros((1, 16, 16, 3), dtype=np.uint8)])


def test_an_unknown_name(cnn: ModelProto) -> None:
    with pytest.raises(DataError, match="keep_float names 'stem', and the graph has no such node"):
        to_half(cnn, ["stem"])


def test_nodes_without_names() -> None:
    nodes = [make_node("MatMul", ["x", "w"], ["h"]), make_node("MatMul", ["h", "w"], ["y"])]
    half = to_half(made(nodes, {"w": weight(4, 4)}), keep_float=["h"])
    assert not casts(half)


def branching() -> ModelProto:
    body = onnx.helper.make_graph(
        [make_node("Identity", ["x"], ["b"])],
        "body",
        [],
        [onnx.helper.make_tensor_value_info("b", FLOAT, None)],
    )
    node = make_node("If", ["c"], ["y"], "branch", then_branch=body, else_branch=body)
    return made([node], {"c": np.array(True)})


def test_graphs_that_cannot_go_to_half(cnn: ModelProto) -> None:
    with pytest.raises(UnsupportedFormat, match="float16 already"):
        to_half(to_half(cnn))
    with pytest.raises(UnsupportedFormat, match="branch: If holds a graph of its own"):
        to_half(branching())
    fused = make_node("FusedMatMul", ["x", "x"], ["y"], "fused", domain="com.microsoft")
    with pytest.raises(UnsupportedFormat, match="fused: the operator FusedMatMul is not ONNX's"):
        to_half(made([fused], {}))
    with pytest.raises(UnsupportedFormat, match="does not hold together"):
        to_half(made([make_node("MatMul", ["x", "w"], ["y"])], {"w": weight(5, 4)}))


def test_onnx_runtime_opens_the_files(cnn: ModelProto, vit: ModelProto, tmp_path: Path) -> None:
    """In a process of its own: some releases have crashed on half files."""
    for name, model in {"cnn": cnn, "vit": vit}.items():
        onnx.save(to_half(model), tmp_path / name)
    code = (
        "import sys, onnxruntime\n"
        "for path in sys.argv[1:]:\n"
        "    onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])"
    )
    paths = [str(tmp_path / "cnn"), str(tmp_path / "vit")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True)
