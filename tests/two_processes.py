"""Run by torchrun from test_step.py: one rank's half of a batch, its loss and gradients."""

import sys
from pathlib import Path

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from test_step import CASES, case_options, gradients, make_batch, make_clip

from training.batches import TENSORS, Batch


def half(batch: Batch, rank: int) -> Batch:
    rows = slice(rank * len(batch.drawn) // 2, (rank + 1) * len(batch.drawn) // 2)
    return batch._replace(**{name: getattr(batch, name)[rows] for name in TENSORS})


def main(folder: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy())
    fabric.launch()
    own_folder = folder / str(fabric.global_rank)
    own_folder.mkdir()
    for loss, micro in CASES:
        clip = make_clip(Path(__file__).parent / "tiny.json", loss, own_folder)
        batches = [half(make_batch(seed=seed), fabric.global_rank) for seed in (0, 1)]
        own, found = gradients(clip, case_options(loss, micro), batches, fabric)
        mean = fabric.all_reduce(torch.tensor(own), reduce_op="mean")
        if fabric.is_global_zero:
            torch.save({**found, "loss": mean}, folder / f"{loss}-{micro}.pt")
    fabric.barrier()  # gloo's threads may abort a process whose neighbour has left before
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
