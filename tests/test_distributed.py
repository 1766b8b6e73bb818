"""A run on two processes reaches the weights of a run on one: replicated, and sharded."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import solid, write_tar
from safetensors.numpy import load_file

from training.options import TrainOptions
from training.trainer import train

WEIGHTS = "open_clip_model.safetensors"
SETTINGS = {"epochs": 3, "batch_size": 24, "workers": 0, "flip": True, "checkpoint_every": 2}
DIE = (
    "import os, sys; sys.path.insert(0, sys.argv[1]); from training.run import Run;"
    "advance = Run.advance\n"
    "def dying(self, batch):\n"
    "    if self.number == 5: os._exit(9)\n"
    "    return advance(self, batch)\n"
    "Run.advance = dying\n"
    "from export.cli import main; sys.argv[1:] = sys.argv[2:]; main()"
)


def flags(data: Path, out: Path, model: Path) -> list[str]:
    values = {k: v for k, v in SETTINGS.items() if v is not True}
    named = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    return ["train", str(data), str(out), "--model", str(model), "--flip", *named]


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, "--standalone", "--no-python", *command],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


def edgeclip() -> str:
    found = shutil.which("edgeclip", path=str(Path(sys.executable).parent))
    assert found
    return found


def killed_and_resumed(command: list[str]) -> None:
    """Runs a training on two processes, which die in the middle, and goes on with it."""
    command = [*command, "--devices=2"]
    root = str(Path(__file__).parent.parent)
    assert torchrun(sys.executable, "-c", DIE, root, *command).returncode != 0
    done = torchrun(edgeclip(), *command, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the run begins" not in done.stderr
    assert done.stdout.count("wrote") == 1


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_reach_the_weights_of_one_also_after_a_kill(
    strategy: str, squares: Path, tiny_config: Path, tmp_path: Path
) -> None:
    one = TrainOptions(data=str(squares), out=tmp_path / "one", model=str(tiny_config), **SETTINGS)  # type: ignore[arg-type]
    train(one, quiet=True)
    two = [*flags(squares, tmp_path / "two", tiny_config), f"--strategy={strategy}"]
    killed_and_resumed(two)
    expected, found = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    assert expected.keys() == found.keys()
    for name, own in expected.items():
        np.testing.assert_allclose(own, found[name], rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_broken_samples_of_another_process_are_known_after_a_resume(
    tiny_config: Path, tmp_path: Path
) -> None:
    for shard in range(4):
        members: dict[str, bytes | str] = {}
        for n in range(shard * 30, shard * 30 + 30):
            members[f"{n}.png"] = b"this is no picture" if n % 9 == 0 else solid(2 * n)
            members[f"{n}.txt"] = f"picture {n}"
        write_tar(tmp_path / f"{shard}.tar", members)
    names = ("whole", "out")
    whole, out = (flags(tmp_path, tmp_path / n, tiny_config) + ["--max-bad=0.2"] for n in names)
    done = torchrun(edgeclip(), *whole, "--devices=2")
    assert done.returncode == 0, done.stderr[-3000:]
    killed_and_resumed(out)
    expected, found = (load_file(tmp_path / name / WEIGHTS) for name in names)
    for name, own in expected.items():
        np.testing.assert_array_equal(own, found[name], err_msg=name)
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["bad"] == {"unreadable picture": 14}
