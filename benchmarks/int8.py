"""INT8 of one image encoder by three recipes, on the same frames and by the same measure.

    python benchmarks/int8.py checkpoint/ --calibrate train/ --judge test/ --labels "a cat,a dog"

Ours against onnxruntime.quantization's `quantize_static`: with its defaults, and with MatMul and
Gemm alone (and convolutions, where the encoder has more of these). The latencies are of one frame,
in turns in one run.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from rich.progress import Progress

from calibration.activations import session_of
from calibration.gate import Cost, Judge, Limits
from calibration.precisions import BATCH, int8_candidate
from calibration.sampling import sample
from calibration.sensitivity import encoder
from export.to_onnx import write_onnx
from export.towers import ImageEncoder
from runtime.prompts import build_bank, read_labels
from runtime.tokenizer import Tokenizer
from training.evaluate import text_encoder
from training.model import create
from training.text import text_side

RUNS = 30


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """The calibration frames, one by one, as onnxruntime.quantization takes them."""

    def __init__(self, batches: Iterator[NDArray[np.uint8]]) -> None:
        self._frames = (batch[i : i + 1] for batch in batches for i in range(len(batch)))

    def get_next(self) -> Any:
        frame = next(self._frames, None)
        return None if frame is None else {"frames": frame}


def static(source: Path, batches: Iterator[NDArray[np.uint8]], **options: Any) -> ModelProto:
    """`quantize_static` of an encoder file, by min-max, symmetric int8 where that is asked for."""
    out = source.with_suffix(".static.onnx")
    quantize_static(source, out, Reader(batches), **options)
    return onnx.load(out)


def milliseconds(models: dict[str, ModelProto], frame: NDArray[np.uint8]) -> dict[str, float]:
    sessions = {name: session_of(model) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(RUNS):
        for name, session in sessions.items():
            begin = time.perf_counter()
            session.run(None, {"frames": frame})
            seconds[name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(found[5:]) for name, found in seconds.items()}


def show(name: str, cost: Cost, ms: float, model: ModelProto) -> None:
    agreement = "" if cost.agreement is None else f"{cost.agreement:7.1%}"
    top1 = "" if cost.top1 is None else f"{cost.top1:6.1%}"
    size = model.ByteSize() / 2**20
    print(f"{name:24} {cost.cosine_p1:9.5f} {agreement:8} {top1:7} {size:6.1f} MiB {ms:8.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--labels")
    parser.add_argument("--frames", type=int, default=256)
    chosen = parser.parse_args()
    clip = create(chosen.checkpoint)
    spec = clip.image
    with tempfile.TemporaryDirectory() as name, Progress(transient=True) as progress:
        folder = Path(name)
        source = folder / "image.onnx"
        example = torch.zeros(2, spec.height, spec.width, 3, dtype=torch.uint8)
        write_onnx(ImageEncoder(clip), example, "frames", source)
        model = onnx.load(source)
        seen = sample([chosen.calibrate], spec, chosen.frames, 0, folder / "calibrate")
        judged = sample([chosen.judge], spec, 2 * chosen.frames, 1, folder / "judge")
        labels = read_labels(chosen.labels) if chosen.labels else judged.classes
        content, text = text_side(clip, None, clip.templates)
        embed = text_encoder(clip, Tokenizer(content, text))
        bank = build_bank(labels, clip.templates, embed, "").embeddings if labels else None
        targets = None
        if judged.targets is not None and tuple(labels) == judged.classes:
            targets = np.array(judged.targets)
        run = encoder(model)
        reference = np.concatenate([run(batch) for batch in judged.batches(BATCH)])
        judge = Judge(lambda: judged.batches(BATCH), reference, bank, targets)
        ours = int8_candidate(model, lambda: seen.batches(BATCH), judge, Limits(), progress)
        signed: dict[str, Any] = {
            "activation_type": QuantType.QInt8,
            "extra_options": {"ActivationSymmetric": True, "WeightSymmetric": True},
        }
        layers = ["MatMul", "Gemm", "Conv"]
        models = {
            "fp32": model,
            "edgeclip": ours.model,
            "quantize_static": static(source, seen.batches(BATCH)),
            "static, layers alone": static(
                source, seen.batches(BATCH), op_types_to_quantize=layers, per_channel=True, **signed
            ),
        }
        ms = milliseconds(models, next(judged.batches(1)))
        print(f"{clip.name}: {len(seen)} frames to calibrate, {len(judged)} to judge")
        print(f"{'':24} {'cosine p1':>9} {'labels':8} {'top-1':7}")
        for name, own in models.items():
            show(name, judge.cost(encoder(own)), ms[name], own)
        print(f"edgeclip: {len(ours.float_layers)} layers in float, {ours.int8_share:.1%} int8")


if __name__ == "__main__":
    main()
