"""Camera frames to the image encoder's input: how fast, and how like the model's own transform.

    python benchmarks/preprocess.py [--size 224] [--fit crop] [--rounds 30]
    python benchmarks/preprocess.py --data FOLDER [--bundle FOLDER]

The first gives every way the same BGR frame, in turn, round by round. The others are the model's
transform (open_clip's, to a float tensor), Pillow on the cut-out alone, Pillow after reducing it
(`reducing_gap=2`), and OpenCV's INTER_AREA. With --data it measures exactness instead: every
picture and every frame of the videos in the folder, as it is and scaled to 720p, 1080p and 4K,
against the transform; with --bundle also what the bundle's encoder makes of both, and at its size.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

import runtime
from runtime.classifier import Classifier
from runtime.frames import Color, Frame
from runtime.manifest import ImageSpec
from runtime.preprocess import preprocess, resized_size
from runtime.sources import find_files, frames_of
from training import torchvision_ops as torchvision_ops

# isort: split
from open_clip.transform import PreprocessCfg, image_transform_v2

FRAMES = {"720p": (1280, 720), "1080p": (1920, 1080), "4K": (3840, 2160)}
MODES = {"crop": "shortest", "squash": "squash", "pad": "longest"}
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def camera_frame(width: int, height: int) -> Frame:
    """A photo-like BGR frame: noise of low frequency, and a little of high."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.asarray(cv2.add(smooth, rng.integers(0, 12, smooth.shape, np.uint8)), np.uint8)


def own_transform(spec: ImageSpec) -> Callable[[Image.Image], Any]:
    """open_clip's transform of a picture for a model."""
    config = PreprocessCfg(
        size=(spec.height, spec.width),
        mean=spec.mean,
        std=spec.std,
        interpolation=spec.interpolation,
        resize_mode=MODES[spec.fit],
        fill_color=spec.fill,
    )
    return image_transform_v2(config, is_train=False)  # type: ignore[no-any-return]


def cut_out(spec: ImageSpec, width: int, height: int) -> tuple[float, float, float, float]:
    """The part of a frame that the model sees: left, top, right, bottom."""
    wide, high = resized_size(width, height, spec)
    x, y = (
        max(0, wide - spec.width) / 2 * width / wide,
        max(0, high - spec.height) / 2 * height / high,
    )
    return x, y, width - x, height - y


def ways(frame: Frame, spec: ImageSpec) -> dict[str, Callable[[], object]]:
    """What is timed, from a BGR frame on."""
    transform, filtering = own_transform(spec), FILTERS[spec.interpolation]
    box = cut_out(spec, frame.shape[1], frame.shape[0])
    left, top, right, bottom = map(round, box)
    size = spec.width, spec.height

    def theirs() -> object:
        return transform(Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)))

    def pillow(gap: float | None) -> object:
        image = Image.fromarray(frame)
        return np.asarray(image.resize(size, filtering, box, gap))[..., ::-1].copy()

    def area() -> object:
        small = cv2.resize(frame[top:bottom, left:right], size, interpolation=cv2.INTER_AREA)
        return cv2.cvtColor(small, cv2.COLOR_BGR2RGB)

    return {
        "the model's transform": theirs,
        "runtime.preprocess": lambda: preprocess(frame, spec),
        "Pillow, cut-out": lambda: pillow(None),
        "Pillow, cut-out, gap 2": lambda: pillow(2.0),
        "OpenCV, INTER_AREA": area,
    }


def milliseconds(call: Callable[[], object]) -> float:
    for _ in range(2):  # caches were emptied by the one before
        call()
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def speed(spec: ImageSpec, rounds: int) -> None:
    # the transform's last steps, on a small tensor: a second thread gains nothing there, and
    # would go on to spin on a core while the next one is timed
    torch.set_num_threads(1)
    print(f"{spec.width} px, {spec.interpolation}, {spec.fit}, {os.cpu_count()} cores: median ms")
    for name, (width, height) in FRAMES.items():
        contestants = ways(camera_frame(width, height), spec)
        times: dict[str, list[float]] = {way: [] for way in contestants}
        for _ in range(rounds):
            for way, call in contestants.items():
                times[way].append(milliseconds(call))
        base = np.median(times["the model's transform"])
        for way, found in times.items():
            print(f"{name:6s} {way:24s} {np.median(found):8.2f} {base / np.median(found):7.1f}x")


