"""Training makes a checkpoint that open_clip loads, and says what it reached."""

import importlib.metadata
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import solid, write_squares, write_tar
from PIL import Image

from runtime.errors import DataError
from runtime.label_sets import DEFAULT_TEMPLATES
from training.model import create
from training.options import TrainOptions
from training.run import learning_rate
from training.towers import Towers
from training.trainer import train

# isort: split
import open_clip


def options(data: Path, out: Path, **changes: Any) -> TrainOptions:
    model = str(Path(__file__).parent / "tiny.json")
    base = {"data": str(data), "out": out, "model": model, "epochs": 1, "workers": 0}
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
    (data,) = record["data"]
    assert data["images"] == 72 and len(data["fingerprint"]) == 64
    assert record["versions"]["torch"] == importlib.metadata.version("torch")
    assert [e["epoch"] for e in record["epochs"]] == list(range(1, 13))
    last = record["epochs"][-1]
    assert last["top1"] >= 0.9 and "top5" not in last  # there are three classes
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
    names = {name for name in record["epochs"][-1] if "_to_" in name}
    to_text = {f"image_to_text_r{k}" for k in (1, 5)}  # there are but six captions
    assert names == to_text | {f"text_to_image_r{k}" for k in (1, 5, 10)}


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


def test_bad_pictures_are_left_out_counted_and_stop_when_they_are_many(
    squares: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(squares, tmp_path / "data")
    (data / "red" / "bad.jpg").write_text("this is a text")
    record = train(options(data, tmp_path / "out", max_bad=0.05), quiet=True)
    assert len(record["epochs"]) == 1
    report = json.loads((tmp_path / "out/report/report.json").read_text())
    assert report["bad"]["counts"] == {"unreadable picture": 1}
    with pytest.raises(DataError, match=r"1 of 73 items.*--max-bad 0\.01.*bad\.jpg: unreadable"):
        train(options(data, tmp_path / "strict"), quiet=True)
    assert not (tmp_path / "strict").exists()


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
    assert {p.name for p in tmp_path.iterdir()} == {"out", "out.run"}


def test_an_exploding_loss_names_the_batch_and_keeps_the_last_epoch(
    squares: Path, tmp_path: Path
) -> None:
    bad = options(squares, tmp_path / "out", lr=1e30, grad_clip=1e30, epochs=3, warmup=0.0)
    with pytest.raises(
        DataError, match=r"(loss became|gradient is) nan at step \d.*\.png.*12 more"
    ):
        train(bad, quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"lr": float("nan")}, "--lr"),
        ({"batch_size": 1}, "--batch-size must be at least 2"),
        ({"warmup": 2.0}, "--warmup"),
        ({"weight_decay": -1.0}, "--weight-decay"),
        ({"precision": "fp8"}, "--precision is fp32 or bf16 or fp16"),
        ({"loss": "l2"}, "--loss is auto or clip"),
        ({"crop": 0.0}, "--crop must be greater than 0"),
        ({"ema": 1.0}, "--ema is a share"),
        ({"batch_size": 15, "devices": 2}, "a multiple of 2"),
        ({"unlock_image": 2}, "goes with --lock-image"),
        ({"views": 2}, "add --lock-image"),
        ({"strategy": "fsdp", "ema": 0.9}, "goes neither with --ema"),
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
    with pytest.raises(DataError, match="no other weights"):
        create(str(checkpoint), "openai")
    (tmp_path / "half.json").write_text('{"embed_dim": 3}')
    with pytest.raises(DataError, match="lacks vision_cfg, text_cfg"):
        create(str(tmp_path / "half.json"))


