"""What distillation reaches on small public data, and what a teacher's cache costs.

    python benchmarks/distill.py cifar ../shared/data TEACHER
    python benchmarks/distill.py unseen ../shared/data TEACHER
    python benchmarks/distill.py flickr ../shared/data TEACHER
    python benchmarks/distill.py cache ../shared/data TEACHER

TEACHER is a checkpoint of `benchmarks/reached.py cifar` (for flickr: of `reached.py flickr` or
`flickr-scratch`), or any other MobileNetV2. The student is half of one; in `flickr` for pictures
of its teacher's size, else for smaller ones. `cifar`: without labels, held against the same student
trained on the labels for at least the same time (`--label-epochs`). `unseen`: two classes are not
in the prompt bank; who tells them by their prompts? `flickr`: retrieval of student and teacher.
`cache`: bytes and hours of a million pictures, and how many samples a second are read.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from reached import TEMPLATES, split_flickr
from rich.console import Console
from rich.progress import Progress

from calibration.subject import Subject, measure
from training.augment import Augmentation
from training.cost import multiply_adds
from training.distill import distill
from training.distill_images import digests, open_images
from training.distill_options import DistillOptions
from training.evaluate import checkpoint_subject
from training.options import TrainOptions
from training.teacher import Teacher, open_teacher
from training.trainer import train

CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
UNSEEN = ["horse", "truck"]
PIXELS = 65  # of a student of CIFAR-10


def student_file(chosen: argparse.Namespace, room: Path) -> str:
    """The student that was chosen, or half a MobileNetV2."""
    if chosen.student:
        return str(chosen.student)
    pixels = open_teacher(chosen.teacher).image.width if chosen.what == "flickr" else PIXELS
    config: dict[str, Any] = {
        "embed_dim": 64,  # for the training on labels; a student has its teacher's
        "vision_cfg": {
            "timm_model_name": "mobilenetv2_050",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": pixels,
        },
        "text_cfg": {
            "context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1,
        },
    }  # fmt: skip
    file = room / "half.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    return str(file)


def distilled(chosen: argparse.Namespace, room: Path, **more: Any) -> tuple[Path, dict[str, Any]]:
    """A student's folder and record, and what it cost."""
    options = DistillOptions(
        **{
            "teacher": chosen.teacher,
            "student": student_file(chosen, room),
            "out": room / "student",
            "cache": chosen.cache or room / "cache",
            "epochs": chosen.epochs,
            "views": chosen.views,
            "lr": 2e-3,
            **more,
        }
    )
    began = time.perf_counter()
    record = distill(options)
    whole = time.perf_counter() - began
    steps = record["seconds"]
    print(f"distilled in {whole / 60:.1f} minutes, {steps / 60:.1f} of them steps and evaluation")
    subjects = [open_teacher(chosen.teacher), open_teacher(str(options.out))]
    large, small = map(multiply_adds, subjects)
    print(f"multiply-adds: teacher {large:,}, student {small:,}, {small / large:.1%} of them")
    return options.out, record


def cifar(chosen: argparse.Namespace, room: Path) -> None:
    data = chosen.data / "cifar10"
    _, record = distilled(
        chosen, room, images=(data / "train",), val=data / "test", labels=",".join(CLASSES)
    )
    trained = train(
        TrainOptions(
            data=str(data / "train"),
            val=data / "test",
            out=room / "labels",
            model=student_file(chosen, room),
            templates=TEMPLATES,
            epochs=chosen.label_epochs,
            crop=0.5,
            flip=True,
            lr=2e-3,
            cache=(chosen.cache or room / "cache"),
        )
    )
    print(f"trained on labels in {trained['seconds'] / 60:.1f} minutes")
    last, labels = record["epochs"][-1], trained["epochs"][-1]
    teacher, _ = top1(checkpoint_subject(chosen.teacher), data / "test")
    best = max(epoch["top1"] for epoch in trained["epochs"])
    print(f"top-1: teacher {teacher:.1%}, distilled {last['top1']:.1%}")
    print(f"on labels: {labels['top1']:.1%}, its best epoch {best:.1%}")
    print(f"agreement of student and teacher: {last['agreement']:.1%}")


def top1(subject: Subject, data: Path) -> tuple[float, dict[str, float]]:
    """Top-1 over all classes, and the recall of each."""
    _, found = measure(subject, data, TEMPLATES, quiet=True)
    return found.figures["top1"], {row.label: row.recall for row in found.classes}


