"""A search tries other options, ends bad trials early, keeps the best, and goes on after a stop."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import write_squares
from rich.console import Console
from typer.testing import CliRunner

from export.cli import app
from runtime.errors import DataError
from training.model import create
from training.options import TrainOptions
from training.search import Search, merit
from training.search_space import SEARCHED, changed, check_names, given, widths, write_config
from training.trainer import Told

TINY = Path(__file__).parent / "tiny.json"


@pytest.fixture
def options(squares: Path, tmp_path: Path) -> TrainOptions:
    return TrainOptions(
        data=str(squares), out=tmp_path / "out", model=str(TINY), val=squares, epochs=3,
        batch_size=16, lr=1e-3, workers=0,
    )  # fmt: skip


class Fake:
    """A training whose figure is the better the nearer lr is to 3e-3."""

    def __init__(
        self, fails_at: int | None = None, error: type[BaseException] = KeyboardInterrupt
    ) -> None:
        self.lrs: list[float] = []
        self.fails_at, self.error = fails_at, error

    def __call__(self, options: TrainOptions, told: Told) -> dict[str, Any]:
        self.lrs.append(options.lr)
        if len(self.lrs) == self.fails_at:
            state = options.out.with_name(options.out.name + ".run")
            state.mkdir()
            (state / "last.ckpt").touch()
            raise self.error("the loss became nan")
        reached = 1 / (1 + abs(options.lr / 3e-3 - 1))
        for epoch in range(1, options.epochs + 1):
            told({"epoch": epoch, "top1": reached * epoch / options.epochs})
        options.out.mkdir()
        record = {"options": options.describe(), "reached": reached}
        for name in ("open_clip_config.json", "training.json"):
            (options.out / name).write_text(json.dumps(record))
        return record


def search(options: TrainOptions, trials: int, train: Any, **more: Any) -> Search[TrainOptions]:
    config: Mapping[str, Any] = more.pop("config", {})
    return Search(options, trials, ("lr",), config, train, console=Console(quiet=True), **more)


def test_the_best_trial_is_kept_and_the_first_one_is_as_given(options: TrainOptions) -> None:
    train = Fake()
    record = search(options, 8, train).run()
    assert train.lrs[0] == options.lr and len(train.lrs) == 8
    nearest = min(train.lrs, key=lambda lr: abs(lr / 3e-3 - 1))
    assert record["search"]["values"]["lr"] == nearest
    assert record["options"]["lr"] == nearest and record["options"]["out"] == str(options.out)
    assert json.loads((options.out / "training.json").read_text()) == record
    folder = options.out.with_name("out.search")
    assert (folder / "search.png").read_bytes().startswith(b"\x89PNG")
    trials = json.loads((folder / "search.json").read_text())["trials"]
    assert any(trial["ended_early"] for trial in trials) and len(trials) == 8
    assert len(list(folder.glob("trial-*"))) == 1  # checkpoints of all others are gone


def test_a_search_that_was_killed_goes_on(options: TrainOptions) -> None:
    with pytest.raises(KeyboardInterrupt):
        search(options, 4, first := Fake(fails_at=3)).run()
    with pytest.raises(DataError, match="--resume"):
        search(options, 4, Fake()).run()
    resumed = changed(options, {}, resume=True)
    record = search(resumed, 4, second := Fake()).run()
    assert second.lrs[0] == first.lrs[-1] and len(second.lrs) == 2
    assert len(record["search"]["trials"]) == 4


def test_a_trial_that_fails_is_one_of_them(options: TrainOptions) -> None:
    record = search(options, 4, train := Fake(fails_at=2, error=DataError)).run()
    assert len(train.lrs) == 4 and len(record["search"]["trials"]) == 3
    [failed] = record["search"]["failed"]
    assert failed["values"] == {"lr": train.lrs[1]} and "nan" in failed["error"]
    assert not list(options.out.with_name("out.search").rglob("last.ckpt"))
    again = search(changed(options, {}, resume=True), 4, more := Fake()).run()
    assert more.lrs == [] and again["search"] == record["search"]


def test_options_that_fail_as_they_are_end_the_search(options: TrainOptions) -> None:
    with pytest.raises(DataError, match="nan"):
        search(options, 4, Fake(fails_at=1, error=DataError)).run()


def test_a_search_over_what_the_model_has_not_is_refused(options: TrainOptions) -> None:
    own = Search(options, 4, ("width", "dropout"), {}, Fake(), console=Console(quiet=True))
    with pytest.raises(DataError, match="over width, dropout varies nothing"):
        own.run()
    assert not options.out.with_name("out.search").exists()


def test_another_search_is_not_gone_on_with(options: TrainOptions) -> None:
    search(options, 1, Fake()).run()
    other = changed(options, {}, resume=True, epochs=5)
    with pytest.raises(DataError, match="epochs must stay"):
        search(other, 2, Fake()).run()


def test_more_trials_may_be_added_later(options: TrainOptions) -> None:
    search(options, 2, Fake()).run()
    record = search(changed(options, {}, resume=True), 3, more := Fake()).run()
    assert len(more.lrs) == 1 and len(record["search"]["trials"]) == 3


def test_what_cannot_be_searched_is_said(options: TrainOptions) -> None:
    with pytest.raises(DataError, match="--val"):
        search(changed(options, {}, val=None), 2, Fake()).run()
    with pytest.raises(DataError, match="trials of 1 or more"):
        search(options, 0, Fake()).run()
    with pytest.raises(DataError, match="colour"):
        check_names(["lr", "colour"])


def test_dropout_and_width_become_a_config(tmp_path: Path) -> None:
    config = create("mobilenetv2").config
    assert list(widths(config))[0] == "100" and "050" in widths(config)
    assert write_config(config, {"dropout": 0.3, "width": "050"}, path := tmp_path / "model.json")
    narrow = create(str(path))
    whole = sum(p.numel() for p in create("mobilenetv2").model.visual.parameters())
    assert sum(p.numel() for p in narrow.model.visual.parameters()) < whole / 2
    assert narrow.config["vision_cfg"]["timm_drop"] == 0.3
    assert not write_config(config, {"lr": 1e-3}, tmp_path / "none.json")


def test_a_transformer_has_narrower_widths() -> None:
    vision = {"layers": 12, "width": 768, "head_width": 64, "patch_size": 32}
    assert list(widths({"vision_cfg": vision})) == ["768", "576", "384"]
    assert widths({"vision_cfg": {**vision, "width": 64}}) == {}


def test_weights_that_are_there_fit_no_other_model(options: TrainOptions) -> None:
    assert set(given(options, {}, SEARCHED)) == {"lr", "batch", "weight_decay", "warmup"}


def test_few_captions_are_compared_by_what_there_is() -> None:
    few = {"image_to_text_r5": 0.6, "text_to_image_r5": 0.4, "text_to_image_r1": 0.1}
    assert merit(few | {"image_to_text_r10": 0.9}) == 0.5
    assert merit({"image_to_text_r1": 0.6, "teacher_cosine": 0.3}) == 0.3
    with pytest.raises(DataError, match="too little"):
        merit({"loss": 1.0})


def test_captions_are_compared_by_recall() -> None:
    assert merit({"image_to_text_r10": 0.25, "text_to_image_r10": 0.75, "agreement": 1.0}) == 0.5
    assert merit({"top1": 0.5, "agreement": 1.0}) == 0.5
    assert merit({"teacher_cosine": 0.9, "agreement": 0.75}) == 0.75
    assert merit({"teacher_cosine": 0.9}) == 0.9


def test_edgeclip_train_searches(tmp_path: Path) -> None:
    data = write_squares(tmp_path / "squares", each=8, seed=0)
    out = tmp_path / "out"
    command = ["train", data, out, "--model", TINY, "--val", data, "--epochs", 1, "--workers", 0,
               "--batch-size", 8, "--search", 2, "--search-over", "lr,width", "--json"]  # fmt: skip
    result = CliRunner().invoke(app, list(map(str, command)), catch_exceptions=False)
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    assert len(record["search"]["trials"]) == 2 and record["epochs"][0]["top1"] >= 0
    assert (out / "open_clip_model.safetensors").is_file()


def test_resume_is_no_force(options: TrainOptions) -> None:
    """A checkpoint that no search has made stays, and so does a folder that holds no search."""
    options.out.mkdir()
    (options.out / "open_clip_config.json").write_text("mine")
    going_on = dataclasses.replace(options, resume=True)
    with pytest.raises(DataError, match="exists already"):
        search(going_on, 2, Fake()).run()
    folder = options.out.with_name("out.search")
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="it has no study.db"):
        search(dataclasses.replace(options, force=True), 2, Fake()).run()
    assert (folder / "notes.txt").exists()


def test_what_a_locked_tower_says_is_shared_by_all_trials(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path | None] = []

    def note(options: TrainOptions, *_: Any) -> dict[str, Any]:
        seen.append(options.cache)
        return {}

    monkeypatch.setattr("training.cli.searched", note)
    command = ["train", str(squares), str(tmp_path / "out"), "--model", str(TINY), "--search", "2",
               "--val", str(squares)]  # fmt: skip
    for more in ([], ["--lock-image"]):
        CliRunner().invoke(app, command + more, catch_exceptions=False)
    assert seen == [None, tmp_path / "out.features"]
