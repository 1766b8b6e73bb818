"""Fine-tuning that keeps what the model could: locked towers, the guard, mixing with the start."""

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_tar
from safetensors.numpy import load_file

from calibration.subject import measure
from runtime.errors import DataError, GateFailed
from training.evaluate import checkpoint_subject
from training.options import TrainOptions
from training.results import Results
from training.run import Run
from training.trainer import train

WEIGHTS = "open_clip_model.safetensors"
TEMPLATES = ("a {} square", "{}")


def options(data: Path, out: Path, start: Path, **changes: Any) -> TrainOptions:
    chosen: dict[str, Any] = {
        "data": str(data),
        "out": out,
        "model": str(start),
        "templates": TEMPLATES,
        "epochs": 2,
        "batch_size": 24,
        "workers": 0,
        "warmup": 0.0,
    }
    return TrainOptions(**{**chosen, **changes})


def changed(start: Path, end: Path) -> set[str]:
    before, after = (load_file(folder / WEIGHTS) for folder in (start, end))
    return {name for name, own in before.items() if not np.array_equal(own, after[name])}


@pytest.fixture(scope="module")
def wrong_names(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The squares under shuffled names: whoever learns them forgets the colours."""
    folder = tmp_path_factory.mktemp("wrong") / "squares"
    files = sorted(squares.rglob("*.png"))
    random.Random(0).shuffle(files)
    for n, file in enumerate(files):
        target = folder / ("red", "green", "blue")[n % 3]
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target / f"{n}.png")
    return folder


def test_labels_leave_a_trained_text_tower_as_it_is(
    checkpoint: Path, squares: Path, tmp_path: Path
) -> None:
    train(options(squares, tmp_path / "a", checkpoint, lr=1e-3), quiet=True)
    moved = changed(checkpoint, tmp_path / "a")
    assert moved and all(name.startswith("visual.") or name == "logit_scale" for name in moved)
    train(options(squares, tmp_path / "b", checkpoint, lr=1e-3, lock_text=False), quiet=True)
    assert "token_embedding.weight" in changed(checkpoint, tmp_path / "b")


def test_the_last_groups_of_a_locked_tower_are_trained(
    checkpoint: Path, squares: Path, tmp_path: Path
) -> None:
    chosen = options(
        squares, tmp_path / "out", checkpoint, lock_image=True, unlock_image=2, lr=1e-3
    )
    train(chosen, quiet=True)
    moved = {name for name in changed(checkpoint, tmp_path / "out") if name != "logit_scale"}
    assert moved and all(
        "resblocks.1." in n or "ln_post" in n or n.endswith(".proj") for n in moved
    )


def test_features_of_a_locked_tower_are_computed_once(
    checkpoint: Path, squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the image tower locked only its cached features are used: the pictures may go."""
    data = Path(shutil.copytree(squares, tmp_path / "data"))
    chosen: dict[str, Any] = {"lock_image": True, "lock_text": False, "cache": tmp_path / "cache"}
    first = train(options(data, tmp_path / "a", checkpoint, **chosen), quiet=True)
    monkeypatch.setattr("training.features._run", None)  # a second computation would fail
    second = train(options(data, tmp_path / "b", checkpoint, **chosen), quiet=True)
    assert first["epochs"] == second["epochs"]
    moved = changed(checkpoint, tmp_path / "a")
    assert moved and not any(name.startswith("visual.") for name in moved)


def test_a_random_tower_cannot_be_locked(squares: Path, tiny_config: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--lock-image.*random"):
        train(options(squares, tmp_path / "out", tiny_config, lock_image=True), quiet=True)


def test_the_guard_stops_a_run_and_keeps_the_last_epoch_that_held(
    checkpoint: Path, squares: Path, wrong_names: Path, tmp_path: Path
) -> None:
    chosen = options(
        wrong_names, tmp_path / "out", checkpoint, guard=squares, epochs=30, lr=3e-4, warmup=0.5
    )
    record = train(chosen, quiet=True)
    assert record["stopped_by_guard"] and 1 < len(record["epochs"]) < 30
    assert record["epochs"][-1]["guard_top1"] < record["guard_start"] - 0.02
    written = json.loads((tmp_path / "out/training.json").read_text())
    assert written["stopped_by_guard"] and (tmp_path / "out/report/report.md").is_file()
    subject = checkpoint_subject(str(tmp_path / "out"))
    _, kept = measure(subject, squares, TEMPLATES, quiet=True)
    assert kept.figures["top1"] == written["epochs"][-2]["guard_top1"]
    assert kept.figures["top1"] >= record["guard_start"] - 0.02


def test_a_guard_that_never_holds_writes_nothing(
    checkpoint: Path, squares: Path, wrong_names: Path, tmp_path: Path
) -> None:
    chosen = options(wrong_names, tmp_path / "out", checkpoint, guard=squares, lr=0.03)
    with pytest.raises(GateFailed, match=r"after the first .* fell from .*--guard-drop 0\.02"):
        train(chosen, quiet=True)
    assert not (tmp_path / "out").exists()


def test_wise_ft_mixes_start_and_end(checkpoint: Path, squares: Path, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"lr": 1e-3, "val": squares}
    train(options(squares, tmp_path / "all", checkpoint, **shared), quiet=True)
    record = train(
        options(squares, tmp_path / "mix", checkpoint, wise_ft=0.3, **shared), quiet=True
    )
    curve = record["wise_ft"]["curve"]
    assert [point["alpha"] for point in curve] == [i / 10 for i in range(11)]
    assert all(0 <= point["top1"] <= 1 for point in curve)
    names = (checkpoint, tmp_path / "all", tmp_path / "mix")
    start, end, mixed = (load_file(folder / WEIGHTS) for folder in names)
    for name, own in mixed.items():
        expected = 0.7 * start[name] + 0.3 * end[name]
        np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-6, err_msg=name)
    assert (tmp_path / "mix/report/wise_ft.png").is_file()


def test_another_mixture_needs_no_other_training(
    checkpoint: Path, squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way out that a mixture which fails the guard names."""
    chosen = options(squares, tmp_path / "out", checkpoint, wise_ft=0.9, lr=1e-3)
    with monkeypatch.context() as patch:
        patch.setattr(Results, "_mixed", lambda _: (_ for _ in ()).throw(GateFailed("too far")))
        with pytest.raises(GateFailed):
            train(chosen, quiet=True)
    monkeypatch.setattr(Run, "advance", None)  # no further step
    again = dataclasses.replace(chosen, wise_ft=0.1, resume=True)
    assert train(again, quiet=True)["wise_ft"]["alpha"] == 0.1


def test_layers_far_from_the_output_learn_less(
    checkpoint: Path, squares: Path, tmp_path: Path
) -> None:
    chosen = options(
        squares, tmp_path / "out", checkpoint, epochs=1, layer_decay=1e-4, weight_decay=0.0
    )
    train(chosen, quiet=True)
    before, after = (load_file(folder / WEIGHTS) for folder in (checkpoint, tmp_path / "out"))
    moved = {n: float(np.abs(after[n] - own).max()) for n, own in before.items()}
    assert moved["visual.conv1.weight"] < 1e-3 * moved["visual.proj"]


def test_a_locked_text_tower_takes_tables_and_shards_together(
    checkpoint: Path, squares: Path, tmp_path: Path
) -> None:
    picture = next(squares.rglob("*.png")).read_bytes()
    kinds = (("png", picture), ("txt", b"a square"))
    members = {f"{n}.{kind}": content for n in range(30) for kind, content in kinds}
    write_tar(tmp_path / "more.tar", members)
    chosen = options(
        squares, tmp_path / "out", checkpoint, lock_text=True, mix=(f"{tmp_path}/more.tar=1",)
    )
    assert len(train(chosen, quiet=True)["epochs"]) == 2


def test_a_mixture_that_fails_the_guard_is_not_written(
    checkpoint: Path, squares: Path, wrong_names: Path, tmp_path: Path
) -> None:
    chosen = options(
        wrong_names, tmp_path / "out", checkpoint, guard=squares, wise_ft=1.0, lr=3e-3, epochs=3
    )
    with pytest.raises(GateFailed, match=r"the mixture's zero-shot accuracy .* --wise-ft 0"):
        train(chosen, quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unlock_text": 1}, "--unlock-text goes with --lock-text"),
        ({"lock_image": True, "flip": True, "lock_text": False}, "need --views 2 or more"),
        ({"lock_image": True, "lock_text": True}, "both towers are locked"),
    ],
)
def test_options_that_would_do_nothing(
    checkpoint: Path, squares: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        train(options(squares, tmp_path / "out", checkpoint, **changes), quiet=True)


def test_random_weights_are_no_start_to_mix_with(
    squares: Path, tiny_config: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        DataError, match="--wise-ft mixes with the start: give all of the model one"
    ):
        train(options(squares, tmp_path / "out", tiny_config, wise_ft=0.5), quiet=True)
    with pytest.raises(DataError, match="write to another folder"):
        options(squares, tmp_path / "start", tmp_path / "start", wise_ft=0.5)
