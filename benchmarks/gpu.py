"""An image encoder on one NVIDIA GPU: TensorRT engines against ONNX Runtime and PyTorch, in turns.

    python benchmarks/gpu.py BUNDLE [--rounds 200] [--frames 20000]

Engines are built of every precision, in a copy of the bundle, for batches of 64 and of 1. PyTorch
runs a model of the same architecture in fp16, with random weights where BUNDLE's name is not a
checkpoint: for speed alone. What is not installed is named and left out. --frames runs as many
through one engine and shows how memory grows.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from in_torch import Encode, Torch
from numpy.typing import NDArray

import runtime
from export.build import EngineOptions, build_engines
from export.engine import BuildOptions
from runtime.backends import image_border
from runtime.bundle import Bundle
from runtime.cuda import open_cuda
from runtime.engine_file import find_engine
from runtime.errors import EdgeClipError
from runtime.trt import TrtEncoder, platform

Batch = NDArray[np.uint8]
WARM, MIB = 20, 1 << 20


def engines(folder: Path, batch: int, external_tactics: bool) -> dict[str, TrtEncoder]:
    """An engine of each precision that builds here, for one size of batch."""
    found, bundle = {}, Bundle(folder)
    build = BuildOptions(batches=(batch, batch, batch), external_tactics=external_tactics)
    for name in bundle.manifest.precisions:
        options = EngineOptions(
            bundle=folder, precision=name, text=False, build=build, min_cosine=-1, min_agreement=0
        )
        try:
            (info,) = build_engines(options)
            plan, _ = find_engine(bundle, "image", name, platform(open_cuda()))
            found[f"TensorRT {name}"] = TrtEncoder(plan, info, image_border(bundle.manifest))
        except EdgeClipError as error:
            print(f"TensorRT {name}: left out, {error}")
    return found


def onnxruntime_ways(folder: Path) -> dict[str, Encode]:
    """ONNX Runtime on CUDA, in fp32 and fp16."""
    found: dict[str, Encode] = {}
    for name in ("fp32", "fp16"):
        try:
            classifier = runtime.load(folder, backend="ort-cuda", precision=name)
            found[f"ORT-CUDA {name}"] = classifier._image
        except EdgeClipError as error:
            print(f"ORT-CUDA {name}: left out, {error}")
    return found


def measure(ways: dict[str, Encode], batch: Batch, rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of every way, in turns: by the clock and, of engines, by the GPU's events."""
    for encode in ways.values():
        for _ in range(WARM):
            encode(batch)
    times: dict[str, dict[str, Any]] = {name: {"clock": [], "events": []} for name in ways}
    for _ in range(rounds):
        for name, encode in ways.items():
            start = time.perf_counter()
            encode(batch)
            times[name]["clock"].append(1e3 * (time.perf_counter() - start))
            if isinstance(encode, TrtEncoder):
                times[name]["events"].append(encode.timed(batch)["engine"])
    return times


def quantiles(values: list[float]) -> str:
    return "p50 {:8.3f}  p99 {:8.3f}".format(*np.quantile(values, (0.5, 0.99)))


def show(times: dict[str, dict[str, Any]], batch: int) -> None:
    print(f"batch {batch}, ms by the clock | of the engine alone, by events")
    for name, found in times.items():
        events = f" | {quantiles(found['events'])}" if found["events"] else ""
        print(f"  {name:24s} {quantiles(found['clock'])}{events}")


def share_of_peak(torch: Torch, times: dict[str, dict[str, Any]], batch: int) -> None:
    peak, work = torch.peak(), torch.operations() * batch
    print(f"fp16 matrix peak, measured: {peak / 1e12:.1f} TFLOP/s; batch {batch} reaches of it")
    for name, found in times.items():
        ms = float(np.median(found["events"] or found["clock"]))
        print(f"  {name:24s} {work / (ms / 1e3) / peak:.1%}")


def one_frame(classifier: runtime.Classifier, rounds: int) -> None:
    """A 1080p frame to a label, against the sum of its stages."""
    if classifier.bank is None:
        classifier.set_labels([f"label {n}" for n in range(100)])
    frame = np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), dtype=np.uint8)
    whole: list[float] = []
    stages: dict[str, list[float]] = {}
    for i in range(WARM + rounds):
        start = time.perf_counter()
        prediction = classifier.classify(frame)
        if i >= WARM:
            whole.append(1e3 * (time.perf_counter() - start))
            for stage, ms in prediction.timings.items():
                stages.setdefault(stage, []).append(ms)
    print(f"a 1080p frame, {classifier!r}\n  {'classify':24s} {quantiles(whole)}")
    for stage, found in stages.items():
        print(f"  {stage:24s} {quantiles(found)}")
    total = np.sum([found for found in stages.values()], axis=0)
    print(f"  classify takes {np.median(whole) / np.median(total):.3f} of its stages' sum")


def endure(encoder: Encode, batch: Batch, frames: int) -> None:
    """Memory in use before and after many frames."""
    for _ in range(WARM):
        encoder(batch)
    before, start = memory(), time.perf_counter()
    for _ in range(frames):
        encoder(batch)
    seconds, after = time.perf_counter() - start, memory()
    print(f"{frames} frames in {seconds:.0f} s; MiB in use before and after")
    for name in before:
        print(f"  {name:24s} {before[name]:10.1f} {after[name]:10.1f}")


def memory() -> dict[str, float]:
    """MiB: of the GPU by everyone, of the host by this process."""
    free, total = open_cuda().memory()
    status = Path("/proc/self/status").read_text()
    (kib,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    return {"GPU": (total - free) / MIB, "host": int(kib) / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--frames", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--model", help="for PyTorch: a name or a checkpoint (default: the bundle's)"
    )
    parser.add_argument("--no-external-tactics", action="store_true")
    options = parser.parse_args()
    try:
        print(platform(open_cuda()))
        with tempfile.TemporaryDirectory() as name:
            run(Path(shutil.copytree(options.bundle, Path(name) / "bundle")), options)
    except EdgeClipError as error:
        sys.exit(f"benchmarks/gpu.py: {error}")


def run(folder: Path, options: argparse.Namespace) -> None:
    made = Bundle(folder).manifest
    torch, others = None, onnxruntime_ways(folder)
    try:
        torch = Torch(options.model or made.model.name, made.image)
        others |= torch.ways()
    except EdgeClipError as error:
        print(f"PyTorch, and the share of the peak: left out, {error}")
    for size in dict.fromkeys((options.batch, 1)):  # 1 last: its engines are the ones that stay
        found = engines(folder, size, not options.no_external_tactics)
        batch = np.zeros((size, made.image.height, made.image.width, 3), np.uint8)
        times = measure({**found, **others}, batch, options.rounds)
        show(times, size)
        if torch and size == options.batch:
            share_of_peak(torch, times, size)
    one_frame(runtime.load(folder, backend="tensorrt"), options.rounds)
    if options.frames and found:
        endure(next(reversed(found.values())), batch, options.frames)


if __name__ == "__main__":
    main()
