"""What training reaches on small public data, and in how many minutes.

    python benchmarks/reached.py flickr ../shared/data
    python benchmarks/reached.py cifar ../shared/data
    python benchmarks/reached.py scratch ../shared/data
    python benchmarks/reached.py flickr-scratch ../shared/data

`flickr`: captions of Flickr8k, the image tower from a MobileNetV2 trained on ImageNet, an own text
tower; retrieval among 1,000 held-out pictures. `cifar`: ten labels, from the same MobileNetV2.
`scratch` and `flickr-scratch`: the same labels and captions from random weights. `--out` keeps the
checkpoint.
"""

import argparse
import csv
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from calibration.subject import measure
from training.evaluate import checkpoint_subject
from training.model import PRESETS
from training.options import TrainOptions
from training.trainer import train

BACKBONE = "weights/mobilenetv2_100/model_fp16.safetensors"
HELD_OUT = 500
TEMPLATES = ("a photo of a {}", "a blurry photo of a {}", "a small {}", "there is a {} here")


def split_flickr(data: Path, folder: Path) -> tuple[Path, Path]:
    """All pictures but the last 500 to train on; those and the 500 for validation to test."""
    rows, validation = (
        list(csv.DictReader((data / "captions" / name).open(encoding="utf-8")))
        for name in ("captions.csv", "captions_val.csv")
    )
    held_out = set(list(dict.fromkeys(row["file"] for row in rows))[-HELD_OUT:])
    train_rows = [row for row in rows if row["file"] not in held_out]
    test_rows = [row for row in rows if row["file"] in held_out] + validation
    for name, own in (("train.csv", train_rows), ("test.csv", test_rows)):
        with (folder / name).open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["file", "caption"])
            writer.writerows([data.resolve() / "captions" / r["file"], r["caption"]] for r in own)
    return folder / "train.csv", folder / "test.csv"


def flickr(data: Path, folder: Path) -> tuple[Path, Path, dict[str, Any]]:
    """The last layers of the image tower unlocked, on cached features of nine views."""
    train_csv, test_csv = split_flickr(data, folder)
    return (
        train_csv,
        test_csv,
        {
            "model": "mobilenetv2",
            "init_image": data / BACKBONE,
            "lock_image": True,
            "unlock_image": 5,
            "image_lr": 0.3,
            "freeze_bn": True,
            "cache": folder / "cache",
            "views": 9,
            "crop": 0.6,
            "flip": True,
            "jitter": 0.2,
            "captions": 5,
            "token_drop": 0.25,
            "batch_size": 128,
            "epochs": 12,
            "ema": 0.99,
            "lr": 1e-3,
            "precision": "bf16",
        },
    )


def cifar(data: Path, folder: Path) -> tuple[Path, Path, dict[str, Any]]:
    """The whole MobileNetV2 fine-tuned on pictures of 97 pixels."""
    return (
        data / "cifar10/train",
        data / "cifar10/test",
        {
            "model": sized("mobilenetv2", 97, folder),
            "init_image": data / BACKBONE,
            "image_lr": 0.3,
            "freeze_bn": True,
            "templates": TEMPLATES,
            "cache": folder / "cache",
            "crop": 0.6,
            "flip": True,
            "jitter": 0.2,
            "batch_size": 64,
            "epochs": 8,
            "lr": 1e-3,
            "weight_decay": 0.05,
        },
    )


def scratch(data: Path, folder: Path) -> tuple[Path, Path, dict[str, Any]]:
    """The smallest preset, from random weights."""
    return (
        data / "cifar10/train",
        data / "cifar10/test",
        {
            "model": "nano",
            "templates": TEMPLATES,
            "cache": folder / "cache",
            "crop": 0.5,
            "flip": True,
            "batch_size": 128,
            "epochs": 40,
            "lr": 2e-3,
        },
    )


def flickr_scratch(data: Path, folder: Path) -> tuple[Path, Path, dict[str, Any]]:
    """A MobileNetV2 for pictures of 129 pixels, from random weights."""
    train_csv, test_csv = split_flickr(data, folder)
    return (
        train_csv,
        test_csv,
        {
            "model": sized("mobilenetv2", 129, folder),
            "cache": folder / "cache",
            "crop": 0.5,
            "flip": True,
            "jitter": 0.2,
            "captions": 5,
            "token_drop": 0.25,
            "batch_size": 128,
            "epochs": 30,
            "lr": 2e-3,
            "precision": "bf16",
        },
    )


def sized(preset: str, pixels: int, folder: Path) -> str:
    """A preset's config for pictures of another size: 32 k + 1, see the README on presets."""
    config = json.loads((PRESETS / f"{preset}.json").read_text(encoding="utf-8"))
    config["vision_cfg"]["image_size"] = pixels
    file = folder / f"{preset}-{pixels}.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    return str(file)


RECIPES = {"flickr": flickr, "cifar": cifar, "scratch": scratch, "flickr-scratch": flickr_scratch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=list(RECIPES))
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, help="Where the checkpoint is kept.")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        source, test, settings = RECIPES[chosen.what](chosen.data, Path(name))
        out = chosen.out or Path(name) / "checkpoint"
        options = TrainOptions(data=str(source), out=out, **settings)
        began = time.perf_counter()
        record = train(options)
        minutes = (time.perf_counter() - began) / 60
        subject = checkpoint_subject(str(options.out))
        _, found = measure(subject, test)
        print(f"{minutes:.1f} minutes in all, {record['seconds'] / 60:.1f} of them steps")
        for figure, value in found.figures.items():
            print(f"{figure:22} {value:6.1%}")


if __name__ == "__main__":
    main()
