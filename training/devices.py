"""The devices of a run, through Lightning Fabric: one, several, or several machines."""

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision.amp import MixedPrecision
from lightning_fabric.plugins.precision.precision import Precision as Plugin
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from lightning_fabric.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from runtime.errors import DataError, EdgeClipError

from .cpu import keep_memory
from .options import Precision, TrainOptions

# So long the others wait while the first computes features, or evaluates an epoch.
_PATIENCE = timedelta(days=1)
T = TypeVar("T")


def make_fabric(options: TrainOptions) -> Fabric:
    """Starts the run's processes (under torchrun: joins them). Raises DataError for what this
    machine has not."""
    cuda = torch.cuda.is_available()
    if options.precision == "fp16" and not cuda:
        raise DataError("--precision fp16 needs a CUDA device; use bf16 or fp32 here")
    if cuda and options.devices > torch.cuda.device_count():
        raise DataError(f"--devices {options.devices}: there are {torch.cuda.device_count()} GPUs")
    _check_launch(options.devices * options.nodes)
    with _plain_lightning():
        fabric = Fabric(
            accelerator="cuda" if cuda else "cpu",
            devices=options.devices,
            num_nodes=options.nodes,
            strategy=_strategy(options),
            plugins=_precision(options.precision, "cuda" if cuda else "cpu"),
        )
        fabric.launch()
    if cuda:
        torch.set_float32_matmul_precision("high")  # TF32, as convolutions have it
    else:
        keep_memory()
    return fabric


class _Autocast(MixedPrecision):
    """Lightning's, but what goes into the model stays as it is: embeddings that were computed
    once, rounded to 8 bits, would be another's."""

    def convert_input(self, data: Any) -> Any:
        return data


def _precision(name: Precision, device: str) -> Plugin:
    if name == "fp32":
        return Plugin()
    return _Autocast("bf16-mixed" if name == "bf16" else "16-mixed", device)


def _check_launch(processes: int) -> None:
    """Without this, each of torchrun's processes would be a run of its own, into one folder."""
    started = int(os.environ.get("WORLD_SIZE", processes))
    if "TORCHELASTIC_RUN_ID" in os.environ and started != processes:
        raise DataError(
            f"torchrun started {started} processes, but --devices times --nodes is {processes}"
        )


def _strategy(options: TrainOptions) -> Strategy | str:
    if options.devices * options.nodes == 1:
        return "auto"
    if options.strategy == "ddp":
        return DDPStrategy()
    return ModelParallelStrategy(
        _shard, data_parallel_size=options.devices * options.nodes, tensor_parallel_size=1
    )


def _shard(towers: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shards each block, and then what is left, over the devices."""
    own = mesh["data_parallel"]
    for module in towers.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.ndim:  # scalars cannot be sharded
                own_shape = parameter.detach().reshape(1)
                setattr(module, name, nn.Parameter(own_shape, parameter.requires_grad))
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


class First:
    """What the first process does while the others wait for it, be it for hours; what it cannot do
    is an error in all of them."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self._group: Any = None
        if fabric.world_size > 1:  # not NCCL, whose time-out is for real hangs
            self._group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)

    def __call__(self, work: Callable[[], T]) -> T | None:
        """Runs `work` in the first process; the result is None in the others."""
        result, error = None, None
        if self._fabric.is_global_zero:
            try:
                result = work()
            except EdgeClipError as found:
                error = found
        box = [error]
        if self._group:
            torch.distributed.broadcast_object_list(box, src=0, group=self._group)
        if box[0]:
            raise box[0]
        return result


def gather_objects(value: T) -> list[T]:
    """What each process has, in their order."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


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
