"""Images a second in training, against open_clip's own trainer: same model, data, batch, precision,
device and number of workers, in one run.

    python benchmarks/throughput.py pairs.csv --model mobilenetv4 --batch-size 64 --workers 2

`pairs.csv` has the columns file,caption. open_clip's trainer reads tables by pandas, which is to be
installed for this.
"""

import argparse
import csv
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from calibration.pairs import read_pairs
from training.model import PRESETS

STEPS, EVERY = 40, 10
DEVICES = {"cpu": "cpu", "cuda": "cuda:0"}
# Ours is autocast over fp32 weights; open_clip's of that kind is called amp.
PRECISIONS = {"fp32": "fp32", "bf16": "amp_bfloat16", "fp16": "amp"}
OPEN_CLIP = (
    "import sys; import training.torchvision_ops; import open_clip;"
    f"open_clip.add_model_config({str(PRESETS)!r});"
    "from open_clip_train.main import main; main(sys.argv[1:])"
)


def write_table(source: Path, folder: Path, rows: int) -> Path:
    """The first `rows` pictures with a caption each, by absolute paths.

    Where there are fewer, copies follow under other names: our reader makes one of the rows of
    one file, open_clip's does not.
    """
    pairs = read_pairs(source, ("{}",))
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "caption"])
        for n in range(rows):
            row = n % len(pairs)
            file = pairs.files[row].resolve()
            if n >= len(pairs):
                file = shutil.copyfile(file, folder / f"{n}{file.suffix}")
            writer.writerow([file, pairs.texts[pairs.captions[row][0]]])
    return folder / "pairs.csv"


def run(command: list[str], device: str) -> subprocess.CompletedProcess[str]:
    """A trainer in a process of its own, which on the CPU sees no GPU: ours takes one where it
    finds one."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    environment = os.environ | hidden
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def open_clip(table: Path, folder: Path, chosen: argparse.Namespace) -> float:
    """Images a second of open_clip's trainer: the median over its log's intervals."""
    command = [sys.executable, "-c", OPEN_CLIP, "--train-data", str(table)]
    command += ["--dataset-type", "csv", "--csv-separator", ",", "--csv-img-key", "file"]
    command += ["--csv-caption-key", "caption", "--model", chosen.model, "--epochs", "1"]
    command += ["--batch-size", str(chosen.batch_size), "--workers", str(chosen.workers)]
    command += ["--precision", PRECISIONS[chosen.precision], "--device", DEVICES[chosen.device]]
    command += ["--log-every-n-steps", str(EVERY), "--logs", str(folder), "--warmup", "10"]
    command += ["--lr", "1e-4"]
    done = run(command, chosen.device)
    seconds = [float(found) for found in re.findall(r"Batch \(t\): ([0-9.]+)", done.stderr)]
    if done.returncode or len(seconds) < 3:
        sys.exit(f"open_clip's trainer failed:\n{done.stderr[-2000:]}")
    return int(chosen.batch_size) / statistics.median(seconds[1:])


def edgeclip(table: Path, folder: Path, chosen: argparse.Namespace, cache: Path | None) -> float:
    """Images a second of ours, by its own log."""
    out = folder / "ours"
    command = [sys.executable, "-c", "from export.cli import main; main()", "train", str(table)]
    command += [str(out), "--model", chosen.model, "--batch-size", str(chosen.batch_size)]
    command += ["--workers", str(chosen.workers), "--precision", chosen.precision, "--epochs=1"]
    command += ["--lr", "1e-4", "--force", *(["--cache", str(cache)] if cache else [])]
    done = run(command, chosen.device)
    if done.returncode:
        sys.exit(f"training failed:\n{done.stderr[-2000:]}")
    with (folder / "ours.run" / "steps.csv").open(encoding="utf-8") as stream:
        rates = [float(row["images_per_second"]) for row in csv.DictReader(stream)]
    return statistics.median(rates[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="mobilenetv4")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=DEVICES, default="cuda" if cuda else "cpu")
    parser.add_argument("--rounds", type=int, default=2)
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not cuda:
        parser.error("--device cuda: there is no CUDA device here")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = write_table(chosen.data, folder, STEPS * chosen.batch_size)
        cache = folder / "cache"
        edgeclip(table, folder, chosen, cache)  # fills the cache
        rates: dict[str, list[float]] = {"open_clip": [], "edgeclip": [], "with --cache": []}
        for _ in range(chosen.rounds):
            rates["open_clip"].append(open_clip(table, folder, chosen))
            rates["edgeclip"].append(edgeclip(table, folder, chosen, None))
            rates["with --cache"].append(edgeclip(table, folder, chosen, cache))
    base = statistics.median(rates["open_clip"])
    print(
        f"{chosen.model}, batch {chosen.batch_size}, {chosen.workers} workers, {chosen.precision}, "
        f"{chosen.device}"
    )
    for what, found in rates.items():
        rate = statistics.median(found)
        print(f"{what:14} {rate:8.1f} images/s  {rate / base:5.2f}x")


if __name__ == "__main__":
    main()
