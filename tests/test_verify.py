"""`verify` finds, by name, what is wrong with a bundle."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto
from onnx.external_data_helper import set_external_data

from calibration.half import int8_in_half, to_half
from calibration.layers import find_layers
from calibration.quantize import quantize, without_unused
from calibration.ranges import Range
from export.lint import lint
from export.to_onnx import write_onnx
from export.towers import ImageEncoder
from export.verify import verify
from runtime import manifest
from runtime.bank_file import load_bank, save_bank
from runtime.bundle import Bundle, describe
from runtime.unknown import Fitted
from training.model import create

Change = Callable[[ModelProto], None]
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
TEXT, FP32, FP16, INT8, INT8_FP16 = (
    "text.fp32.onnx", "image.fp32.onnx", "image.fp16.onnx", "image.int8.onnx",
    "image.int8_fp16.onnx",
)  # fmt: skip


@pytest.fixture
def bundle_copy(every_precision: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(every_precision, tmp_path / "bundle"))


def relist(folder: Path, name: str) -> None:
    """Puts the present size and hash of a file into the manifest."""
    change_manifest(folder, "files", **{name: msgspec.to_builtins(describe(folder / name))})


def refit(folder: Path, *precisions: str) -> None:
    """Has the prompt bank say that it was fitted to these precisions."""
    bundle = Bundle(folder)
    made, name = bundle.manifest, "prompts/default.safetensors"
    encoder = made.files[made.text_encoder].sha256
    bank = load_bank(folder / name, encoder, made.model.embedding_dim)
    assert set(bank.fitted) == {"fp32", "fp16", "int8", "int8_fp16"}
    fitted = {precision: Fitted(head=made.head, threshold=0.5) for precision in precisions}
    save_bank(dataclasses.replace(bank, fitted=fitted), folder / name)
    relist(folder, name)


def change_manifest(folder: Path, *where: str, **values: Any) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    place = content
    for key in where:
        place = place[key]
    place.update(values)
    path.write_text(json.dumps(content))


def change_model(folder: Path, name: str, change: Change) -> None:
    """Alters an encoder file, and the manifest with it: a fault that no hash shows."""
    path = folder / name
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    relist(folder, name)


def test_a_sound_bundle(every_precision: Path) -> None:
    assert list(Bundle(every_precision).manifest.precisions) == [
        "fp32",
        "fp16",
        "int8",
        "int8_fp16",
    ]
    assert verify(every_precision) == []


def test_a_sound_bundle_of_fp32_alone(bundle_copy: Path) -> None:
    made, _ = manifest.read(bundle_copy)
    others = (FP16, INT8, INT8_FP16)
    files = {name: entry for name, entry in made.files.items() if name not in others}
    only = {"fp32": made.precisions["fp32"]}
    manifest.write(bundle_copy, msgspec.structs.replace(made, precisions=only, files=files))
    for name in others:
        (bundle_copy / name).unlink()
    refit(bundle_copy, "fp32")
    assert verify(bundle_copy) == []


@pytest.mark.parametrize("preset", ["nano", "mobilenetv2"])
def test_sound_encoders_of_presets(preset: str, tmp_path: Path) -> None:
    """In each precision: pooling, and convolutions that are grouped or strided."""
    clip = create(preset)
    frames = torch.zeros(2, clip.image.height, clip.image.width, 3, dtype=torch.uint8)
    write_onnx(ImageEncoder(clip), frames, "frames", tmp_path / FP32)
    model = onnx.load(tmp_path / FP32)
    assert list(lint(model, "fp32")) == []
    assert list(lint(to_half(model), "fp16")) == []
    layers = find_layers(model)
    ranges = {layer.input: Range(1.0, "minmax", 0.0) for layer in layers}
    kept = [layers[1].name]
    assert list(lint(quantize(model, layers, ranges, kept), "int8", kept)) == []


def test_int8_fp16_is_of_a_later_opset_with_half_scales(every_precision: Path) -> None:
    faults = list(lint(onnx.load(every_precision / INT8), "int8_fp16"))
    assert "opset {'ai.onnx': 17}, expected 19 or later of the default domain" in faults
    assert "MatMul_4: MatMul has float32 weights, expected float16" in faults


def test_int8_fp16_may_keep_layers_in_float(every_precision: Path) -> None:
    """What overflows stays in float32 with its scales, or is not quantised; either is listed."""
    model = onnx.load(every_precision / INT8)
    assert list(lint(int8_in_half(model, ["MatMul_4"]), "int8_fp16", ["MatMul_4"])) == []
    unlisted = list(lint(int8_in_half(model, ["MatMul_4"]), "int8_fp16"))
    assert unlisted == ["MatMul_4: MatMul has float32 weights, expected float16"]
    listed = list(lint(int8_in_half(model), "int8_fp16", ["MatMul_4"]))
    assert listed == ["MatMul_4 is listed in float_layers, and is no float layer of the graph"]


def test_hashes_and_strangers(bundle_copy: Path) -> None:
    (bundle_copy / "text.fp32.onnx").write_bytes(b"x")
    (bundle_copy / "stranger.bin").write_bytes(b"x")
    (bundle_copy / "engines").mkdir()
    (bundle_copy / "engines" / "this.plan").write_bytes(b"a cache of this device")
    faults = verify(bundle_copy)
    assert len(faults) == 2
    assert "text.fp32.onnx has 1 bytes" in faults[0]
    assert faults[1] == "stranger.bin is not listed in the manifest"


def test_an_encoder_that_is_another_file(bundle_copy: Path) -> None:
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    manifest["precisions"]["fp32"]["image"] = "text.fp32.onnx"
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    assert any("the manifest asks for [('frames'" in fault for fault in verify(bundle_copy))


def find(model: ModelProto, name: str) -> NodeProto:
    nodes: list[NodeProto] = [node for node in model.graph.node if node.name == name]
    return nodes[0]


def of_type(model: ModelProto, operator: str) -> NodeProto:
    nodes: list[NodeProto] = [node for node in model.graph.node if node.op_type == operator]
    return nodes[0]


def set_constant(model: ModelProto, name: str, values: NDArray[Any]) -> str:
    """Changes a constant of the model, or adds one; returns its name."""
    kept = [t for t in model.graph.initializer if t.name != name]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, onnx.numpy_helper.from_array(values, name)])
    return name


def constant(model: ModelProto, name: str) -> NDArray[Any]:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    return onnx.numpy_helper.to_array(tensor)


def before(model: ModelProto, node: NodeProto, position: int, *operators: NodeProto) -> None:
    """Puts nodes of one output each between a node and what it takes."""
    place = list(model.graph.node).index(node)
    for operator in operators:
        operator.input.insert(0, node.input[position])
        operator.name = f"{operator.op_type}.planted.{place}.{position}"
        operator.output[:] = [operator.name]
        node.input[position] = operator.name
        model.graph.node.insert(place, operator)
        place += 1


def casts(*kinds: int) -> list[NodeProto]:
    return [onnx.helper.make_node("Cast", [], [""], to=kind) for kind in kinds]


def in_type(model: ModelProto, node: NodeProto, kind: int, around: int) -> None:
    """Has a node compute in `kind`, where all around it is of the type `around`."""
    dtype = np.float16 if kind == HALF else np.float32
    names = {t.name for t in model.graph.initializer}
    for position, name in enumerate(node.input):
        if name in names:
            values = constant(model, name).astype(dtype)
            node.input[position] = set_constant(model, f"{name}.planted", values)
        else:
            before(model, node, position, *casts(kind))
    name, node.output[0] = node.output[0], f"{node.output[0]}.planted"
    back = onnx.helper.make_node("Cast", [node.output[0]], [name], "back", to=around)
    model.graph.node.insert(list(model.graph.node).index(node) + 1, back)
    without_unused(model)


def quantised(name: str, *positions: int) -> Change:
    """Plants a Q/DQ pair before inputs of a node."""

    def change(model: ModelProto) -> None:
        scale = set_constant(model, "planted.scale", np.array(0.1, np.float32))
        for position in positions:
            pair = [
                onnx.helper.make_node(operator, [scale, "int8.zero"], [""])
                for operator in ("QuantizeLinear", "DequantizeLinear")
            ]
            before(model, find(model, name), position, *pair)

    return change


def renamed(operator: str, new: str, domain: str = "") -> Change:
    def change(model: ModelProto) -> None:
        node = of_type(model, operator)
        node.op_type, node.domain = new, domain
        if domain:
            model.opset_import.append(onnx.helper.make_opsetid(domain, 1))

    return change


def constant_is(name: str, value: Any) -> Change:
    """Overwrites a constant: with a scalar in its own shape and type, or with an array."""

    def change(model: ModelProto) -> None:
        is_array = isinstance(value, np.ndarray)
        set_constant(model, name, value if is_array else np.full_like(constant(model, name), value))

    return change


def set_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 18
    for node in model.graph.node:
        if node.op_type == "Split":
            node.attribute.append(onnx.helper.make_attribute("num_outputs", len(node.output)))
        if node.op_type == "ReduceMax":
            del node.attribute[:]
            node.input.append("axes")
            model.graph.initializer.append(onnx.helper.make_tensor("axes", 7, [1], [1]))


def set_ir(model: ModelProto) -> None:
    model.ir_version = 10


def reduce_all(model: ModelProto) -> None:
    del of_type(model, "ReduceMax").attribute[:]


def rename_output(model: ModelProto) -> None:
    last = model.graph.node[-1]
    last.output[0] = model.graph.output[0].name = "features"


def drop_norm(model: ModelProto) -> None:
    last = model.graph.node[-1]
    last.op_type = "Mul"  # was the division by the norm


def break_graph(model: ModelProto) -> None:
    model.graph.node[0].input[0] = "nothing"


def float_frames(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = FLOAT


def long_tokens(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64


def static_batch(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def move_weights_out(model: ModelProto) -> None:
    tensor = max(model.graph.initializer, key=lambda t: t.ByteSize())
    set_external_data(tensor, "weights.bin")
    tensor.ClearField("raw_data")


def leave_a_copy(model: ModelProto) -> None:
    set_constant(model, "old.weight", np.ones((8, 8), np.float32))


def half_activation(model: ModelProto) -> None:
    before(model, of_type(model, "Sigmoid"), 0, *casts(HALF, FLOAT))


def set_attribute(model: ModelProto, name: str, value: float) -> None:
    node = of_type(model, "LayerNormalization")
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])


def infinite_attribute(model: ModelProto) -> None:
    set_attribute(model, "epsilon", float("inf"))


def half_output(model: ModelProto) -> None:
    name = model.graph.output[0].name
    model.graph.node[-1].output[0] = "in_float"
    model.graph.node.append(onnx.helper.make_node("Cast", ["in_float"], [name], "last", to=HALF))
    model.graph.output[0].type.tensor_type.elem_type = HALF


def half_norm(model: ModelProto) -> None:
    in_type(model, of_type(model, "LayerNormalization"), HALF, FLOAT)


def half_length(model: ModelProto) -> None:
    in_type(model, find(model, "Div_0"), HALF, FLOAT)


def half_sum(model: ModelProto) -> None:
    before(model, of_type(model, "ReduceSum"), 0, *casts(HALF))
    before(model, of_type(model, "Sqrt"), 0, *casts(FLOAT))


def half_statistics(model: ModelProto) -> None:
    set_attribute(model, "stash_type", HALF)


def float_weights(model: ModelProto) -> None:
    in_type(model, find(model, "MatMul_4"), FLOAT, HALF)


def one_weight_scale(model: ModelProto) -> None:
    node = find(model, "MatMul_4.weight.float.node")
    set_constant(model, node.input[1], np.array(0.1, np.float32))
    set_constant(model, node.input[2], np.array(0, np.int8))
    del node.attribute[:]


def wrong_axis(model: ModelProto) -> None:
    find(model, "MatMul_3.weight.float.node").attribute[0].i = 0  # a square weight


def asymmetric_weight(model: ModelProto) -> None:
    node = find(model, "MatMul_3.weight.float.node")
    set_constant(model, node.input[2], np.full_like(constant(model, node.input[2]), 4))


def no_zero_point(model: ModelProto) -> None:
    """It is uint8 then."""
    set_constant(model, "planted.zero", np.array(0, np.uint8))
    find(model, "add_15.int8.node").input.pop()
    find(model, "add_15.float.node").input[2] = "planted.zero"


def float_copy(model: ModelProto) -> None:
    """The other common form: float weights, and a Q/DQ pair in the graph."""
    node = find(model, "MatMul_3.weight.float.node")
    weight = constant(model, node.input[0]).astype(np.float32)
    node.input[0] = set_constant(model, "planted.weight", weight)
    pair = onnx.helper.make_node("QuantizeLinear", node.input[1:], [""], axis=1)
    before(model, node, 0, pair)
    without_unused(model)


def drop_pairs(*positions: int) -> Change:
    """Takes the Q/DQ from these inputs of a Linear."""

    def change(model: ModelProto) -> None:
        node, weight = find(model, "MatMul_3"), np.ones((48, 48), np.float32)
        for position in positions:
            source = set_constant(model, "planted.weight", weight) if position else "_unsafe_view"
            node.input[position] = source
        without_unused(model)

    return change


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        (TEXT, set_opset, "ReduceMax_0: ReduceMax takes its axes as an input"),
        (TEXT, set_opset, "opset .*18.*, expected 17"),
        (TEXT, set_ir, "IR version 10"),
        (TEXT, reduce_all, "ReduceMax_0: ReduceMax names no axes"),
        (TEXT, constant_is("mask", -np.inf), "Add_2 .mask. holds infinity"),
        (TEXT, infinite_attribute, "LayerNormalization_0: its attribute epsilon holds infinity"),
        (TEXT, long_tokens, r"inputs int64 tokens \[batch, 12\], expected int32 tokens"),
        (TEXT, renamed("Sigmoid", "Softsign"), "Sigmoid_0: Softsign is not an operator"),
        (TEXT, move_weights_out, "embedding.weight: its values lie in another file"),
        (FP32, renamed("Sigmoid", "QuickGelu", "com.microsoft"), "custom domain com.microsoft"),
        (FP32, rename_output, "features .*, expected float32 embeddings"),
        (FP32, drop_norm, "not unit rows"),
        (FP32, break_graph, "not a valid ONNX file"),
        (FP32, float_frames, r"inputs float32 frames \[batch, 32, 32, 3\], expected uint8"),
        (FP32, static_batch, r"inputs uint8 frames \[1, 32, 32, 3\], expected"),
        (FP32, leave_a_copy, "old.weight: no node takes this constant"),
        (FP32, half_activation, "Cast.planted.* is float16: fp32 files hold none"),
        (FP16, half_output, "outputs float16 embeddings"),
        (FP16, half_norm, "LayerNormalization_0: LayerNormalization computes in float16"),
        (FP16, half_statistics, "LayerNormalization_0: LayerNormalization with a stash_type"),
        (FP16, half_length, "Div_0: Div after the last layer is float16"),
        (FP16, half_sum, "ReduceSum_0: ReduceSum computes in float16"),
        (FP16, float_weights, "MatMul_4: MatMul has float32 weights"),
        (INT8, quantised("Add_4", 0), "Q/DQ feeds Add_4, .* no Linear .*: Add"),
        (INT8, quantised("LayerNormalization_2", 0), "Q/DQ feeds LayerNormalization_2.*LayerNorm"),
        (INT8, quantised("MatMul_1", 0), "MatMul_1: MatMul takes its second input unq"),
        (INT8, quantised("MatMul_1", 0, 1), "activation feeds input 1 of MatMul_1: MatMul"),
        (INT8, constant_is("int8.zero", 3), "add_15.int8.node: it is not symmetric.* 3 of int8"),
        (INT8, constant_is("int8.zero", np.array(0, np.uint8)), "add_15.* is 0 of uint8"),
        (INT8, no_zero_point, "add_15.int8.node: it is not symmetric.* is missing"),
        (INT8, asymmetric_weight, "MatMul_3.weight.float.node: it is not sym.* 4 of int8"),
        (INT8, one_weight_scale, "MatMul_4: 1 weight scales, expected .* 192 outputs"),
        (INT8, wrong_axis, "MatMul_3: its weight scales run along the wrong axis"),
        (INT8, constant_is("add_15.scale", np.inf), "add_15.int8.node: .* positive and finite"),
        (INT8, float_copy, "QuantizeLinear.planted.*: it quantises the float constant planted.w"),
        (INT8, drop_pairs(1), "MatMul_3: MatMul takes its second input unquantised"),
        (INT8, drop_pairs(0, 1), "MatMul_3 is not quantised, and the manifest does not"),
    ],
)  # fmt: skip
def test_faults_in_a_graph(bundle_copy: Path, name: str, change: Change, fault: str) -> None:
    change_model(bundle_copy, name, change)
    faults = verify(bundle_copy)
    assert any(re.search(fault, line) and line.startswith(name) for line in faults), faults
    others = tuple({TEXT, FP32, FP16, INT8} - {name})
    assert not any(line.startswith(others) for line in faults), faults


def alter_weights(folder: Path) -> None:
    content = bytearray((folder / FP16).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / FP16).write_bytes(content)


def lead_an_encoder_out(folder: Path) -> None:
    outside = folder.parent / "x"
    shutil.move(folder / FP16, outside)
    change_manifest(folder, "files", **{"../x": msgspec.to_builtins(describe(outside))})
    change_manifest(folder, "precisions", "fp16", image="../x")


def drop_a_picture(folder: Path) -> None:
    (folder / "report" / "drift.png").unlink()


def drop_the_report(folder: Path) -> None:
    made, _ = manifest.read(folder)
    (folder / "report" / "report.json").unlink()
    files = {name: entry for name, entry in made.files.items() if name != "report/report.json"}
    manifest.write(folder, msgspec.structs.replace(made, files=files))


def break_the_report(folder: Path) -> None:
    (folder / "report" / "report.json").write_text("[]")
    relist(folder, "report/report.json")


def accept_a_rejected_one(folder: Path) -> None:
    path = folder / "report" / "report.json"
    report = json.loads(path.read_text())
    report["precisions"][2]["status"] = "rejected"
    path.write_text(json.dumps(report))
    relist(folder, "report/report.json")


def another_precision(folder: Path) -> None:
    entry = {"image": FP32, "status": "accepted", "figures": {}}
    change_manifest(folder, "precisions", int4=entry)


def float_as_int8(folder: Path) -> None:
    change_manifest(folder, "precisions", "int8", image=FP32)


def list_a_float_layer(name: str, precision: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        change_manifest(folder, "precisions", precision, float_layers=[name])

    return change


def fit_to_another(folder: Path) -> None:
    refit(folder, "fp32", "int4")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (alter_weights, "image.fp16.onnx was changed since the export"),
        (lead_an_encoder_out, "'../x', which leads out of the bundle"),
        (drop_a_picture, "drift.png is missing"),
        (drop_the_report, "report/report.json is missing"),
        (break_the_report, "report/report.json is not a report"),
        (accept_a_rejected_one, "int8 is marked as accepted in the manifest, as rejected in"),
        (another_precision, "the precision 'int4' is none of fp32, fp16"),
        (float_as_int8, "image.fp32.onnx: it has no quantised layer"),
        (list_a_float_layer("MatMul_3", "int8"), "MatMul_3 is listed in float_layers"),
        (list_a_float_layer("no.such.layer", "fp16"), "no.such.layer is listed in float_layers"),
        (list_a_float_layer("MatMul_3", "fp16"), "MatMul_3: MatMul is float16, and"),
        (fit_to_another, "default.safetensors is fitted to int4"),
    ],
)
def test_faults_in_a_bundle(bundle_copy: Path, change: Callable[[Path], None], fault: str) -> None:
    change(bundle_copy)
    faults = verify(bundle_copy)
    assert any(fault in line for line in faults), faults
