"""What a run shows and writes down as it goes: a progress bar, a CSV file and TensorBoard."""

import csv
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch.utils.tensorboard import SummaryWriter

STEPS = "steps.csv"
EVERY = 10  # steps between two rows
SHOWN = (
    "top1", "top5", "guard_top1",
    "image_to_text_r1", "image_to_text_r10", "text_to_image_r1", "text_to_image_r10",
    "agreement", "teacher_cosine", "text_cosine",
)  # fmt: skip


class RunLog:
    """The log of one run in its folder: `steps.csv` and TensorBoard's event files.

    A run that is taken up at step `start` goes on behind that step's rows.
    """

    def __init__(self, folder: Path, start: int, total: int, epochs: int, console: Console) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._console = console
        self._file = folder / STEPS
        self.rows = [row for row in _read(self._file) if row["step"] <= start]
        self._rewrite()
        self._board = SummaryWriter(str(folder), purge_step=start)
        self._total, self._epochs = total, epochs
        self.progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
        )
        self._task = self.progress.add_task("training", total=total, completed=start)
        self._last, self._pairs = time.perf_counter(), 0

    def __enter__(self) -> "RunLog":
        self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()
        self._board.close()

    def step(self, number: int, epoch: int, pairs: int, figures: dict[str, float]) -> None:
        """Notes a step (from 1) of `pairs` pairs; every tenth is written down."""
        self._pairs += pairs
        if number % EVERY and number != self._total:
            self.progress.advance(self._task)
            return
        now = time.perf_counter()
        row = {"step": number, **figures, "images_per_second": self._pairs / (now - self._last)}
        self._last, self._pairs = now, 0
        self.rows.append(row)
        with self._file.open("a", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerow(row.values())
        shown = {k: v for k, v in row.items() if k not in ("step", "lr")}
        text = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in shown.items())
        where = f"epoch {epoch + 1}/{self._epochs}  {text}"
        self.progress.update(self._task, completed=number, description=where)
        self._write_board("train", row, number)

    def epoch(self, number: int, figures: dict[str, Any]) -> None:
        """Notes what an epoch that ended at step `number` has reached."""
        shown = {name: figures[name] for name in SHOWN if name in figures}
        shares = [
            f"{name.replace('_', ' ')} " + (f"{v:.3f}" if name.endswith("cosine") else f"{v:.1%}")
            for name, v in shown.items()
        ]
        self.say("  ".join([f"epoch {figures['epoch']}  loss {figures['loss']:.4g}", *shares]))
        self._write_board("epoch", figures, number)
        self._last, self._pairs = time.perf_counter(), 0

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, highlight=False, markup=False)

    def _write_board(self, group: str, figures: dict[str, Any], step: int) -> None:
        for name, value in figures.items():
            self._board.add_scalar(f"{group}/{name}", value, step)

    def _rewrite(self) -> None:
        with self._file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(COLUMNS)
            writer.writerows(row.values() for row in self.rows)


COLUMNS = ("step", "loss", "lr", "temperature", "accuracy", "images_per_second")


def _read(file: Path) -> list[dict[str, float]]:
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return [row for row in map(_row, csv.DictReader(stream)) if row]


def _row(cells: dict[str, str]) -> dict[str, float] | None:
    """A row's numbers; None where a crash has left half a row."""
    try:
        row = {name: float(cells[name]) for name in COLUMNS}
        return row | {"step": int(row["step"])}
    except (KeyError, TypeError, ValueError):
        return None
