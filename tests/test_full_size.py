"""Whole runs at full size: real models, real photos and captions, and the demo's promise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_export import write_tokenizer

from export.bundle import ExportOptions, export_bundle
from export.verify import verify

pytestmark = pytest.mark.slow


def edgeclip(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "edgeclip"), *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run


MODELS = ["ViT-B-32-quickgelu", "ViT-B-16", "RN50", "MobileCLIP-S1", "ViT-B-16-SigLIP"]


@pytest.mark.parametrize("model", MODELS)
def test_open_clip_models_export(model: str, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer") if "SigLIP" in model else None
    options = ExportOptions(checkpoint=model, bundle=tmp_path / "bundle", tokenizer=tokenizer)
    made = export_bundle(options, quiet=True)
    rows = json.loads((tmp_path / "bundle/report/report.json").read_text())["parity"]
    assert {row["batch"] for row in rows} == {1, 3, 8}
    assert min(row["cosine_min"] for row in rows) >= 0.99999
    bias = -10.0 if "SigLIP" in model else 0.0  # as open_clip's configs initialise them
    assert (made.head.logit_scale, made.head.logit_bias) == pytest.approx((1 / 0.07, bias))
    assert made.head.activation == ("sigmoid" if "SigLIP" in model else "softmax")
    assert verify(tmp_path / "bundle") == []


PRESETS = ["mobilenetv2", "mobilenetv2_050", "mobilenetv4", "repvit", "fastvit", "resnet18"]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_train_and_export(preset: str, squares: Path, tmp_path: Path) -> None:
    out, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    edgeclip("train", squares, out, "--model", preset, "--epochs", 1, "--batch-size", 24,
             "--workers", 0)  # fmt: skip
    edgeclip("export", out, bundle, "--labels", "red,green")
    assert verify(bundle) == []


def test_from_class_folders_to_photos_and_clips(data: Path, tmp_path: Path) -> None:
    out, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    run = edgeclip("train", data / "cifar10/train", out, "--val", data / "cifar10/test",
                   "--model", "nano", "--epochs", 6, "--lr", 0.002, "--json")  # fmt: skip
    record = json.loads(run.stdout)
    (source,) = record["data"]
    assert source["images"] == 5000 and len(source["classes"]) == 10
    assert record["epochs"][-1]["top1"] >= 0.25  # one in ten by chance
    edgeclip("export", out, bundle, "--labels", ",".join(source["classes"]))
    run = edgeclip("classify", bundle, data / "photos/images", "--json")
    assert len(run.stdout.splitlines()) == 300
    run = edgeclip("classify", bundle, data / "video", "--every", 20, "--json")
    names = [json.loads(line)["file"] for line in run.stdout.splitlines()]
    assert sum("car-detection" in name for name in names) == 19  # of 377 frames
    assert sum("cockatoo" in name for name in names) == 14  # of 280


def test_from_captions_to_photos(data: Path, tmp_path: Path) -> None:
    out, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    captions = data / "captions"
    run = edgeclip("train", captions / "captions.csv", out, "--val",
                   captions / "captions_val.csv", "--model", "nano", "--epochs", 3,
                   "--lr", 0.002, "--json")  # fmt: skip
    record = json.loads(run.stdout)
    assert record["data"][0]["images"] == 6000 and record["val"]["images"] == 500
    assert record["epochs"][-1]["text_to_image_r10"] >= 0.04  # 0.02 by chance
    edgeclip("export", out, bundle)
    run = edgeclip("classify", bundle, data / "photos/images", "--json", "--labels",
                   "a dog,a bird,a car")  # fmt: skip
    assert len(run.stdout.splitlines()) == 300


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_keeps_its_promise(seed: int, tmp_path: Path) -> None:
    run = edgeclip("demo", "--out", tmp_path / "demo", "--seed", seed, "--json")
    figures = json.loads(run.stdout)
    assert figures["top1_seen"] >= 0.97
    assert figures["top1_unseen"] >= 0.85
    assert figures["parity_cosine_min"] >= 0.99999
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 100_000
