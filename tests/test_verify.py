"""`verify` finds, by name, what is wrong with a bundle."""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import onnx
import pytest
from onnx import ModelProto

from export.verify import verify
from runtime.bundle import describe

Change = Callable[[ModelProto], None]


def change_model(folder: Path, name: str, change: Change) -> None:
    """Alters an encoder file, and the manifest with it: a fault that no hash shows."""
    path = folder / name
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = msgspec.to_builtins(describe(path))
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_sound_bundle(bundle: Path) -> None:
    assert verify(bundle) == []


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


def set_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 18
    for node in model.graph.node:
        if node.op_type == "ReduceMax":
            del node.attribute[:]
            node.input.append("axes")
            model.graph.initializer.append(onnx.helper.make_tensor("axes", 7, [1], [1]))


def rename_output(model: ModelProto) -> None:
    last = model.graph.node[-1]
    last.output[0] = model.graph.output[0].name = "features"


def drop_norm(model: ModelProto) -> None:
    last = model.graph.node[-1]
    last.op_type = "Mul"  # was the division by the norm


def break_graph(model: ModelProto) -> None:
    model.graph.node[0].input[0] = "nothing"


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("text.fp32.onnx", set_opset, "ReduceMax takes its axes as an input"),
        ("text.fp32.onnx", set_opset, "opset"),
        ("image.fp32.onnx", rename_output, "expected float32 embeddings"),
        ("image.fp32.onnx", drop_norm, "not unit rows"),
        ("image.fp32.onnx", break_graph, "not a valid ONNX file"),
    ],
)
def test_faults_in_a_graph(bundle_copy: Path, name: str, change: Change, fault: str) -> None:
    change_model(bundle_copy, name, change)
    faults = verify(bundle_copy)
    assert any(fault in line and line.startswith(name) for line in faults), faults
