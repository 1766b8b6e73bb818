"""Runs a watched stream until it ends or is ended, and says what happened."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import systemd
from .errors import DataError
from .history import History
from .log import log
from .outputs import places
from .stream import Stream, names_of
from .stream_stats import SourceStats
from .timeline_chart import draw_timeline
from .video_out import check_file, check_out
from .watch import Watch

if TYPE_CHECKING:
    from .classifier import Classifier
    from .grabbed import State


STUCK = 10.0  # seconds in which a stream must have looked for frames


@dataclass(frozen=True)
class Done:
    """How a stream went: what became of each source's frames, and why it ended."""

    stats: list[SourceStats]
    why: str


def run(
    classifier: "Classifier",
    sources: Sequence[str],
    watch: Watch,
    *,
    fps: float | None = None,
    realtime: bool = False,
    skip_still: bool = False,
    seconds: float | None = None,
) -> Done:
    """Has `watch` see the sources until all have ended, for at most `seconds`, or until SIGINT or
    SIGTERM; then what goes on is ended, and what is written put in its place. systemd is told.

    A second signal does what it does elsewhere. Raises as `runtime.Stream` does.
    """

    def told(source: str, state: "State", reason: str) -> None:
        watch.state(source, state, reason)
        log_state(source, state, reason)

    try:
        with Stream(
            classifier, list(sources), fps=fps, realtime=realtime, skip_still=skip_still,
            on_state=told, on_tick=watch.tick,
        ) as stream, _ending(stream, seconds) as reasons, systemd.service(
            lambda: time.monotonic() - stream.looked < STUCK
        ):  # fmt: skip
            try:
                for seen in stream:
                    watch.see(seen)
            except BrokenPipeError:  # whoever read the lines has gone
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                reasons.insert(0, "nobody reads its output any more")
            ended = stream.stats()
    finally:
        watch.close()
    # The states are those before the end; what was under way then is counted after it.
    stats = [
        replace(after, state=before.state, reason=before.reason, fps=before.fps)
        for before, after in zip(ended, stream.stats(), strict=True)
    ]
    return Done(stats, reasons[0] if reasons else "all sources have ended")


@contextmanager
def _ending(stream: Stream, seconds: float | None) -> Iterator[list[str]]:
    """While it lasts, signals and the time limit stop the stream; yields the list of why."""
    reasons: list[str] = []

    def stop(why: str) -> None:
        reasons.append(why)
        stream.stop()

    before: dict[int, Any] = {}

    def signalled(number: int, frame: object) -> None:
        signal.signal(number, before[number])
        stop("interrupted" if number == signal.SIGINT else "asked to end by SIGTERM")

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[int(number)] = signal.signal(number, signalled)
    timer = threading.Timer(seconds, stop, [f"after {seconds:g} s"]) if seconds else None
    if timer:
        timer.daemon = True
        timer.start()
    try:
        yield reasons
    finally:
        if timer:
            timer.cancel()
        for restored, handler in before.items():
            signal.signal(restored, handler)


def log_state(source: str, state: "State", reason: str) -> None:
    """Says in the log that a source has become live, lost, ended, ..."""
    if state != "closed":
        log.info("%s: %s%s", source, state, f": {reason}" if reason else "")


def check_outputs(
    save: Path | None, timeline: Path | None, sources: Sequence[str], force: bool
) -> None:
    """What could not be written at the end is said at the beginning. Raises DataError."""
    for place in places(save, names_of(sources)).values() if save else ():
        check_out(place, force)
    if timeline is not None:
        if timeline.suffix.lower() != ".png":
            raise DataError(f"--timeline {timeline} is drawn as PNG: name a file that ends in .png")
        check_file(timeline, force)


def write_timeline(
    path: Path, history: History, labels: Sequence[str], stats: Sequence[SourceStats], force: bool
) -> None:
    """Draws the labels over time into a PNG file, written beside and renamed."""
    notes = {
        s.source: f"{s.seen} frames, {s.dropped} dropped, {s.skipped} skipped, "
        f"p50 {s.p50_ms:.0f} ms, p99 {s.p99_ms:.0f} ms"
        for s in stats
    }
    path = check_file(path, force)
    beside = path.with_name(f".new-{path.name}")
    try:
        draw_timeline(history, labels, notes).save(beside, "PNG")
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def summarise(done: Done, mqtt: Any = None, format: str = "text") -> None:
    """Says why the stream ended, and what became of each source's frames: in a table, or in one
    line of the log as JSON."""
    if format == "json":
        about = {"sources": [asdict(stats) for stats in done.stats]}
        log.info("the stream ended: %s", done.why, extra=about)
    else:
        _print_summary(done)
    if mqtt is not None:
        said = f"; {mqtt.problem}" if mqtt.problem else ""
        log.info("%s: %d messages dropped%s", mqtt, mqtt.dropped, said)


def _print_summary(done: Done) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("", *(escape(s.source) for s in done.stats), box=None, pad_edge=False)
    for name in ("state", "seen", "classified", "skipped", "dropped", "thinned", "broken",
                 "reconnects"):  # fmt: skip
        table.add_row(name, *(str(getattr(s, name)) for s in done.stats))
    table.add_row("frames/s", *(f"{s.fps:.1f}" for s in done.stats))
    for name in ("p50_ms", "p90_ms", "p99_ms"):
        shown = (f"{getattr(s, name):.1f}" for s in done.stats)
        table.add_row(f"age {name.replace('_', ' ')}", *shown)
    console = Console(stderr=True, highlight=False)
    console.print(f"edgeclip: the stream ended: {escape(done.why)}")
    console.print(table)