def test_the_schedule() -> None:
    rates = [learning_rate(step, 10, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert np.all(np.diff(rates[10:]) < 0) and rates[100] == pytest.approx(0)


def test_a_checkpoint_keeps_its_templates(checkpoint: Path, tmp_path: Path) -> None:
    assert create(str(checkpoint)).templates == ("a {} square", "{}")
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "training.json").unlink()
    assert create(str(copy)).templates == DEFAULT_TEMPLATES


@pytest.mark.parametrize("loss", ["clip", "itc", "triplet", "margin"])
def test_every_loss_learns_with_its_defaults(
    squares: Path, tiny_config: Path, tmp_path: Path, loss: Any
) -> None:
    options = TrainOptions(
        data=str(squares), val=squares, out=tmp_path / "out", model=str(tiny_config), loss=loss,
        epochs=12, batch_size=24, lr=3e-3, crop=1.0, workers=0,
    )  # fmt: skip
    last = train(options, quiet=True)["epochs"][-1]
    assert last["top1"] >= 0.9
    assert last["logit_scale"] != pytest.approx(1 / 0.07, rel=1e-3)  # or scores would mean nothing


def test_a_checkpoint_is_trained_further_with_its_templates(
    checkpoint: Path, squares: Path, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"data": str(squares), "epochs": 1, "workers": 0}
    for name, start in (("a", {"model": str(checkpoint)}), ("b", {"init": str(checkpoint)})):
        model: dict[str, Any] = {"model": str(Path(__file__).parent / "tiny.json"), **start}
        record = train(TrainOptions(out=tmp_path / name, **common, **model), quiet=True)
        assert record["options"]["templates"] == ["a {} square", "{}"]


def test_what_was_embedded_once_is_not_rounded(
    checkpoint: Path, squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    forward = Towers.forward

    def watched(self: Towers, images: torch.Tensor, texts: torch.Tensor) -> Any:
        seen.append(texts)
        return forward(self, images, texts)

    monkeypatch.setattr(Towers, "forward", watched)
    options = TrainOptions(
        data=str(squares), out=tmp_path / "out", model=str(checkpoint), lock_text=True,
        epochs=1, batch_size=24, workers=0, precision="bf16",
    )  # fmt: skip
    train(options, quiet=True)
    assert {texts.dtype for texts in seen} == {torch.float32}


def test_torchrun_without_devices_is_an_error(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = TrainOptions(data=str(squares), out=tmp_path / "out", model="nano")
    with pytest.raises(DataError, match="torchrun started 2 processes, but --devices .* is 1"):
        train(options, quiet=True)


def test_bad_samples_are_a_share_of_what_was_seen(tiny_config: Path, tmp_path: Path) -> None:
    """With --epoch-size the shards hold more than an epoch."""
    members: dict[str, bytes | str] = {}
    for n in range(400):
        members[f"{n}.png"] = b"this is no picture" if n % 100 == 50 else solid(n % 250)
        members[f"{n}.txt"] = f"picture {n}"
    write_tar(tmp_path / "0.tar", members)
    options = TrainOptions(
        data=str(tmp_path / "0.tar"), out=tmp_path / "out", model=str(tiny_config), epochs=8,
        epoch_size=100, batch_size=25, workers=0, max_bad=0.03,
    )  # fmt: skip
    assert sum(train(options, quiet=True)["bad"].values()) == 4


def test_a_bias_is_not_left_to_itself(squares: Path, tiny_config: Path, tmp_path: Path) -> None:
    config = json.loads(tiny_config.read_text()) | {"init_logit_bias": -10}
    (tmp_path / "biased.json").write_text(json.dumps(config))
    chosen = TrainOptions(
        data=str(squares), out=tmp_path / "out", model=str(tmp_path / "biased.json"), loss="clip",
        workers=0,
    )  # fmt: skip
    with pytest.raises(DataError, match="its scores are sigmoids, which --loss clip does not"):
        train(chosen, quiet=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val": Path("typo.csv")}, "there is no data file or folder typo.csv"),
        ({"lock_text": True, "token_drop": 0.3}, "--token-drop goes with a text tower"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_computed(
    checkpoint: Path, squares: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    chosen = TrainOptions(
        data=str(squares), out=tmp_path / "out", model=str(checkpoint), workers=0, **changes
    )
    with pytest.raises(DataError, match=message):
        train(chosen, quiet=True)


def test_this_folder_is_a_name(squares: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="cannot be replaced as a whole"):
        train(TrainOptions(data=str(squares), out=Path("."), model="nano", workers=0), quiet=True)
