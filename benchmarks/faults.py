"""Streams under faults, for long: nothing late, nothing lost uncounted, nothing grows, none dies.

    python benchmarks/faults.py BUNDLE [--minutes 30] [--cameras 5] [--allow 20]

Cameras with MJPEG over HTTP, each a process, and a real one with RTSP (GStreamer's server, where it
is installed) die and return, freeze, fall silent, stutter, send broken pictures, change their
size, run slower and faster than the model, and the model becomes slow; the first camera has no
faults. Files are read beside them again and again, whole ones and damaged. Exits with 1 where a
check fails:

age         a frame is no older when it has been classified than two frame times of its camera and
            one run of the model, and --allow ms for the machine's own scheduling
counts      seen = classified + skipped + dropped + broken + thinned of each source: after the end
            exactly, before that but for one frame that is decoded and one that waits
growth      threads, open files and memory of the last third are those of the first
steady      the camera without faults is never without a frame for over a second and a run
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from cameras import clock_age
from fault_script import Faults
from mjpeg_camera import Camera

import runtime
from runtime.conditions import process_memory
from runtime.frames import Colors, Frame
from runtime.prediction import Prediction
from runtime.stream import Classifies, Seen
from runtime.stream_stats import SourceStats

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from rtsp_server import RtspServer, why_absent

RTSP = "rtsp"
STALL = 4.0  # seconds


@dataclass
class Model:
    """A classifier whose runs are timed, and can be made slow."""

    classifier: Classifies
    slower: float = 0.0
    runs: list[float] = field(default_factory=list)

    @property
    def labels(self) -> tuple[str, ...]:
        return self.classifier.labels

    def classify_batch(self, frames: Sequence[Frame], color: Colors = "bgr") -> list[Prediction]:
        start = time.perf_counter()
        found = self.classifier.classify_batch(frames, color)
        time.sleep(self.slower)
        self.runs.append((time.perf_counter() - start) * 1e3)
        return found

    def make_slow(self, seconds: float) -> None:
        self.slower = seconds


class Ages:
    """How old the frames of each source were, against what they may be."""

    def __init__(self, faults: Faults, allow: float) -> None:
        self._faults, self._allow = faults, allow
        self._round = self.longest = 0.0
        self.of: dict[str, array[float]] = {}
        """Of each frame three numbers, in as little memory as can be: growth is measured here."""
        self.exceeded: list[str] = []

    def see(self, seen: Seen, runs: list[float]) -> None:
        if runs:  # a new round: one run, or one for each channel order
            self._round = sum(runs)
            self.longest = max(self.longest, self._round)
            runs.clear()
        limit = 2e3 * self._faults.apart(seen.source) + self._round
        made = clock_age(seen.frame) if seen.frame.ndim == 3 else 0.0
        figures = seen.age_ms, seen.age_ms - limit, made
        self.of.setdefault(seen.source, array("f")).extend(figures)
        if seen.age_ms > limit + self._allow:
            said = f"{seen.source} frame {seen.number}: {seen.age_ms:.0f} ms, not {limit:.0f}"
            self.exceeded.append(said)
            print(f"          age: {said}", flush=True)


class Watcher(threading.Thread):
    """Each second looks at the counts, and at what the process holds."""

    def __init__(self, stream: runtime.Stream) -> None:
        super().__init__(name="watcher")
        self._stream, self._over = stream, threading.Event()
        self.held: list[tuple[float, float, float]] = []
        self.wrong: list[str] = []

    def run(self) -> None:
        while not self._over.wait(1.0):
            memory = process_memory()
            assert memory
            threads, files = (len(os.listdir(f"/proc/self/{of}")) for of in ("task", "fd"))
            self.held.append((threads, files, memory[0]))
            # This is not the thread that classifies: one more may be with that.
            self.wrong += wrong_counts(self._stream.stats(), 3)

    def stop(self) -> None:
        self._over.set()
        self.join()


def wrong_counts(stats: Sequence[SourceStats], under_way: int) -> list[str]:
    """The sources of which it is not known what became of all frames but so many."""
    wrong = []
    for s in stats:
        left = s.seen - s.classified - s.skipped - s.dropped - s.broken - s.thinned
        if not 0 <= left <= under_way:
            wrong.append(f"{s.source}: {left} frames not accounted for: {s}")
    return wrong


class Files(threading.Thread):
    """Reads a video, whole and cut off, and a folder with a broken picture, again and again."""

    def __init__(self, classifier: Classifies, folder: Path) -> None:
        super().__init__(name="files")
        self._classifier, self._over = classifier, threading.Event()
        self.times, self.wrong = 0, list[str]()
        self._paths = [folder / "whole.avi", folder / "cut.avi", folder / "pictures"]
        writer = cv2.VideoWriter(str(self._paths[0]), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
        noise = np.random.default_rng(0)
        for _ in range(50):
            writer.write(noise.integers(0, 256, (48, 64, 3), np.uint8))
        writer.release()
        whole = self._paths[0].read_bytes()
        self._paths[1].write_bytes(whole[: len(whole) // 2])
        self._paths[2].mkdir()
        for number in range(3):
            cv2.imwrite(str(self._paths[2] / f"{number}.png"), np.zeros((8, 8, 3), np.uint8))
        (self._paths[2] / "1.png").write_bytes(b"broken")

    def run(self) -> None:
        while not self._over.wait(5.0):
            with runtime.Stream(self._classifier, self._paths, fps=5) as stream:
                found = sum(1 for _ in stream)
            whole, cut, pictures = stream.stats()
            self.times += 1
            self.wrong += wrong_counts(stream.stats(), 0)
            if (whole.seen, whole.classified, pictures.classified, pictures.broken) != (
                50, 25, 2, 1) or not 0 < cut.seen < 50 or "cut off" not in cut.reason:  # fmt: skip
                self.wrong.append(f"files, {found} frames: {stream.stats()}")

    def stop(self) -> None:
        self._over.set()
        self.join()


def watch(
    stream: runtime.Stream, model: Model, ages: Ages, seconds: float
) -> tuple[Watcher, float]:
    """Sees the stream for so long; what was held meanwhile, and the longest pause of its first
    source, which has no faults."""
    end, first, last, pause = time.monotonic() + seconds, stream.names[0], 0.0, 0.0
    watcher = Watcher(stream)
    watcher.start()
    timer = threading.Timer(seconds, stream.stop)
    timer.start()
    model.runs.clear()
    for seen in stream:
        ages.see(seen, model.runs)
        if seen.source == first:
            now = time.monotonic()
            pause, last = max(pause, now - (last or now)), now
    watcher.stop()
    assert time.monotonic() >= end - 0.1, "the stream ended by itself"
    return watcher, max(pause, time.monotonic() - last)


def print_sources(stats: Sequence[SourceStats], ages: Ages) -> None:
    print("\nsource     seen classified dropped broken reconnects hangs | age p50   p99   max | "
          "over the limit by | since made p50   p99   max [ms]")  # fmt: skip
    for s in stats:
        age, over, made = np.array(ages.of.get(s.source, (0.0,) * 3)).reshape(-1, 3).T
        print(f"{s.source:8} {s.seen:6} {s.classified:10} {s.dropped:7} {s.broken:6} "
              f"{s.reconnects:10} {s.hangs:5} | {np.percentile(age, 50):7.1f} "
              f"{np.percentile(age, 99):5.0f} {age.max():5.0f} | {over.max():17.1f} | "
              f"{np.percentile(made, 50):14.1f} {np.percentile(made, 99):5.0f} {made.max():5.0f}"
        )  # fmt: skip


def growth(held: Sequence[tuple[float, float, float]]) -> list[str]:
    """Prints what was held, in the first and the last third; what has grown."""
    third = max(1, len(held) // 3)
    early, late = np.array(held[:third]), np.array(held[-third:])
    print("\n           first third: median  max   last third: median  max")
    grown = []
    allowed = {"threads": 1.0, "files": 2.0, "MiB": 10.0}
    for column, (name, more) in enumerate(allowed.items()):
        a, b = early[:, column], late[:, column]
        print(f"{name:8} {np.median(a):21.1f} {a.max():6.1f} {np.median(b):19.1f} {b.max():6.1f}")
        if np.median(b) > np.median(a) + more:
            grown.append(f"{name} grew from {np.median(a):.1f} to {np.median(b):.1f}")
    return grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--cameras", type=int, default=5)
    parser.add_argument("--allow", type=float, default=20, help="milliseconds")
    options = parser.parse_args()
    model = Model(runtime.load(options.bundle))
    print(model.classifier)
    cameras = {f"camera {n}": Camera() for n in range(options.cameras)}
    missing = why_absent()
    print(f"no RTSP: {missing}" if missing else "RTSP: GStreamer's server")
    rtsp = {} if missing else {RTSP: RtspServer()}
    faults = Faults(cameras, rtsp, model.make_slow)
    ages = Ages(faults, options.allow)
    servers: dict[str, Camera | RtspServer] = {**cameras, **rtsp}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for server in servers.values():
                server.start()
            sources = {name: server.url for name, server in servers.items()}
            files = Files(model.classifier, Path(folder))
            with runtime.Stream(model, sources, stall=STALL) as stream:
                files.start()
                faults.start()
                watcher, pause = watch(stream, model, ages, options.minutes * 60)
            faults.stop()
            files.stop()
    finally:
        for server in servers.values():
            server.kill()
    print_sources(stream.stats(), ages)
    total = sum(len(of) for of in ages.of.values()) // 3
    failed = [f"age: {len(ages.exceeded)} of {total} frames"] if ages.exceeded else []
    failed += [f"counts: {said}" for said in wrong_counts(stream.stats(), 0) + watcher.wrong]
    failed += [f"growth: {said}" for said in growth(watcher.held)]
    failed += [f"files: {said}" for said in files.wrong]
    if pause > 1 + ages.longest / 1e3:
        failed.append(f"steady: a pause of {pause:.2f} s without a fault")
    failed += [f"faults: {faults.error!r}"] if faults.error else []
    print(f"\n{faults.count} faults, {total} frames, files read {files.times} times, longest pause "
          f"of the camera without faults {pause:.2f} s, longest run {ages.longest:.0f} ms"
        )  # fmt: skip
    for said in failed[:20]:
        print(f"FAILED {said}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
