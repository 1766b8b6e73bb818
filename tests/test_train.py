"""Training makes a checkpoint that open_clip loads, and says what it reached."""

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_squares
from PIL import Image

from runtime.errors import DataError
from training.batches import Batch
from training.model import create
from training.module import ClipTraining, learning_rate, parameter_groups
from training.options import TrainOptions
from training.trainer import train

# isort: split
import open_clip


def options(data: Path, out: Path, **changes: Any) -> TrainOptions:
    base = dict(data=data, out=out, model=str(Path(__file__).parent / "tiny.json"), epochs=1)
    return TrainOptions(**{**base, "batch_size": 16, **changes})


def test_checkpoint_loads_in_plain_open_clip(checkpoint: Path) -> None:
    model = open_clip.create_model(f"local-dir:{checkpoint}").eval()
    ours = create(str(checkpoint))
    frames = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.encode_image(frames), ours.model.encode_image(frames))
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{checkpoint}")
    assert preprocess(Image.new("RGB", (50, 40))).shape == (3, 32, 32)


def test_the_record_says_what_was_done_and_reached(checkpoint: Path, squares: Path) -> None:
    record = json.loads((checkpoint / "training.json").read_text())
    assert record["options"]["data"] == str(squares)
    assert record["options"]["lr"] == 3e-3 and record["options"]["seed"] == 0
    assert record["data"]["images"] == 72 and len(record["data"]["fingerprint"]) == 64
    assert record["versions"]["torch"] == torch.__version__
    assert [e["epoch"] for e in record["epochs"]] == list(range(1, 13))
    last = record["epochs"][-1]
    assert last["top1"] >= 0.9 and last["top5"] == 1.0
    assert last["loss"] < record["epochs"][0]["loss"]


def test_captions_give_retrieval_figures(tmp_path: Path) -> None:
    write_squares(tmp_path / "pictures", each=8, seed=2)
    rows = [
        f"pictures/{color}/{n}.png,{caption}"
        for color in ("red", "green", "blue")
        for n in range(8)
        for caption in (f"a {color} square", f"something {color}")
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(["file,caption", *rows]))
    path = tmp_path / "pairs.csv"
    record = train(options(path, tmp_path / "out", val=path, epochs=2), quiet=True)
    assert {f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)} <= set(
        record["epochs"][-1]
    )
    assert record["epochs"][-1]["image_to_text_r10"] == 1.0  # there are but six captions