def unseen(chosen: argparse.Namespace, room: Path) -> None:
    data = chosen.data / "cifar10"
    known = [name for name in CLASSES if name not in UNSEEN]
    out, _ = distilled(
        chosen, room, images=(data / "train",), val=data / "test", labels=",".join(known)
    )
    for name, folder in (("teacher", chosen.teacher), ("student", str(out))):
        whole, recall = top1(checkpoint_subject(folder), data / "test")
        apart = ", ".join(f"{label} {recall[label]:.1%}" for label in UNSEEN)
        mean = np.mean([recall[label] for label in UNSEEN])
        print(f"{name}: top-1 {whole:.1%}; not in the bank: {mean:.1%} ({apart})")


def flickr(chosen: argparse.Namespace, room: Path) -> None:
    train_csv, test_csv = split_flickr(chosen.data, room)
    out, _ = distilled(
        chosen,
        room,
        images=(train_csv,),
        val=test_csv,
        captions=2,
        freeze_bn=True,
        batch_size=32,
        lr=chosen.lr,
        inherit_from=chosen.inherit_from,
        out=chosen.out or room / "student",
        precision="bf16",
    )
    figures = [
        measure(checkpoint_subject(name), test_csv, quiet=True)[1].figures
        for name in (chosen.teacher, str(out))
    ]
    for name, value in figures[0].items():
        own = figures[1][name]
        print(f"{name:22} teacher {value:6.1%}, student {own:6.1%}: {own / value:.0%} kept")


def cache(chosen: argparse.Namespace, room: Path) -> None:
    clip = open_teacher(chosen.teacher)
    view = Augmentation(clip.image, 0.5, True, 0.0, 0.2)
    folder = chosen.cache or room / "cache"
    teacher = Teacher(clip, folder, view, seed=0, workers=2)
    with Progress(console=Console(stderr=True)) as progress:
        pairs = open_images([chosen.data / "cifar10/train"], 1.0, room, 0.01, progress)
        began = time.perf_counter()
        hashes, _ = digests(pairs.files, progress)
        hashed = time.perf_counter() - began
        numbers = range(1, chosen.views + 1)
        known, began = len(teacher.drawn), time.perf_counter()
        _, store, places = teacher.see(pairs, hashes, numbers, progress)
        seconds = time.perf_counter() - began
    files = [f for f in store.folder.iterdir() if f.suffix == ".npy"]
    size = sum(f.stat().st_size for f in files) / len(store)
    count, made = places.size, len(store) - known
    print(f"{len(pairs)} pictures, {chosen.views} views: {made} computed in {seconds:.0f} s")
    hours = seconds / max(made, 1) * 1e6 / 3600
    print(f"1,000,000 views: {size * 1e6 / 2**20:,.0f} MiB, {hours:.1f} hours")
    print(f"hashing 1,000,000 pictures: {hashed / len(pairs) * 1e6 / 60:.1f} minutes")
    order = np.random.default_rng(0).permutation(places.ravel()).tolist()
    began = time.perf_counter()
    for place in order:
        store.row(place)
    print(f"read one by one, at random: {count / (time.perf_counter() - began):,.0f} a second")
    began = time.perf_counter()
    for start in range(0, count, 256):
        store.rows(np.array(order[start : start + 256]))
    print(f"in batches of 256: {count / (time.perf_counter() - began):,.0f} a second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["cifar", "unseen", "flickr", "cache"])
    parser.add_argument("data", type=Path)
    parser.add_argument("teacher")
    parser.add_argument("--student", type=Path, help="A model config, instead of the usual one.")
    parser.add_argument("--lr", type=float, default=5e-4, help="With flickr.")
    parser.add_argument("--inherit-from", help="With flickr: a student that is less narrow.")
    parser.add_argument("--out", type=Path, help="With flickr: the student's folder, to be kept.")
    parser.add_argument("--cache", type=Path, help="Where the teacher's embeddings are kept.")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--label-epochs", type=int, default=60, help="Of the training on labels.")
    parser.add_argument("--views", type=int, default=4)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        {"cifar": cifar, "unseen": unseen, "flickr": flickr, "cache": cache}[chosen.what](
            chosen, Path(name)
        )


if __name__ == "__main__":
    main()
