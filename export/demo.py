"""The whole road on real handwriting, in three minutes on two cores, and a tutorial to read.

Make frames, train a small CLIP from nothing, export it, hold the bundle against its rules, and
name frames that it has never seen, a fifth of them of a colour and digit that it has never seen
together.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import runtime
from calibration.contact_sheet import Example, contact_sheet
from calibration.pairs import read_pairs
from runtime import manifest
from runtime.errors import DataError, GateFailed
from runtime.folders import check_target, new_folder
from runtime.frames import read_picture
from training import digits
from training.digits import DigitFrames
from training.model import CONFIG
from training.options import TrainOptions
from training.trainer import train

from .bundle import ExportOptions, export_bundle
from .verify import verify

DIGITS = "digits.json"  # says of a folder that its pictures are the demo's
PICTURE = "demo.png"

FRAMES, TESTS = 10_000, 1200
# A strong weight decay: a large network would rather learn "red is never a two" by heart.
EPOCHS, BATCH, RATE, DECAY = 18, 256, 3e-3, 3.0


@dataclass(frozen=True)
class Named:
    """One test frame and what the bundle took it for."""

    example: Example
    seen: bool
    ms: float

    @property
    def right(self) -> bool:
        """Whether the best of all 60 labels is the true one."""
        return self.example.prediction.label == self.example.label


def run(out: Path, seed: int = 0, force: bool = False, as_json: bool = False) -> dict[str, Any]:
    """Runs the demo in the folder `out`; prints a table (or JSON) and writes `out/demo.png`.

    Raises GateFailed where the bundle does not hold to its format's rules.
    """
    for folder_name, marker in (
        ("data", DIGITS),
        ("checkpoint", CONFIG),
        ("bundle", manifest.NAME),
    ):
        check_target(out / folder_name, marker, force)
    if (out / PICTURE).exists() and not force:
        raise DataError(f"{out / PICTURE} exists already; name another folder, or add --force")
    start = time.perf_counter()
    console = Console(stderr=True, quiet=as_json)
    with Progress(console=console, transient=True) as progress:
        with new_folder(out / "data", DIGITS, force) as folder:
            made = digits.make(folder, FRAMES, TESTS, seed, progress)
            (folder / DIGITS).write_text(json.dumps({"seed": seed}) + "\n")
    with tempfile.TemporaryDirectory(prefix=".cache-", dir=out) as cache:
        train(_options(out, Path(cache), seed, force), quiet=as_json)
    bundle = out / "bundle"
    exported = ExportOptions(
        checkpoint=str(out / "checkpoint"),
        bundle=bundle,
        labels=digits.LABELS,
        templates=digits.TEMPLATES,
        force=force,
    )
    export_bundle(exported, quiet=as_json)
    faults = verify(bundle)
    if faults:
        raise GateFailed(f"{bundle} does not hold to the rules: {'; '.join(faults)}")
    named = name_frames(bundle, out / "data" / "test.csv", made)
    figures = summary(bundle, named) | {"seed": seed}
    figures["seconds"] = round(time.perf_counter() - start, 1)
    draw(named, out / PICTURE, figures)
    print(json.dumps(figures)) if as_json else show(figures, out)
    return figures


def _options(out: Path, cache: Path, seed: int, force: bool) -> TrainOptions:
    return TrainOptions(
        data=str(out / "data" / "train.csv"),
        val=out / "data" / "test.csv",
        out=out / "checkpoint",
        model="nano",
        templates=digits.TEMPLATES,
        epochs=EPOCHS,
        batch_size=BATCH,
        lr=RATE,
        weight_decay=DECAY,
        crop=1.0,  # the digits reach the borders
        cache=cache,
        seed=seed,
        force=force,
    )


def name_frames(bundle: Path, test: Path, made: DigitFrames) -> list[Named]:
    """Names every test frame as an application would: one by one, `runtime.classify(frame)`."""
    runtime.load(bundle, backend="onnxruntime", precision="fp32")  # the same on every machine
    pairs = read_pairs(test, digits.TEMPLATES)
    named = []
    for path, target in zip(pairs.files, pairs.targets or (), strict=True):
        label = pairs.classes[target]
        rgb = read_picture(path)
        frame = np.ascontiguousarray(rgb[..., ::-1])  # BGR, as a camera read by OpenCV gives it
        begin = time.perf_counter()
        prediction = runtime.classify(frame)
        ms = (time.perf_counter() - begin) * 1e3
        seen = label in made.seen
        example = Example(rgb, prediction, label, "" if seen else "never seen")
        named.append(Named(example, seen, ms))
    return named


def summary(bundle: Path, named: list[Named]) -> dict[str, Any]:
    """The demo's figures: accuracy on seen and never-seen pairs, parity, speed, sizes."""
    report = json.loads((bundle / "report" / "report.json").read_text(encoding="utf-8"))
    sizes = {path.name: path.stat().st_size for path in sorted(bundle.glob("*.onnx"))}
    return {
        "top1_seen": float(np.mean([n.right for n in named if n.seen])),
        "top1_unseen": float(np.mean([n.right for n in named if not n.seen])),
        "parity_cosine_min": min(row["cosine_min"] for row in report["parity"]),
        "ms_per_frame": float(np.median([n.ms for n in named])),
        "bytes": sizes,
    }


def draw(named: list[Named], path: Path, figures: dict[str, Any]) -> None:
    """Writes the contact sheet: 16 frames of seen pairs, 16 of never-seen ones, at random."""
    rng = np.random.default_rng(figures["seed"])
    chosen: list[Example] = []
    for seen in (True, False):
        group = [n.example for n in named if n.seen == seen]
        chosen += [group[i] for i in rng.choice(len(group), 16, replace=False)]
    title = (
        f"60 labels; {figures['top1_seen']:.1%} right on pairs of colour and digit seen in "
        f"training, {figures['top1_unseen']:.1%} on pairs never seen"
    )
    contact_sheet(chosen, title).save(path)


def show(figures: dict[str, Any], out: Path) -> None:
    """Prints the figures as a table."""
    table = Table(title="From nothing to a bundle, judged on frames never seen", show_header=False)
    table.add_row("top-1 of 60 labels, pairs seen in training", f"{figures['top1_seen']:.1%}")
    table.add_row("top-1 of 60 labels, pairs never seen", f"{figures['top1_unseen']:.1%}")
    table.add_row("parity with PyTorch, smallest cosine", f"{figures['parity_cosine_min']:.7f}")
    table.add_row("runtime.classify(frame), median", f"{figures['ms_per_frame']:.2f} ms")
    for name, size in figures["bytes"].items():
        table.add_row(name, f"{size / 2**20:.1f} MiB")
    table.add_row("seconds in all", f"{figures['seconds']:.0f}")
    Console().print(table)
    print(f"Look at {out / 'demo.png'}; classify with {out / 'bundle'}")
