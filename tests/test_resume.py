"""A run that is killed at any moment goes on as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COLORS

from runtime.errors import DataError
from training import trainer
from training.batches import Batch
from training.interrupts import Interrupts
from training.options import TrainOptions
from training.run import Run
from training.state import NAME, load_state, save_state
from training.trainer import train

WEIGHTS = "open_clip_model.safetensors"
STEPS = 16  # 4 epochs of 4 batches


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


def options(data: Path, out: Path, **changes: Any) -> TrainOptions:
    chosen: dict[str, Any] = {
        "data": str(data),
        "out": out,
        "model": str(Path(__file__).parent / "tiny.json"),
        "epochs": 4,
        "batch_size": 18,
        "workers": 0,
        "checkpoint_every": 3,
        "flip": True,
        "token_drop": 0.2,
    }
    return TrainOptions(**{**chosen, **changes})


def die_at(monkeypatch: pytest.MonkeyPatch, step: int, how: BaseException) -> None:
    advance = Run.advance

    def dying(self: Run, batch: Batch) -> dict[str, float]:
        if self.number == step:
            raise how
        return advance(self, batch)

    monkeypatch.setattr(Run, "advance", dying)


KINDS: dict[str, dict[str, Any]] = {
    "clip": {"ema": 0.9, "precision": "bf16"},
    "itc": {"loss": "itc", "queue": 30, "micro_batch": 5},
    "labels": {"label_weight": 0.3, "loss": "triplet", "workers": 2, "layer_decay": 0.8},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_of_an_uninterrupted_run(
    kind: str, squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(options(squares, tmp_path / "whole", **KINDS[kind]), quiet=True)
    first = options(squares, tmp_path / "out", **KINDS[kind])
    again = options(squares, tmp_path / "out", **KINDS[kind], resume=True)
    for step, chosen in ((5, first), (11, again)):  # in mid-epoch, after the states of 3 and 9
        with monkeypatch.context() as patch:
            die_at(patch, step, Killed())
            with pytest.raises(Killed):
                train(chosen, quiet=True)
    record = train(again, quiet=True)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert [e["loss"] for e in record["epochs"]] == [e["loss"] for e in whole["epochs"]]
    steps = [(tmp_path / name / "steps.csv").read_text() for name in ("whole.run", "out.run")]
    assert [s.splitlines()[-1].split(",")[:2] for s in steps][0] == steps[1].splitlines()[-1].split(
        ","
    )[:2]
    assert not (tmp_path / "out.run" / NAME).exists()


@pytest.mark.slow
def test_kill_9_at_random_moments(squares: Path, tmp_path: Path) -> None:
    """Three real kills, wherever they strike."""
    chosen = options(squares, tmp_path / "whole", epochs=40)
    train(chosen, quiet=True)
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]);"
        "from test_resume import options; from training.trainer import train;"
        "train(options(Path(sys.argv[2]), Path(sys.argv[3]), epochs=40,"
        " resume=sys.argv[4] == 'resume'), quiet=True)"
    )
    seed = time.time_ns()
    rng = random.Random(seed)
    state = tmp_path / "out.run" / NAME
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(squares)]
    for attempt in range(3):
        how = "resume" if state.exists() else "start"
        before = state.stat().st_mtime_ns if state.exists() else 0
        process = subprocess.Popen([*command, str(tmp_path / "out"), how])
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if state.exists() and state.stat().st_mtime_ns > before:
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        assert process.wait() in (-signal.SIGKILL, 0), (seed, attempt)
        if process.returncode == 0:
            break
    if state.exists():
        train(options(squares, tmp_path / "out", epochs=40, resume=True), quiet=True)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_state_first(
    number: signal.Signals, squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    step = trainer.Training._step

    def signalled(self: trainer.Training, batch: Batch, log: Any) -> None:
        step(self, batch, log)
        if self.run.number == 7:
            for _ in range(2):  # as `timeout` does: the program, then its group
                os.kill(os.getpid(), number)

    monkeypatch.setattr(trainer.Training, "_step", signalled)
    chosen = options(squares, tmp_path / "out", checkpoint_every=100)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(chosen, quiet=True)
    signal.signal(signal.SIGTERM, before)
    assert signal.getsignal(signal.SIGINT) is handler
    assert load_state(tmp_path / "out.run")["step"] == 7
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert len(record["epochs"]) == 1  # the checkpoint of the last whole epoch


@pytest.fixture
def own_squares(squares: Path, tmp_path: Path) -> Path:
    """Data that a test may change."""
    return Path(shutil.copytree(squares, tmp_path / "own"))


@pytest.fixture
def stopped(own_squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of a run that died at step 5."""
    with monkeypatch.context() as patch:
        die_at(patch, 5, Killed())
        with pytest.raises(Killed):
            train(options(own_squares, tmp_path / "out"), quiet=True)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 1e-5}, "--lr was 0.0005, and is 1e-05 now; it must stay"),
        ({"resume": False}, "did not end: go on with it by --resume, or start anew by --force"),
    ],
)
def test_another_run_is_not_taken_up(
    stopped: Path, own_squares: Path, changes: dict[str, Any], message: str
) -> None:
    chosen = {"resume": True, **changes}
    if not chosen["resume"]:
        shutil.rmtree(stopped)
    with pytest.raises(DataError, match=message):
        train(options(own_squares, stopped, **chosen), quiet=True)


