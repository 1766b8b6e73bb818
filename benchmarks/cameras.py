"""Several real cameras on one classifier: are all served, alike, and none of them late?

    python benchmarks/cameras.py BUNDLE [--cameras 4] [--fps 15] [--seconds 30]

Each camera is a process that sends MJPEG over HTTP, 640 x 360 pixels that show the time; their
own work counts for this machine too. Exits with 1 where a camera is served less than 95 % of its
rate, over 10 % less than another, or 1 % of the frames are older than two frame times and a run.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
from mjpeg_camera import BITS, Camera

import runtime
from runtime.frames import Frame


def clock_age(frame: Frame) -> float:
    """Milliseconds since a camera made its picture, by the clock that it shows."""
    height, width = frame.shape[:2]
    columns = [round((bit + 0.5) * width / BITS) for bit in range(BITS)]
    shown = sum(int(frame[height // 4, c, 1] > 128) << bit for bit, c in enumerate(columns))
    return (time.monotonic() * 1000 - shown) % (1 << BITS)


def run(stream: runtime.Stream, seconds: float, fps: float) -> bool:
    """Prints what became of each camera's frames in so many seconds; whether all is well."""
    ages: dict[str, list[tuple[float, float, float]]] = {name: [] for name in stream.names}
    settled = time.monotonic() + 3
    for _ in stream:
        if time.monotonic() > settled:
            break
    before, cpu, start = stream.stats(), time.process_time(), time.monotonic()
    for seen in stream:
        took = sum(seen.prediction.timings.values())
        ages[seen.source].append((seen.age_ms, clock_age(seen.frame), took))
        if time.monotonic() - start > seconds:
            break
    wall, cpu = time.monotonic() - start, time.process_time() - cpu
    print("camera                                    seen  served  dropped     /s  age p50    p99"
          "    max  since made p99  [ms]")  # fmt: skip
    for early, late in zip(before, stream.stats(), strict=True):
        age, made, _ = np.array(ages[late.source]).T
        print(f"{late.source:40} {late.seen - early.seen:5} {len(age):7} "
              f"{late.dropped - early.dropped:8} {len(age) / wall:6.2f} "
              f"{np.percentile(age, 50):8.1f} {np.percentile(age, 99):6.1f} {age.max():6.1f} "
              f"{np.percentile(made, 99):15.1f}")  # fmt: skip
    counts = [len(of) for of in ages.values()]
    every = np.concatenate([np.array(of) for of in ages.values()])
    old = float(np.mean(every[:, 0] > 2e3 / fps + every[:, 2]))
    unfair = 1 - min(counts) / max(counts)
    print(f"served least {min(counts) / wall / fps:.1%} of its rate, unfair {unfair:.1%}, "
          f"{old:.2%} older than two frame times and a run (median {np.median(every[:, 2]):.1f} "
          f"ms); this process took {cpu / wall:.2f} of {os.cpu_count()} cores")  # fmt: skip
    return min(counts) / wall / fps > 0.95 and unfair <= 0.1 and old <= 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--cameras", type=int, default=4)
    parser.add_argument("--fps", type=float, default=15)
    parser.add_argument("--seconds", type=float, default=30)
    options = parser.parse_args()
    classifier = runtime.load(options.bundle)
    print(classifier)
    cameras = [Camera(options.fps) for _ in range(options.cameras)]
    try:
        for camera in cameras:
            camera.start()
        with runtime.Stream(classifier, [camera.url for camera in cameras]) as stream:
            good = run(stream, options.seconds, options.fps)
    finally:
        for camera in cameras:
            camera.kill()
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
