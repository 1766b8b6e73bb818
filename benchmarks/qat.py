"""What int8, or fewer bits, cost a checkpoint, and what quantisation-aware training gives back.

    python benchmarks/qat.py checkpoint/ --data train/ --val test/ --bits 4

Top-1 on `--val` of fp32; of the same model quantised after training (PTQ: the same granularity and
the ranges that a --qat begins with); and of a --qat. So that more training is not taken for its
merit, the model is also trained on for as long without --qat, and then quantised. With 8 bits both
trained models are exported, and the int8 file is compared with the model as it was trained.
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
from export.trained_ranges import read_trained
from runtime.prompts import build_bank
from runtime.tokenizer import Tokenizer
from training.evaluate import image_encoder, text_encoder
from training.model import ClipModel, create
from training.options import TrainOptions
from training.qat import fake_quantize
from training.qat_ranges import CALIBRATION, calibrate
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


def equality(folder: Path, store: Path, judged: FrameSet) -> str:
    """How near the int8 file of a --qat is to the model as it was trained."""
    clip = create(str(folder))
    trained = read_trained(clip)
    assert trained is not None
    spec = clip.image
    example = torch.zeros(2, spec.height, spec.width, 3, dtype=torch.uint8)
    write_onnx(ImageEncoder(clip), example, "frames", store)
    model = onnx.load(store)
    int8 = encoder(quantize(model, find_layers(model), trained.ranges(model)))
    rows = np.concatenate([int8(batch) for batch in judged.batches(BATCH)])
    cosines = row_cosines(rows, embedded(trained.clip, judged))
    low, p1, middle = np.quantile(cosines, [0, 0.01, 0.5])
    return (
        f"int8 file: top-1 {top1(clip, rows, judged):.1%}; cosine with the model as it was "
        f"trained: least {low:.6f}, 1st percentile {p1:.6f}, median {middle:.6f}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--no-control", action="store_true", help="no training without --qat")
    parser.add_argument("--ptq-alone", action="store_true", help="no training at all")
    return parser.parse_args()


def main() -> None:
    chosen = parse()
    clip = create(str(chosen.checkpoint))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seen = drawn(clip, chosen.data, folder / "seen", BATCH * CALIBRATION)
        judged = drawn(clip, chosen.val, folder / "judged", 10**6)
        print(f"{clip.name}, {len(judged)} frames, {chosen.bits} bits")
        fp32 = top1(clip, embedded(clip, judged), judged)
        print(f"fp32 {fp32:.1%}", flush=True)
        ptq = after_training(chosen.checkpoint, chosen.bits, seen, judged)
        print(f"PTQ {ptq:.1%}: {100 * (fp32 - ptq):.1f} points lost", flush=True)
        if chosen.ptq_alone:
            return

        def fit(out: str, **more: Any) -> Path:
            options = TrainOptions(
                data=str(chosen.data),
                out=folder / out,
                model=str(chosen.checkpoint),
                epochs=chosen.epochs,
                lr=chosen.lr,
                flip=True,
                **more,
            )
            train(options, quiet=True)
            return options.out

        if not chosen.no_control:
            further = create(str(fit("float")))
            found = top1(further, embedded(further, judged), judged)
            print(f"fp32 trained on as long {found:.1%}", flush=True)
            found = after_training(folder / "float", chosen.bits, seen, judged)
            print(f"PTQ of that {found:.1%}", flush=True)
        out = fit("qat", qat=True, qat_bits=chosen.bits)
        plain = create(str(out))
        found = top1(plain, embedded(plain, judged), judged)
        print(f"fp32 of the --qat's weights {found:.1%}")
        qat = trained_top1(out, chosen.bits, judged)
        share = (qat - ptq) / (fp32 - ptq) if fp32 > ptq else float("nan")
        print(f"QAT {qat:.1%}: {share:.0%} of the loss recovered", flush=True)
        if chosen.bits == 8:
            print(equality(out, folder / "image.onnx", judged))


def trained_top1(folder: Path, bits: int, judged: FrameSet) -> float:
    """Top-1 of a --qat's checkpoint as it was trained."""
    from training.model import WEIGHTS
    from training.qat import set_steps
    from training.quantization import read_quantization

    clip = create(str(folder))
    found = read_quantization(folder, folder / WEIGHTS)
    assert found is not None
    fake_quantize(clip, bits)
    set_steps(clip, found.input_steps)
    return top1(clip, embedded(clip, judged), judged)


if __name__ == "__main__":
    main()
