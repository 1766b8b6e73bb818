"""A classifier that runs for long: does it grow, does it stay even, does it stay whole.

    python benchmarks/endurance.py BUNDLE [--frames 200000] [--seconds 60] [--backend onnxruntime]

First one thread classifies so many frames of several sizes: memory, threads and open files are
noted after the first tenth and at the end, and the times' percentiles. Then eight threads classify
for so many seconds while the labels change 100 times a second: every result has to belong to one
set of labels, whole.
"""

import argparse
import os
import threading
import time
from pathlib import Path

import numpy as np
from rich.progress import track

import runtime
from runtime.classifier import Classifier
from runtime.conditions import process_memory

SIZES = [(48, 64), (240, 320), (33, 97), (480, 640)]
SETS = [("red", "green", "blue"), ("a cat", "a dog"), ("one", "two", "three", "four")]
THREADS, CHANGES = 8, 100  # changes a second


def held() -> tuple[float, int, int]:
    """MiB of memory, threads, open files of this process."""
    memory = process_memory()
    if memory is None:
        raise SystemExit("this system does not tell a process's memory")
    return memory[0], len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def endure(classifier: Classifier, number: int) -> None:
    """Prints growth and percentiles of one thread's frames."""
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
    times = np.empty(number)
    early = held()
    for n in track(range(number), "Classifying", transient=True):
        if n == number // 10:
            early = held()
        start = time.perf_counter()
        classifier.classify(frames[n % len(frames)])
        times[n] = time.perf_counter() - start
    late = held()
    print(f"{number} frames: memory {early[0]:.1f} -> {late[0]:.1f} MiB, threads {early[1]} -> "
          f"{late[1]}, open files {early[2]} -> {late[2]} (after a tenth, at the end)")  # fmt: skip
    for size, own in zip(SIZES, (times[n :: len(SIZES)] for n in range(len(SIZES))), strict=True):
        p50, p99 = 1e3 * np.percentile(own[len(own) // 10 :], (50, 99))
        print(f"{size[1]}x{size[0]}: p50 {p50:.3f} ms, p99 {p99:.3f} ms, {p99 / p50:.2f}x")


def share(classifier: Classifier, seconds: float) -> None:
    """Prints what eight threads saw while a ninth changed the labels."""
    whole = {frozenset(labels) for labels in SETS}
    frame = np.zeros((48, 64, 3), np.uint8)
    end, faults, counts = time.monotonic() + seconds, list[str](), [0] * THREADS

    def work(number: int) -> None:
        while time.monotonic() < end:
            try:
                found = classifier.classify(frame)
            except Exception as error:  # whatever it is, it is what is looked for
                faults.append(repr(error))
                return
            if frozenset(found.labels) not in whole or len(found.scores) != len(found.labels):
                faults.append(f"labels {found.labels} with {len(found.scores)} scores")
            counts[number] += 1

    threads = [threading.Thread(target=work, args=(n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    changes = 0
    while time.monotonic() < end:
        classifier.set_labels(SETS[changes % len(SETS)])
        changes += 1
        time.sleep(max(0.0, end - seconds + changes / CHANGES - time.monotonic()))
    for thread in threads:
        thread.join(timeout=30)
    stuck = sum(thread.is_alive() for thread in threads)
    print(f"{THREADS} threads, {seconds:.0f} s: {sum(counts)} results, {changes} sets of labels, "
          f"{len(faults)} faults, {stuck} threads stuck")  # fmt: skip
    for fault in faults[:5]:
        print(" ", fault)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--frames", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--precision", default="fp32")
    options = parser.parse_args()
    classifier = runtime.load(
        options.bundle, SETS[0], backend=options.backend, precision=options.precision
    )
    print(classifier)
    endure(classifier, options.frames)
    share(classifier, options.seconds)


if __name__ == "__main__":
    main()