def test_the_same_seed_gives_the_same_weights(squares: Path, tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(options(squares, tmp_path / name, seed=seed), quiet=True)
        weights.append((tmp_path / name / "open_clip_model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_fine_tuning_starts_from_the_checkpoint(
    checkpoint: Path, squares: Path, tmp_path: Path
) -> None:
    changed = options(squares, tmp_path / "tuned", val=squares, model=str(checkpoint), lr=1e-5,
                      templates=("a {} square", "{}"))  # fmt: skip
    record = train(changed, quiet=True)
    assert record["start"] == "checkpoint"
    assert record["epochs"][0]["top1"] >= 0.9


def test_bf16(squares: Path, tmp_path: Path) -> None:
    record = train(options(squares, tmp_path / "out", precision="bf16"), quiet=True)
    assert math.isfinite(record["epochs"][0]["loss"])


def test_bad_pictures_are_skipped_counted_and_stop_when_strict(
    squares: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(squares, tmp_path / "data")
    (data / "red" / "bad.jpg").write_text("this is a text")
    record = train(options(data, tmp_path / "out"), quiet=True)
    assert record["data"]["skipped"] == {"unreadable picture": 1}
    assert record["data"]["images"] == 72
    with pytest.raises(DataError, match=r"bad\.jpg is not a picture.*--strict"):
        train(options(data, tmp_path / "strict", strict=True), quiet=True)
    assert {p.name for p in tmp_path.iterdir()} == {"data", "out"}


def test_nothing_is_overwritten(squares: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="exists already.*--force"):
        train(options(squares, out), quiet=True)
    with pytest.raises(DataError, match="holds something else"):
        train(options(squares, out, force=True), quiet=True)
    assert (out / "thesis.txt").read_text() == "years of work"


def test_force_replaces_a_checkpoint(checkpoint: Path, squares: Path, tmp_path: Path) -> None:
    out = shutil.copytree(checkpoint, tmp_path / "out")
    before = (out / "open_clip_model.safetensors").read_bytes()
    train(options(squares, out, force=True), quiet=True)
    assert (out / "open_clip_model.safetensors").read_bytes() != before
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_an_interrupted_run_keeps_the_last_epoch(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, handler = ClipTraining.training_step, signal.getsignal(signal.SIGINT)

    def interrupted(self: ClipTraining, batch: Batch, index: int) -> torch.Tensor:
        if self.current_epoch == 2:
            raise KeyboardInterrupt
        return step(self, batch, index)

    monkeypatch.setattr(ClipTraining, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(options(squares, tmp_path / "out", epochs=5), quiet=True)
    assert signal.getsignal(signal.SIGINT) is handler
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert len(json.loads((tmp_path / "out" / "training.json").read_text())["epochs"]) == 2
    create(str(tmp_path / "out"))


def test_an_exploding_loss_stops(squares: Path, tmp_path: Path) -> None:
    bad = options(squares, tmp_path / "out", lr=1e30, grad_clip=1e30, epochs=3, warmup=0.0)
    with pytest.raises(DataError, match="the loss became"):
        train(bad, quiet=True)
    assert not list(tmp_path.iterdir()) or not math.isnan(
        json.loads((tmp_path / "out" / "training.json").read_text())["epochs"][-1]["loss"]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--epochs must be greater than 0"),
        ({"lr": float("nan")}, "--lr"),
        ({"batch_size": 1}, "--batch-size must be at least 2"),
        ({"warmup": 2.0}, "--warmup"),
        ({"weight_decay": -1.0}, "--weight-decay"),
        ({"precision": "fp8"}, "--precision is fp32 or bf16 or fp16"),
        ({"seed": -1}, "--seed"),
        ({"templates": ("a photo",)}, "no {} where"),
    ],
)
def test_bad_options(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        options(tmp_path, tmp_path / "out", **changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp16_needs_a_gpu(squares: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fp16 needs a CUDA device"):
        train(options(squares, tmp_path / "out", precision="fp16"), quiet=True)


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-B-33", None, "did you mean ViT-B-32"),
        ("ViT-B-32", "opena", "no weights 'opena'; it has: openai"),
        ("no.json", None, "cannot be read"),
    ],
)
def test_unknown_models(model: str, pretrained: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        create(model, pretrained)


def test_damaged_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no open_clip_config\.json and no open_clip_model"):
        create(str(tmp_path / "empty"))
    cut = shutil.copytree(checkpoint, tmp_path / "cut")
    weights = cut / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DataError, match="does not load"):
        create(str(cut))
    bad = shutil.copytree(checkpoint, tmp_path / "bad")
    (bad / "open_clip_config.json").write_text('{"model_cfg": {}}')
    with pytest.raises(DataError, match="does not load"):
        create(str(bad))
    with pytest.raises(DataError, match="--pretrained does not go with it"):
        create(str(checkpoint), "openai")
    (tmp_path / "half.json").write_text('{"embed_dim": 3}')
    with pytest.raises(DataError, match="lacks vision_cfg, text_cfg"):
        create(str(tmp_path / "half.json"))


def test_schedule_and_decay(tiny_config: Path) -> None:
    rates = [learning_rate(step, 10, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert np.all(np.diff(rates[10:]) < 0) and rates[100] == pytest.approx(0)
    model = create(str(tiny_config)).model
    decayed, plain = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    exempt = {id(p) for p in plain["params"]}
    assert {
        id(model.logit_scale),
        id(model.positional_embedding),
        id(model.ln_final.bias),
    } <= exempt
    assert id(model.visual.conv1.weight) not in exempt
    assert len(exempt) + len(decayed["params"]) == len(list(model.parameters()))
