"""What int8, or fewer bits, cost a checkpoint, and what quantisation-aware training gives back.

    python benchmarks/qat.py checkpoint/ --data train/ --val test/ --bits 4

Top-1 on `--val` of fp32; of the same model quantised after training (PTQ: the same granularity and
the ranges that a --qat begins with); and of a --qat. So that more training is not taken for its
merit, the model is also trained on for as long without --qat, and then quantised. With 8 bits the
int8 file is compared with the model as it was trained.
"""

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from calibration.frame_set import FrameSet
from calibration.layers import find_layers
from calibration.metrics import row_cosines
from calibration.quantize import quantize
from calibration.sampling import sample
from calibration.sensitivity import encoder
from export.to_onnx import write_onnx
from export.towers import ImageEncoder
from export.trained_ranges import read_trained, restored
from runtime.prompts import build_bank
from runtime.tokenizer import Tokenizer
from training.evaluate import image_encoder, text_encoder
from training.fake_quant import BITS
from training.model import WEIGHTS, ClipModel, create
from training.options import TrainOptions
from training.qat import fake_quantize
from training.qat_ranges import CALIBRATION, calibrate
from training.quantization import read_quantization
from training.text import text_side
from training.trainer import train

BATCH = 128
Rows = NDArray[np.float32]


def drawn(clip: ClipModel, folder: Path, store: Path, most: int) -> FrameSet:
    """Frames of a labelled folder."""
    return sample([folder], clip.image, most, 0, store)


def top1(clip: ClipModel, rows: Rows, judged: FrameSet) -> float:
    """The share of frames that are named rightly by their embeddings [N, D]."""
    content, text = text_side(clip, None, clip.templates)
    embed = text_encoder(clip, Tokenizer(content, text))
    bank = build_bank(judged.classes, clip.templates, embed, "")
    return float(((rows @ bank.embeddings.T).argmax(1) == np.array(judged.targets)).mean())


def embedded(clip: ClipModel, judged: FrameSet) -> Rows:
    encode = image_encoder(clip)
    return np.concatenate([encode(batch) for batch in judged.batches(BATCH)])


def after_training(folder: Path, bits: int, seen: FrameSet, judged: FrameSet) -> float:
    """Top-1 of a checkpoint that is quantised as it is."""
    clip = create(str(folder))
    fake_quantize(clip, bits)
    batches = itertools.islice(seen.batches(BATCH), CALIBRATION)
    calibrate(clip, (torch.from_numpy(batch) for batch in batches))
    return top1(clip, embedded(clip, judged), judged)


def as_trained(folder: Path) -> ClipModel:
    """The model of a --qat's checkpoint, fake-quantised."""
    found = read_quantization(folder, folder / WEIGHTS)
    assert found is not None
    return restored(create(str(folder)), found).clip


def equality(folder: Path, store: Path, judged: FrameSet) -> str:
    """How near the int8 file of a --qat is to the model as it was trained."""
    clip = create(str(folder))
    trained = read_trained(clip)
    assert trained is not None
    spec = clip.image
    example = torch.zeros(2, spec.height, spec.width, 3, dtype=torch.uint8)
    write_onnx(ImageEncoder(clip), example, "frames", store)
    model, ranges = trained.applied(onnx.load(store))
    int8 = quantize(model, find_layers(model), ranges)
    rows, plain = (
        np.concatenate([run(batch) for batch in judged.batches(BATCH)])
        for run in (encoder(int8), encoder(int8, optimise=False))
    )
    return (
        f"int8 file: top-1 {top1(clip, rows, judged):.1%}; its cosines with the model as it was "
        f"trained {spread(rows, embedded(trained.clip, judged))}; "
        f"with itself as ONNX Runtime runs it without optimisation {spread(rows, plain)}"
    )


def spread(one: Rows, other: Rows) -> str:
    low, p1, middle = np.quantile(row_cosines(one, other), [0, 0.01, 0.5])
    return f"least {low:.6f}, 1st percentile {p1:.6f}, median {middle:.6f}"


def fit(chosen: argparse.Namespace, out: Path, **more: Any) -> Path:
    """Trains the checkpoint on; returns the folder of what it became."""
    options = TrainOptions(
        data=str(chosen.data),
        out=out,
        model=str(chosen.checkpoint),
        epochs=chosen.epochs,
        lr=chosen.lr,
        flip=True,
        **more,
    )
    train(options, quiet=True)
    return out


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="a folder of classes to train on")
    parser.add_argument("--val", type=Path, required=True, help="another one to measure on")
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--no-control", action="store_true", help="no training without --qat")
    parser.add_argument("--ptq-alone", action="store_true", help="no training at all")
    return parser.parse_args()


def compare(chosen: argparse.Namespace, folder: Path) -> None:
    clip = create(str(chosen.checkpoint))
    seen = drawn(clip, chosen.data, folder / "seen", BATCH * CALIBRATION)
    judged = drawn(clip, chosen.val, folder / "judged", 10**6)

    def say(what: str, found: float, more: str = "") -> float:
        print(f"{what:32}{found:7.1%}{more}", flush=True)
        return found

    print(f"{clip.name}, {len(judged)} frames, {chosen.bits} bits")
    fp32 = say("fp32", top1(clip, embedded(clip, judged), judged))
    ptq = after_training(chosen.checkpoint, chosen.bits, seen, judged)
    say("PTQ", ptq, f"  {100 * (fp32 - ptq):.1f} points lost")
    if chosen.ptq_alone:
        return
    if not chosen.no_control:
        out = fit(chosen, folder / "float")
        further = create(str(out))
        say("fp32, trained on as long", top1(further, embedded(further, judged), judged))
        say("PTQ of that", after_training(out, chosen.bits, seen, judged))
    out = fit(chosen, folder / "qat", qat=True, qat_bits=chosen.bits)
    plain, trained = create(str(out)), as_trained(out)
    say("fp32 of the --qat's weights", top1(plain, embedded(plain, judged), judged))
    qat = top1(trained, embedded(trained, judged), judged)
    share = f"  {(qat - ptq) / (fp32 - ptq):.0%} of the loss recovered" if fp32 > ptq else ""
    say("QAT", qat, share)
    if chosen.bits == BITS:
        print(equality(out, folder / "image.onnx", judged))


def main() -> None:
    chosen = parse()
    with tempfile.TemporaryDirectory() as name:
        compare(chosen, Path(name))


if __name__ == "__main__":
    main()
