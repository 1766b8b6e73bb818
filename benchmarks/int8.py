"""INT8 of one image encoder by several recipes, on the same frames and by the same measure.

    python benchmarks/int8.py checkpoint/ --calibrate train/ --judge test/ --labels "a cat,a dog"
    python benchmarks/int8.py checkpoint/ --calibrate train/ --judge test/ --hard 100
    python benchmarks/int8.py --random ViT-B-32 --openvino

Ours against onnxruntime.quantization and, where it is installed, nvidia-modelopt (recipes.py); the
gate is that of `edgeclip export`. `--hard` plants outliers first (outliers.py). `--random` measures
speed and size alone, on noise. `--openvino` adds fp32 and ours in OpenVINO. Latencies are of one
frame, in turns in one run: "of best" against the fastest int8 in ONNX Runtime, "x fp32" how many
times as fast as fp32 there.
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from outliers import plant
from recipes import (
    INSTALL_MODELOPT,
    Batches,
    has_modelopt,
    int8_weights,
    modelopt_recipes,
    static_recipes,
)
from rich.progress import Progress

from calibration.activations import observe
from calibration.gate import Cost, Encode, Judge, Limits, faults
from calibration.layers import find_layers
from calibration.precisions import BATCH, int8_candidate
from calibration.quantize import folded, quantize
from calibration.ranges import choose_ranges
from calibration.sampling import sample
from calibration.sensitivity import encoder
from export.to_onnx import write_onnx
from export.towers import ImageEncoder
from runtime.label_sets import read_labels
from runtime.prompts import build_bank
from runtime.tokenizer import Tokenizer
from training.evaluate import text_encoder
from training.model import ClipModel, create
from training.text import text_side

TURNS, RUNS = 15, 6  # of each, and in each
NOISE = 16  # frames of --random


@dataclass(frozen=True, eq=False)
class Way:
    """One form of the encoder, and what runs it."""

    name: str
    model: ModelProto
    encode: Encode
    int8_in_ort: bool = True


def write(clip: ClipModel, hard: float | None, source: Path) -> ModelProto:
    """The float encoder, written to `source`."""
    spec = clip.image
    example = torch.zeros(2, spec.height, spec.width, 3, dtype=torch.uint8)
    write_onnx(ImageEncoder(clip), example, "frames", source)
    if hard is not None:
        try:
            onnx.save(plant(onnx.load(source), hard), source)
        except ValueError as error:
            sys.exit(f"--hard: {error}")
    return onnx.load(source)


def drawn(
    clip: ClipModel, chosen: argparse.Namespace, run: Encode, folder: Path
) -> tuple[Batches, Judge]:
    """The frames to calibrate on, and the judge on others."""
    seen = sample([chosen.calibrate], clip.image, chosen.frames, 0, folder / "calibrate")
    judged = sample([chosen.judge], clip.image, 2 * chosen.frames, 1, folder / "judge")
    labels = read_labels(chosen.labels) if chosen.labels else judged.classes
    content, text = text_side(clip, None, clip.templates)
    embed = text_encoder(clip, Tokenizer(content, text))
    bank = build_bank(labels, clip.templates, embed, "") if labels else None
    targets = None
    if judged.targets is not None and bank and bank.labels == judged.classes:
        targets = np.array(judged.targets)
    reference = np.concatenate([run(batch) for batch in judged.batches(BATCH)])
    print(f"{clip.name}: {len(seen)} frames to calibrate, {len(judged)} to judge")
    return lambda: seen.batches(BATCH), Judge(
        lambda: judged.batches(BATCH), reference, bank.embeddings if bank else None, targets
    )


def noise(clip: ClipModel) -> Batches:
    """Random frames, which say nothing of quality."""
    size = NOISE, clip.image.height, clip.image.width, 3
    frames = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    print(f"{clip.name}: random weights, speed and size alone")
    return lambda: (frames[at : at + BATCH] for at in range(0, NOISE, BATCH))


def gated(model: ModelProto, seen: Batches, judge: Judge) -> ModelProto:
    """Ours, as an export makes it: with layers in float where the gate asks for them."""
    with Progress(transient=True) as progress:
        found = int8_candidate(model, seen, judge, Limits(), progress)
    kept = "holds the gate" if found.accepted else "; ".join(found.faults)
    print(f"edgeclip: {len(found.float_layers)} layers in float, {kept}")
    return found.model


def all_int8(model: ModelProto, seen: Batches) -> ModelProto:
    """Ours with every layer in int8."""
    layers = find_layers(model)
    ranges = choose_ranges(model, layers, observe(model, layers, seen()))
    return quantize(folded(model, layers, ranges), layers, ranges)


def quantised(
    source: Path, model: ModelProto, seen: Batches, judge: Judge | None
) -> dict[str, ModelProto]:
    """The encoder as int8 by every recipe that there is."""
    ours = all_int8(model, seen) if judge is None else gated(model, seen, judge)
    found = {"edgeclip": ours, **static_recipes(source, seen)}
    if has_modelopt():
        return found | modelopt_recipes(source, seen)
    print(f"nvidia-modelopt is not installed: {INSTALL_MODELOPT}")
    return found


def ways(models: dict[str, ModelProto], openvino: bool) -> list[Way]:
    """What is compared: every form in ONNX Runtime, fp32 and ours in OpenVINO as well."""
    found = [Way(name, own, encoder(own), name != "fp32") for name, own in models.items()]
    if not openvino:
        return found
    if importlib.util.find_spec("openvino") is None:
        print("OpenVINO is not installed: pip install openvino")
        return found
    from in_openvino import openvino_encoder

    for name in ("fp32", "edgeclip"):
        own = models[name]
        found.append(Way(f"{name} in OpenVINO", own, openvino_encoder(own), False))
    return found


def milliseconds(compared: list[Way], frame: NDArray[np.uint8]) -> list[float]:
    """The latency of each, in turns: the fastest run of a turn, the median over the turns.

    Of a turn the fastest, for threads of the one before may still be busy waiting, and other
    programs may take the cores.
    """
    seconds: list[list[float]] = [[] for _ in compared]
    for _ in range(TURNS):
        for way, taken in zip(compared, seconds, strict=True):
            taken.append(min(timed(way, frame) for _ in range(RUNS)))
    return [1e3 * statistics.median(taken) for taken in seconds]


def timed(way: Way, frame: NDArray[np.uint8]) -> float:
    begin = time.perf_counter()
    way.encode(frame)
    return time.perf_counter() - begin


def row(way: Way, cost: Cost | None, ms: float, fp32: float, best: float) -> str:
    """A line of the table; what was not measured is left empty."""
    quality = [""] * 4
    if cost is not None:
        quality = [
            f"{cost.cosine_p1:.5f}",
            "" if cost.agreement is None else f"{cost.agreement:.1%}",
            "" if cost.top1 is None else f"{cost.top1:.1%}",
            "fails" if faults(cost, Limits()) else "holds",
        ]
    weights = f"{int8_weights(way.model):.1%}"
    of_best = f"{ms / best:.2f}" if way.int8_in_ort else ""
    figures = [*quality, weights, f"{way.model.ByteSize() / 2**20:.1f}", f"{ms:.2f}", of_best]
    return line([way.name, *figures, f"{fp32 / ms:.2f}"])


def line(cells: list[str]) -> str:
    widths = 10, 8, 7, 6, 8, 7, 8, 8, 8
    return f"{cells[0]:24}" + "".join(f"{c:>{w}}" for c, w in zip(cells[1:], widths, strict=True))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--random", metavar="MODEL", help="random weights, noise: speed and size")
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--judge", type=Path)
    parser.add_argument("--labels")
    parser.add_argument("--frames", type=int, default=256)
    parser.add_argument("--hard", type=float, metavar="FACTOR", help="plant outliers so large")
    parser.add_argument("--openvino", action="store_true", help="time OpenVINO as well")
    chosen = parser.parse_args()
    needed = (chosen.checkpoint, chosen.calibrate, chosen.judge)
    if not chosen.random and None in needed:
        parser.error("give a checkpoint, --calibrate and --judge, or --random MODEL")
    return chosen


def main() -> None:
    chosen = parse()
    clip = create(chosen.random or chosen.checkpoint)
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "image.onnx"
        model = write(clip, chosen.hard, source)
        if chosen.random:
            seen, judge = noise(clip), None
        else:
            seen, judge = drawn(clip, chosen, encoder(model), source.parent)
        models = {"fp32": model, **quantised(source, model, seen, judge)}
        compared = ways(models, chosen.openvino)
        costs = [judge.cost(way.encode) if judge else None for way in compared]
        ms = milliseconds(compared, next(seen())[:1])
    best = min(own for way, own in zip(compared, ms, strict=True) if way.int8_in_ort)
    heads = ["cosine p1", "labels", "top-1", "gate", "int8", "MiB", "ms", "of best", "x fp32"]
    print(line(["", *heads]))
    for way, cost, own in zip(compared, costs, ms, strict=True):
        print(row(way, cost, own, ms[0], best))


if __name__ == "__main__":
    main()