def test_other_data_are_not_taken_up(stopped: Path, own_squares: Path, squares: Path) -> None:
    with pytest.raises(DataError, match="--data was"):
        train(options(squares, stopped, resume=True), quiet=True)
    picture = next((own_squares / next(iter(COLORS))).iterdir())
    picture.write_bytes(picture.read_bytes() + b"x")
    with pytest.raises(DataError, match="the data are not those"):
        train(options(own_squares, stopped, resume=True), quiet=True)


def test_resume_begins_where_nothing_is_there_yet_and_not_where_all_is_done(
    squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = options(squares, tmp_path / "out", epochs=1, resume=True)
    train(chosen)
    assert "yet: the run begins" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(DataError, match="has ended"):
        train(chosen, quiet=True)


def test_a_damaged_state_is_an_error(tmp_path: Path) -> None:
    save_state(tmp_path, {"step": 1, "model": {"a": torch.zeros(1000)}})
    whole = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged"):
        load_state(tmp_path)


def test_a_full_disk_leaves_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(tmp_path, {"step": 1, "model": {}})

    def full(*_: Any) -> None:
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")  # what torch makes of it

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DataError, match=r"no space left.*step 2; the one before is intact"):
        save_state(tmp_path, {"step": 2, "model": {}})
    assert load_state(tmp_path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_that_died_while_it_wrote_its_report(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: float
) -> None:
    train(options(squares, tmp_path / "whole", ema=ema), quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Training, "_finish", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            train(options(squares, tmp_path / "out", ema=ema), quiet=True)
    train(options(squares, tmp_path / "out", ema=ema, resume=True), quiet=True)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("every", [3, 100])
def test_a_run_that_died_between_the_first_checkpoint_and_its_state(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    train(options(squares, tmp_path / "whole"), quiet=True)

    def dying(folder: Path, state: dict[str, Any]) -> None:
        if state["step"] == 4:
            raise Killed
        save_state(folder, state)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_state", dying)
        with pytest.raises(Killed):
            train(options(squares, tmp_path / "out", checkpoint_every=every), quiet=True)
    assert (tmp_path / "out" / WEIGHTS).is_file()
    train(options(squares, tmp_path / "out", resume=True), quiet=True)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_another_ones_checkpoint_is_not_replaced_by_a_resume(
    checkpoint: Path, squares: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    (other / "training.json").unlink()
    with pytest.raises(DataError, match="exists already"):
        train(options(squares, other, resume=True), quiet=True)


def test_half_a_row_of_the_log_is_passed_over(stopped: Path, own_squares: Path) -> None:
    with (stopped.with_name("out.run") / "steps.csv").open("a") as stream:
        stream.write("20,2,1e-")
    train(options(own_squares, stopped, resume=True), quiet=True)
    lines = (stopped.with_name("out.run") / "steps.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "10", "16"]


def test_machines_that_do_not_share_the_folder_are_told(
    stopped: Path, own_squares: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "gather_objects", lambda step: [step, None])
    with pytest.raises(DataError, match="OUT must be in a folder that all of them share"):
        train(options(own_squares, stopped, resume=True), quiet=True)


def test_what_is_ignored_stays_ignored() -> None:
    """A shell's `&` has a run ignore Ctrl-C: it must not save its state step by step for it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGINT)
            assert interrupts.asked is None
    finally:
        signal.signal(signal.SIGINT, before)