def real_frames(folder: Path) -> Iterator[tuple[Frame, Color]]:
    for path in find_files([folder]):
        for _, frame, color in frames_of(path):
            yield frame, color


def scaled(frame: Frame, to: tuple[int, int] | None) -> Frame:
    """A frame whose short side is that of a camera's."""
    if to is None:
        return frame
    ratio = min(to) / min(frame.shape[:2])
    how = cv2.INTER_CUBIC if ratio > 1 else cv2.INTER_AREA
    return np.asarray(cv2.resize(frame, None, fx=ratio, fy=ratio, interpolation=how), np.uint8)


def both(frame: Frame, color: Color, spec: ImageSpec) -> tuple[Frame, Frame]:
    """Our pixels and those of the model's own transform, uint8."""
    rgb = frame if color == "rgb" else cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    transform = own_transform(spec)
    steps = [step for step in transform.transforms if "ToTensor" not in repr(step)]  # type: ignore[attr-defined]
    image: Any = Image.fromarray(rgb)
    for step in steps[:-1]:  # the last one normalises
        image = step(image)
    return preprocess(frame, spec, color), np.asarray(image, dtype=np.uint8)


def exactness(folder: Path, spec: ImageSpec, classifier: Classifier | None) -> None:
    print(f"{spec.width} px, {spec.interpolation}, {spec.fit}: against the model's own transform")
    for name, to in {"as it is": None, **FRAMES}.items():
        totals: NDArray[np.int64] = np.zeros(256, dtype=np.int64)
        worst, rows = 0.0, []
        for frame, color in real_frames(folder):
            ours, theirs = both(scaled(frame, to), color, spec)
            counts = np.bincount(np.abs(ours.astype(int) - theirs).ravel(), minlength=256)
            totals += counts
            worst = max(worst, float(counts @ np.arange(256) / counts.sum()))
            if classifier:
                rows.append([classifier._image(pixels[None])[0] for pixels in (ours, theirs)])
        share = totals / totals.sum()
        print(
            f"{name:8s} mean {share @ np.arange(256):.4f} (worst frame {worst:.3f}), "
            f"beyond 1: {share[2:].sum():.4%}, beyond 2: {share[3:].sum():.5%}, "
            f"most {np.flatnonzero(totals)[-1]}",
            embeddings(np.asarray(rows), classifier) if classifier else "",
        )


def embeddings(rows: NDArray[np.float32], classifier: Classifier) -> str:
    """How like the embeddings [N, 2, D] of both are: the 1 % quantile of the cosine, and how often
    they are taken for the same label."""
    ours, theirs = rows[:, 0], rows[:, 1]
    cosine = np.quantile((ours * theirs).sum(axis=1), 0.01)
    bank = classifier.require_bank().embeddings
    same = ((ours @ bank.T).argmax(axis=1) == (theirs @ bank.T).argmax(axis=1)).mean()
    return f"{len(rows)} frames: cosine p1 {cosine:.5f}, same top-1 {same:.2%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--fit", choices=sorted(MODES), default="crop")
    parser.add_argument("--interpolation", choices=sorted(FILTERS), default="bicubic")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--bundle", type=Path)
    options = parser.parse_args()
    spec = ImageSpec(
        height=options.size,
        width=options.size,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation=options.interpolation,
        fit=options.fit,
    )
    if options.data is None:
        speed(spec, options.rounds)
        return
    exactness(options.data, spec, None)
    if options.bundle:
        classifier = runtime.load(options.bundle)
        exactness(options.data, classifier.bundle.manifest.image, classifier)


if __name__ == "__main__":
    main()
