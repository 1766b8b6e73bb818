"""Peak memory of training from shards: ten thousand pairs against a hundred thousand.

    python benchmarks/memory.py [--pairs 10000 100000]

The pictures are generated. Prints the largest resident set of any process of each run.
"""

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 80, 230)}
SHARD, SIZE = 2500, 48
MEASURE = (
    "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:]);"
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(done.returncode)"
)


def write_shards(folder: Path, pairs: int) -> str:
    """Tar files of `SHARD` pairs each: noise tinted by one of three colours, and its caption."""
    rng = np.random.default_rng(0)
    for shard in range(-(-pairs // SHARD)):
        with tarfile.open(folder / f"{shard:04}.tar", "w") as archive:
            for n in range(shard * SHARD, min(pairs, (shard + 1) * SHARD)):
                name = list(COLORS)[n % 3]
                noise = rng.integers(0, 60, (SIZE, SIZE, 3)) + np.array(COLORS[name]) // 2
                picture = io.BytesIO()
                Image.fromarray(noise.astype(np.uint8)).save(picture, "JPEG")
                add(archive, f"{n:07}.jpg", picture.getvalue())
                add(archive, f"{n:07}.txt", f"picture {n} is {name}".encode())
    return str(folder)


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """One member of a shard."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def peak(source: str, out: Path) -> float:
    """The largest resident set, MiB, of a training over the shards once."""
    train = ["train", source, str(out), "--model=nano", "--epochs=1", "--batch-size=256"]
    command = [sys.executable, "-c", "from export.cli import main; main()", *train]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *command], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"training failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[10_000, 100_000])
    for pairs in parser.parse_args().pairs:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "shards"
            folder.mkdir()
            found = peak(write_shards(folder, pairs), Path(name) / "out")
            print(f"{pairs:8,} pairs: {found:7.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
