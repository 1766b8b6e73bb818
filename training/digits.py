"""The demo's data: small camera-like frames of handwritten digits, with captions.

Real scans (scikit-learn's `load_digits`, 1,797 digits of 8 x 8 pixels) are coloured, put at a
random place and size on a dark, noisy background, and blurred a little, as a cheap camera would.
Some of the 60 pairs of colour and digit never appear in training: a model that names them has
learned what "red" and "seven" mean, not a list of 60 classes.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from rich.progress import Progress
from sklearn.datasets import load_digits

COLORS = {
    "red": (240, 100, 90),
    "green": (100, 220, 110),
    "blue": (105, 145, 250),
    "yellow": (240, 220, 90),
    "purple": (195, 110, 230),
    "white": (235, 235, 235),
}
DIGITS = "zero one two three four five six seven eight nine".split()
LABELS = tuple(f"{color} {digit}" for color in COLORS for digit in DIGITS)
TEMPLATES = ("a photo of a {}", "a {}", "a camera frame with a {} in it", "there is a {} here")
SIZE = 64


@dataclass(frozen=True)
class DigitFrames:
    """Where `make` wrote its files: two CSVs of captions and labels, and the labels by split."""

    train: Path
    test: Path
    seen: tuple[str, ...]
    unseen: tuple[str, ...]


def make(folder: Path, frames: int, tests: int, seed: int, progress: Progress) -> DigitFrames:
    """Writes `folder/frames/*.png`, `train.csv` (file,caption) and `test.csv` (file,label).

    `frames` pictures to train on, of the seen pairs; `tests` of all 60 pairs, with scans that
    are not among those trained on.
    """
    rng = np.random.default_rng(seed)
    unseen = hold_out(rng)
    seen = tuple(label for label in LABELS if label not in unseen)
    train_scans, test_scans = split_scans(rng)
    (folder / "frames").mkdir(parents=True)
    task = progress.add_task("Making frames", total=frames + tests)
    with (folder / "train.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "caption"])
        for name, label in _write(folder, "train", seen, train_scans, frames, rng):
            writer.writerows([name, caption] for caption in captions(label))
            progress.advance(task)
    with (folder / "test.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "label"])
        for name, label in _write(folder, "test", LABELS, test_scans, tests, rng):
            writer.writerow([name, label])
            progress.advance(task)
    progress.remove_task(task)
    return DigitFrames(folder / "train.csv", folder / "test.csv", seen, unseen)


def hold_out(rng: np.random.Generator) -> tuple[str, ...]:
    """A fifth of the pairs: two digits of each colour; no digit loses more than two colours."""
    digits = rng.permutation(np.arange(12) % 10)
    while any(digits[i] == digits[i + 1] for i in range(0, 12, 2)):
        digits = rng.permutation(digits)
    return tuple(
        f"{color} {DIGITS[digit]}"
        for i, color in enumerate(COLORS)
        for digit in sorted(digits[2 * i : 2 * i + 2])
    )


def captions(label: str) -> list[str]:
    """Captions that are true of a frame: half state colour and digit, half only the digit.

    Those of the digit alone tie all colours of a digit together, which is what makes a pair that
    was never shown readable.
    """
    facts = (label, label.split()[1])
    return [template.replace("{}", fact) for fact in facts for template in TEMPLATES]


Scans = dict[str, NDArray[np.float32]]


def split_scans(rng: np.random.Generator, share: float = 0.25) -> tuple[Scans, Scans]:
    """The scans [N, 8, 8] in 0..1 of each digit, to train and to test: none is in both."""
    scans, targets = load_digits(return_X_y=True)
    scans = (scans.reshape(-1, 8, 8) / 16).astype(np.float32)
    train, test = {}, {}
    for value, digit in enumerate(DIGITS):
        own = rng.permutation(scans[targets == value])
        cut = round(len(own) * share)
        test[digit], train[digit] = own[:cut], own[cut:]
    return train, test


def _write(
    folder: Path,
    split: str,
    labels: tuple[str, ...],
    scans: Scans,
    count: int,
    rng: np.random.Generator,
) -> Iterator[tuple[str, str]]:
    for index in range(count):
        label = labels[index % len(labels)]
        color, digit = label.split()
        scan = scans[digit][rng.integers(len(scans[digit]))]
        name = f"frames/{split}-{index:05d}.png"
        compose(scan, COLORS[color], rng).save(folder / name, compress_level=1)
        yield name, label


def compose(
    scan: NDArray[np.float32], color: tuple[int, int, int], rng: np.random.Generator
) -> Image.Image:
    """One frame, RGB 64 x 64: the scan in a colour, at a random place, size, angle and light."""
    side = int(rng.integers(SIZE * 5 // 8, SIZE + 1))
    digit = Image.fromarray((np.pad(scan, 1) * 255).astype(np.uint8))  # a margin to bend into
    digit = bend(digit.resize((side, side), Image.Resampling.BICUBIC), rng)
    mask = Image.new("L", (SIZE, SIZE))
    left, top = (int(v) for v in rng.integers(0, SIZE - side + 1, 2))
    mask.paste(digit, (left, top))
    alpha = np.asarray(mask.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.8))), np.float32) / 255
    dark = rng.uniform(5, 60, 3)
    tint = np.array(color) * rng.uniform(0.75, 1.0) + rng.normal(0, 8, 3)
    noise = rng.normal(0, rng.uniform(2, 10), (SIZE, SIZE, 3))
    frame = dark + alpha[..., None] * (tint - dark) + noise
    return Image.fromarray(frame.clip(0, 255).astype(np.uint8))


def bend(digit: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Turns, slants and stretches a picture a little about its centre, as another hand would."""
    angle, slant = np.deg2rad(rng.uniform(-15, 15)), rng.uniform(-0.15, 0.15)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[1, slant], [0, 1]]) @ np.diag(rng.uniform(0.88, 1.12, 2))
    centre = np.full(2, (digit.width - 1) / 2)
    rows = np.column_stack([matrix, centre - matrix @ centre])
    return digit.transform(
        digit.size, Image.Transform.AFFINE, tuple(rows.ravel().tolist()), Image.Resampling.BICUBIC
    )
