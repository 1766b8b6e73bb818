"""A bundle that was damaged, altered or made by somebody else: one clear error each."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import runtime
from runtime import manifest
from runtime.bundle import Bundle, describe
from runtime.errors import (
    BackendUnavailable,
    BundleError,
    ChecksumMismatch,
    DataError,
    MissingFile,
    UnsupportedFormat,
)
from runtime.folders import new_folder

Change = Callable[[dict[str, Any]], None]


def change_manifest(folder: Path, change: Change) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="no bundle folder"):
        runtime.load(tmp_path / "nowhere")


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"no manifest\.json.*edgeclip export"):
        runtime.load(tmp_path)


@pytest.mark.parametrize("name", ["image.fp32.onnx", "prompts/default.safetensors"])
def test_missing_file(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).unlink()
    with pytest.raises(MissingFile, match=name):
        runtime.load(bundle_copy)


def test_truncated_file(bundle_copy: Path) -> None:
    path = bundle_copy / "image.fp32.onnx"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ChecksumMismatch, match="cut off"):
        runtime.load(bundle_copy)


@pytest.mark.parametrize("name", ["image.fp32.onnx", "text.fp32.onnx", "tokenizer.json"])
def test_altered_file(bundle_copy: Path, name: str) -> None:
    path = bundle_copy / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ChecksumMismatch, match=f"{name} was changed"):
        runtime.load(bundle_copy, labels=["red"])


def rename_image(name: str) -> Change:
    def change(content: dict[str, Any]) -> None:
        content["precisions"]["fp32"]["image"] = name
        content["files"][name] = content["files"]["image.fp32.onnx"]

    return change


@pytest.mark.parametrize("name", ["../other.onnx", "/etc/hostname", "a/../../b", "x\0y"])
def test_path_out_of_the_bundle(bundle_copy: Path, name: str) -> None:
    (bundle_copy.parent / "other.onnx").write_bytes((bundle_copy / "image.fp32.onnx").read_bytes())
    change_manifest(bundle_copy, rename_image(name))
    with pytest.raises(UnsupportedFormat, match="leads out of the bundle|no file name"):
        runtime.load(bundle_copy)


def test_link_out_of_the_bundle(bundle_copy: Path) -> None:
    outside = bundle_copy.parent / "outside.onnx"
    (bundle_copy / "image.fp32.onnx").rename(outside)
    (bundle_copy / "image.fp32.onnx").symlink_to(outside)
    with pytest.raises(UnsupportedFormat, match="leads out"):
        runtime.load(bundle_copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(format="2.0"),
        lambda m: m.pop("format"),
        lambda m: m.pop("image"),
        lambda m: m["image"].update(height="many"),
        lambda m: m["image"].update(height=0),
        lambda m: m["image"].update(fit="stretch"),
        lambda m: m["head"].update(logit_scale=-1),
        lambda m: m.update(precisions={}),
        lambda m: m["precisions"]["fp32"].update(status="perhaps"),
        lambda m: m["files"]["image.fp32.onnx"].update(sha256="abc"),
        lambda m: m["precisions"]["fp32"].update(image="unlisted.onnx"),
        lambda m: m["files"].pop("text.fp32.onnx"),
        lambda m: m["text"].update(templates=["no place for the label"]),
        lambda m: m["image"].update(height=64),
        lambda m: m["model"].update(embedding_dim=64),
        lambda m: m["precisions"]["fp32"].update(image="text.fp32.onnx"),
    ],
)
def test_malformed_manifest(bundle_copy: Path, change: Change) -> None:
    change_manifest(bundle_copy, change)
    with pytest.raises(UnsupportedFormat, match="manifest"):
        runtime.load(bundle_copy, precision="fp32")


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_manifest_that_is_no_json_object(bundle_copy: Path, content: bytes) -> None:
    (bundle_copy / "manifest.json").write_bytes(content)
    with pytest.raises(UnsupportedFormat, match="manifest"):
        runtime.load(bundle_copy)


def test_rejected_precision_is_not_picked(bundle_copy: Path) -> None:
    def reject(fields: dict[str, Any]) -> None:
        for precision in fields["precisions"].values():
            precision["status"] = "rejected"

    change_manifest(bundle_copy, reject)
    with pytest.raises(BundleError, match="no accepted precision"):
        runtime.load(bundle_copy)
    assert runtime.load(bundle_copy, precision="fp32").precision == "fp32"


def test_prompt_bank_of_another_encoder(bundle_copy: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = bundle_copy / "prompts/default.safetensors"
    metadata = {"labels": '["red", "green", "blue"]', "templates": '["{}"]', "text_encoder": "0"}
    save_file(load_file(path), path, metadata=metadata)
    entry = msgspec.to_builtins(describe(path))
    change_manifest(
        bundle_copy, lambda m: m["files"].update({"prompts/default.safetensors": entry})
    )
    with pytest.raises(BundleError, match="another text encoder"):
        runtime.load(bundle_copy)


def test_a_link_in_a_bundle_is_not_written_through(bundle_copy: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (bundle_copy / ".manifest.json.new").symlink_to(mine)
    made, raw = manifest.read(bundle_copy)
    manifest.write(bundle_copy, made, raw)
    assert mine.read_text() == "mine" and manifest.read(bundle_copy)[0] == made


def test_unknown_fields_are_kept(bundle_copy: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["format"] = "1.7"
        content["made_for"] = {"board": "some board"}
        content["image"]["gamma"] = 2.2
        content["precisions"]["fp32"]["note"] = "kept"

    change_manifest(bundle_copy, change)
    bundle = Bundle(bundle_copy)
    made = msgspec.structs.replace(bundle.manifest, prompts={})
    manifest.write(bundle_copy, made, bundle.raw)
    content = json.loads((bundle_copy / "manifest.json").read_text())
    assert content["made_for"] == {"board": "some board"}
    assert content["image"]["gamma"] == 2.2
    assert content["precisions"]["fp32"]["note"] == "kept"
    assert content["prompts"] == {}
    assert Bundle(bundle_copy).manifest == msgspec.structs.replace(made, format="1.7")


def test_two_at_once_into_one_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="exists already|meanwhile"):
        with new_folder(tmp_path / "out", "manifest.json") as second:
            (second / "mine").write_text("second")
            with new_folder(tmp_path / "out", "manifest.json") as first:
                (first / "mine").write_text("first")
    assert (tmp_path / "out" / "mine").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_link_to_the_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "manifest.json").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_folder(tmp_path / "link", "manifest.json", overwrite=True) as folder:
        (folder / "manifest.json").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "manifest.json").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_the_working_folder_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="name a folder inside it"):
        with new_folder(".", "manifest.json"):
            pass


def test_files_can_be_read_by_others(bundle: Path) -> None:
    assert all(path.stat().st_mode & 0o044 for path in (bundle, *bundle.rglob("*")))


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no space left"):
        with new_folder(tmp_path / "out", "manifest.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_no_backend(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.on_cpu.find_spec", lambda _: None)
    with pytest.raises(BackendUnavailable, match=r"edgeclip\[cpu\]"):
        runtime.load(bundle)
