"""One training step's gradient: of the whole batch, however little of it fits on a device."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from .average import Average
from .batches import Batch
from .distill_objective import DistillObjective
from .objective import Objective, accuracy
from .towers import Embeddings

_ROWS = ("image", "text", "classes", "words", "said")  # what has a row for each pair


@dataclass(frozen=True)
class Result:
    """A step's loss and accuracy in the batch, scalars on the device."""

    loss: Tensor
    accuracy: Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """Computes the gradient of one batch.

    With `micro_batch` it is GradCache's (Gao et al. 2021, arXiv:2101.06983): embed the pairs a
    few at a time without their graphs, take the loss of the whole batch and its gradient at the
    embeddings, then embed them again, a few at a time, to carry that gradient on into the weights.
    That is the gradient of the whole batch, at two forward passes; but for batch normalisation,
    which sees the statistics of the few.

    Random layers are seeded by the step, so that nothing of their state needs to be kept.
    """

    fabric: Fabric
    towers: Any  # Fabric's wrapper of Towers
    objective: Objective | DistillObjective
    slow: Average | None
    micro_batch: int
    seed: int

    def backward(self, batch: Batch, number: int) -> Result:
        """Adds the gradient of step `number`'s loss to the weights' gradients."""
        count = len(batch.images)
        parts = -(-count // (self.micro_batch or count))
        size = -(-count // parts)  # of about the same size: a norm needs more than one picture
        each = len(batch.texts) // len(batch.images)
        chunks = [
            (batch.images[i : i + size], batch.texts[i * each : (i + size) * each])
            for i in range(0, len(batch.images), size)
        ]
        slow = self._slow(chunks)
        if len(chunks) > 1:
            return self._cached(batch, chunks, slow, number)
        out = self._embed(chunks[0], number, 0)
        loss = self.objective(out, batch, slow)
        self.fabric.backward(loss)
        return Result(loss.detach(), accuracy(out, batch))

    def _embed(self, chunk: tuple[Tensor, Tensor], number: int, part: int) -> Embeddings:
        key = (self.seed, number, self.fabric.global_rank, part)
        torch.manual_seed(int(np.random.default_rng(key).integers(2**62)))
        found: Embeddings = self.towers(*chunk)
        return found

    @torch.no_grad()
    def _slow(self, chunks: list[tuple[Tensor, Tensor]]) -> Embeddings | None:
        if self.slow is None:
            return None
        with self.fabric.autocast():
            return _joined([self.slow.module(*chunk) for chunk in chunks])

    def _cached(
        self,
        batch: Batch,
        chunks: list[tuple[Tensor, Tensor]],
        slow: Embeddings | None,
        number: int,
    ) -> Result:
        with torch.no_grad(), _still(self.towers):
            whole = _joined([self._embed(c, number, i) for i, c in enumerate(chunks)])
        leaves = Embeddings(*map(_leaf, whole))
        loss = self.objective(leaves, batch, slow)
        loss.backward()
        begin = 0
        for part, chunk in enumerate(chunks):
            more, end = part < len(chunks) - 1, begin + len(chunk[1])
            with self.fabric.no_backward_sync(self.towers, enabled=more):
                out = self._embed(chunk, number, part)
                self.fabric.backward(_carrier(out, leaves, slice(begin, end), scalars=not more))
            begin = end
        return Result(loss.detach(), accuracy(leaves, batch))


def _leaf(value: Tensor | None) -> Any:
    return None if value is None else value.detach().requires_grad_()


def _joined(parts: list[Embeddings]) -> Embeddings:
    first = parts[0]
    rows = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in _ROWS
        if getattr(first, name) is not None
    }
    return first._replace(**rows)


def _carrier(out: Embeddings, leaves: Embeddings, rows: slice, scalars: bool) -> Tensor:
    """A scalar whose gradient at `out` is the one that `leaves` hold for these rows; the scale's
    and the bias's are counted once, with `scalars`."""
    total = torch.zeros((), device=out.image.device)
    for name, value, leaf in zip(Embeddings._fields, out, leaves, strict=True):
        if value is None or leaf is None or leaf.grad is None:
            continue
        if name in _ROWS:
            total = total + (value * leaf.grad[rows]).sum()
        else:
            total = total + (value * leaf.grad).sum() * float(scalars)
    return total


@contextlib.contextmanager
def _still(module: nn.Module) -> Iterator[None]:
    """Keeps the running statistics of batch normalisation as they are."""
    layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            layer.momentum = 0.0
        yield
    finally:
        for layer, momentum in zip(layers, kept, strict=True):
            layer.momentum = momentum
