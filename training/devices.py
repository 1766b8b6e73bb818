"""The devices of a run, through Lightning Fabric: one, several, or several machines."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from lightning_fabric.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from runtime.errors import DataError

from .options import TrainOptions

# The others wait that long while the first computes features, or evaluates an epoch.
_PATIENCE = timedelta(days=1)
_PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def make_fabric(options: TrainOptions) -> Fabric:
    """Starts the run's processes (under torchrun: joins them). Raises DataError for what this
    machine has not."""
    cuda = torch.cuda.is_available()
    if options.precision == "fp16" and not cuda:
        raise DataError("--precision fp16 needs a CUDA device; use bf16 or fp32 here")
    if cuda and options.devices > torch.cuda.device_count():
        raise DataError(f"--devices {options.devices}: there are {torch.cuda.device_count()} GPUs")
    with _plain_lightning():
        fabric = Fabric(
            accelerator="cuda" if cuda else "cpu",
            devices=options.devices,
            num_nodes=options.nodes,
            strategy=_strategy(options),
            precision=_PRECISIONS[options.precision],  # type: ignore[arg-type]
        )
        fabric.launch()
    return fabric


def _strategy(options: TrainOptions) -> Strategy | str:
    if options.devices * options.nodes == 1:
        return "auto"
    if options.strategy == "ddp":
        return DDPStrategy(timeout=_PATIENCE)
    return ModelParallelStrategy(
        _shard,
        data_parallel_size=options.devices * options.nodes,
        tensor_parallel_size=1,
        timeout=_PATIENCE,
    )


def _shard(towers: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shards each block, and then what is left, over the devices."""
    own = mesh["data_parallel"]
    for module in towers.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.ndim:  # scalars cannot be sharded
                setattr(module, name, nn.Parameter(parameter.detach().reshape(1)))
    for name, module in towers.named_modules():
        if name.endswith(tuple(f"resblocks.{i}" for i in range(100))):
            fully_shard(module, mesh=own)
    fully_shard(towers, mesh=own)
    return towers


class _AllGather(torch.autograd.Function):
    """all_gather whose gradient is the sum of what all processes made of a row."""

    @staticmethod
    def forward(_: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def gather(rows: Tensor) -> Tensor:
    """The rows [n, ...] of every process, [processes * n, ...] in their order, with gradients."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows
    gathered: Tensor = _AllGather.apply(rows)  # type: ignore[no-untyped-call]
    return gathered


@contextlib.contextmanager
def _plain_lightning() -> Iterator[None]:
    """Lightning without its banners and its advice."""
    loggers = [logging.getLogger(name) for name in ("lightning_fabric", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning_fabric")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
