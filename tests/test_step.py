"""The gradient of a step: of the whole batch, however it is cut, on any number of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor

from training.average import Average
from training.batches import Batch
from training.devices import gather
from training.model import ClipModel, create
from training.objective import Objective
from training.options import TrainOptions
from training.step import Step
from training.towers import Towers

LOSSES = ("clip", "siglip", "itc", "triplet", "margin")
MOST = 3
CASES = [*((loss, 0) for loss in LOSSES), ("clip", 2), ("itc", 2)]  # loss, micro batch


def options(**changes: Any) -> TrainOptions:
    return TrainOptions(**{"data": "x.csv", "out": Path("x"), "queue": 6, **changes})


def case_options(loss: str, micro: int) -> TrainOptions:
    return options(loss=loss, label_weight=0.5, micro_batch=micro)


def make_clip(config: Path, loss: str, folder: Path) -> ClipModel:
    fields = json.loads(config.read_text())
    if loss == "siglip":
        fields["init_logit_bias"] = -2.0
    file = folder / f"tiny-{loss}.json"
    file.write_text(json.dumps(fields))
    return create(str(file))


def make_batch(n: int = 10, seed: int = 0) -> Batch:
    """Captions 0 to n - 1; picture i has its own and, now and then, its neighbour's."""
    rng = np.random.default_rng(seed)
    own = np.full((n, MOST), -1)
    own[:, 0] = np.arange(n)
    own[::3, 1] = (np.arange(n)[::3] + 1) % n
    tokens = torch.zeros(n, 12, dtype=torch.int64)
    tokens[:, :4] = torch.from_numpy(rng.integers(1, 49000, (n, 4)))
    tokens[:, 4] = 49407
    frames = torch.from_numpy(rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8))
    targets = torch.from_numpy(rng.integers(-1, 3, n))
    names = tuple(map(str, range(n)))
    return Batch(frames, tokens, torch.arange(n), torch.from_numpy(own), targets, names, ())


def gradients(
    clip: ClipModel, chosen: TrainOptions, batches: list[Batch], fabric: Fabric
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the last of some batches (the others fill the queue)."""
    torch.manual_seed(0)
    towers = Towers(clip, classes=3 if chosen.label_weight else 0)
    objective = Objective(chosen, clip, MOST, gather)
    slow = Average(towers, 0.9, ramp=False) if objective.momentum else None
    wrapped = fabric.setup_module(towers)
    step = Step(fabric, wrapped, objective, slow, chosen.micro_batch, seed=0)
    for number, batch in enumerate(batches):
        towers.zero_grad()
        loss = float(step.backward(batch, number).loss)
    found = {n: p.grad.clone() for n, p in towers.named_parameters() if p.grad is not None}
    return loss, found


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert a.keys() == b.keys() and a
    for name, own in a.items():
        scale = max(1.0, float(own.abs().max()))
        assert float((own - b[name]).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("micro", [1, 3, 5])
def test_micro_batches_give_the_gradient_of_the_whole_batch(
    tiny_config: Path, tmp_path: Path, loss: str, micro: int
) -> None:
    fabric = Fabric(accelerator="cpu")
    batches = [make_batch(seed=0), make_batch(seed=1)]
    results = [
        gradients(
            make_clip(tiny_config, loss, tmp_path),
            options(loss=loss, label_weight=0.5, micro_batch=size),
            batches,
            fabric,
        )
        for size in (0, micro)
    ]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert_same(results[0][1], results[1][1])


def test_several_captions_of_a_picture(tiny_config: Path, tmp_path: Path) -> None:
    """Two captions a picture are the pairs of each with the picture, embedded once; also cut."""
    pairs = make_batch(10)
    images = pairs.images[::2]
    own = pairs.own.clone()
    own[:, 2] = own.view(5, 2, MOST)[:, [1, 0], 0].reshape(10)  # both are true of the picture
    twice = pairs._replace(images=images.repeat_interleave(2, dim=0), own=own)
    batch, fabric = twice._replace(images=images), Fabric(accelerator="cpu")
    results = [
        gradients(make_clip(tiny_config, "clip", tmp_path), options(micro_batch=m), [b], fabric)
        for m, b in ((0, twice), (0, batch), (2, batch))
    ]
    for loss, found in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert_same(results[0][1], found)


def test_micro_batches_replay_dropout(tmp_path: Path) -> None:
    """Both passes of a micro batch must drop the same units, or the gradient is of another loss."""
    fields = {
        "embed_dim": 16,
        "vision_cfg": {
            "timm_model_name": "test_vit",
            "timm_pool": "avg",
            "timm_proj": "linear",
            "timm_drop": 0.5,
            "image_size": 32,
        },
        "text_cfg": {
            "context_length": 12,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }
    file = tmp_path / "drop.json"
    file.write_text(json.dumps(fields))
    clip = create(str(file))
    clip.model.train()
    fabric = Fabric(accelerator="cpu")
    towers = Towers(clip)
    objective = Objective(options(), clip, MOST, gather)
    step = Step(fabric, fabric.setup_module(towers), objective, None, 5, seed=0)
    seen: list[Tensor] = []
    hook = clip.model.visual.head.register_forward_hook(
        lambda _m, _i, out: seen.append(out.detach())
    )
    step.backward(make_batch(), 0)
    hook.remove()
    torch.testing.assert_close(torch.cat(seen[:2]), torch.cat(seen[2:]))
    assert not torch.equal(seen[0], towers(make_batch().images[:5], make_batch().texts[:5]).image)


def test_batch_norm_statistics_are_counted_once(tmp_path: Path) -> None:
    from training.model import PRESETS

    batch = make_batch(20)
    batch = batch._replace(texts=torch.nn.functional.pad(batch.texts, (0, 4)))
    clip, once = (create(str(PRESETS / "nano.json")) for _ in range(2))
    fabric = Fabric(accelerator="cpu")
    clip.model.train()
    towers = fabric.setup_module(Towers(clip))
    Step(fabric, towers, Objective(options(), clip, MOST, gather), None, 10, 0).backward(batch, 0)
    once.model.train()
    for half in (slice(0, 10), slice(10, 20)):
        Towers(once)(batch.images[half], batch.texts[half])
    mine, its = clip.model.visual.trunk.bn1, once.model.visual.trunk.bn1
    assert float(mine.running_mean.abs().max()) > 0
    torch.testing.assert_close(mine.running_mean, its.running_mean)
    torch.testing.assert_close(mine.running_var, its.running_var)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Loss and gradients of two gloo processes, each with a half of the batch, by case."""
    folder = tmp_path_factory.mktemp("two")
    script = Path(__file__).parent / "two_processes.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", str(script), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize(("loss", "micro"), CASES)
def test_two_processes_equal_one(
    two_processes: Path, tiny_config: Path, tmp_path: Path, loss: str, micro: int
) -> None:
    clip = make_clip(tiny_config, loss, tmp_path)
    batches = [make_batch(seed=0), make_batch(seed=1)]
    expected = gradients(clip, case_options(loss, micro), batches, Fabric(accelerator="cpu"))
    found = torch.load(two_processes / f"{loss}-{micro}.pt", weights_only=True)
    assert found.pop("loss").item() == pytest.approx(expected[0], rel=1e-5)
    assert_same(expected[1], found)
