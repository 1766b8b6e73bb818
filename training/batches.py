"""The batches of a run, in an order that its plan fixes, made by worker processes."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from calibration.pairs import Bad
from runtime.errors import DataError, EdgeClipError

from .interrupts import leave_signals_to_parent
from .rows import Maker, Row, Rows, StreamRows, TableRows
from .samples import MAX_CAPTIONS
from .shards import Shards
from .sources import Plan

NO_ID = -1


class Batch(NamedTuple):
    """The own pairs of one process: n pictures with K captions each (`--captions`).

    `images`: uint8 [n, H, W, 3], or cached features [n, ...]; `texts`: token ids int64 [n * K, L],
    or cached embeddings [n * K, D], each picture's captions side by side. `drawn`: int64 [n * K],
    the captions' ids; `own`: int64 [n * K, M], the ids of all captions that are true of the
    pair's picture, padded with -1; `targets`: int64 [n * K], its class, or -1. `names` says which
    pictures these are; `bad` what was left out since the last batch.
    """

    images: Tensor
    texts: Tensor
    drawn: Tensor
    own: Tensor
    targets: Tensor
    names: tuple[str, ...]
    bad: tuple[Bad, ...]

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on a device."""
        return self._replace(**{k: getattr(self, k).to(device, non_blocking=True) for k in TENSORS})

    def pin_memory(self) -> "Batch":
        """The same batch in pages that a GPU can copy from (called by the loader)."""
        return self._replace(**{k: getattr(self, k).pin_memory() for k in TENSORS})


TENSORS = ("images", "texts", "drawn", "own", "targets")


@dataclass
class PairBatches(IterableDataset[Batch]):
    """The batches of one process, from batch number `start` to the end of the last epoch.

    `sources` are tables of rows, or shards. Worker processes take the batches in turn, so that
    they come in order. What a batch holds depends on the plan alone; with shards also on the
    number of workers, each of which reads its own. Samples named in `known_bad` were found
    unusable before `start`.
    """

    sources: Sequence[TableRows | Shards]
    plan: Plan
    maker: Maker
    epochs: int
    rank: int = 0
    world: int = 1
    start: int = 0
    known_bad: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return self.plan.batches * self.epochs - self.start

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        worker = (worker + self.start) % workers  # the loader asks worker 0 first
        for epoch in range(self.start // self.plan.batches, self.epochs):
            yield from self._epoch(epoch, worker, workers)

    def _epoch(self, epoch: int, worker: int, workers: int) -> Iterator[Batch]:
        rows = [self._rows(n, epoch, worker, workers) for n in range(len(self.sources))]
        slots = self.plan.slots(epoch)
        size = self.plan.batch_size // self.world
        for batch in range(self.plan.batches):
            number = epoch * self.plan.batches + batch
            if number % workers != worker:
                continue
            begin = batch * self.plan.batch_size + self.rank * size
            wanted = range(begin, begin + size)
            if number >= self.start:
                yield self._batch(epoch, wanted, slots, rows)
                continue
            for source, known in enumerate(rows):
                if isinstance(known, StreamRows):
                    known.pass_over(int((slots[begin : begin + size, 0] == source).sum()))

    def _rows(self, number: int, epoch: int, worker: int, workers: int) -> TableRows | StreamRows:
        source = self.sources[number]
        if isinstance(source, TableRows):
            return source
        seed = (self.plan.seed, epoch, number)
        reader, readers = self.rank * workers + worker, self.world * workers
        stream = source.stream(seed, reader, readers, self.known_bad)
        return StreamRows(stream, self.maker)

    def _batch(self, epoch: int, wanted: range, slots: Any, sources: Sequence[Rows]) -> Batch:
        rows = []
        for slot in wanted:
            source, index = slots[slot].tolist()
            rows.append(sources[source].take(index, (self.plan.seed, epoch, slot)))
        self.maker.reader.flush()
        bad = tuple(bad for source in sources for bad in source.bad)
        for source in sources:
            source.bad.clear()
        return collate(rows, self.most, bad)

    @property
    def most(self) -> int:
        """The most captions that a picture of any source has."""
        return max(s.most if isinstance(s, TableRows) else MAX_CAPTIONS for s in self.sources)


def collate(rows: Sequence[Row], most: int, bad: tuple[Bad, ...] = ()) -> Batch:
    """Rows as one batch, room for `most` captions a picture."""
    own = np.full((len(rows), most), NO_ID, np.int64)
    for line, row in zip(own, rows, strict=True):
        line[: len(row.own)] = row.own
    each = len(rows[0].drawn)
    texts = torch.from_numpy(np.concatenate([row.text for row in rows]))
    return Batch(
        torch.from_numpy(np.stack([row.image for row in rows])),
        texts if texts.is_floating_point() else texts.long(),
        torch.tensor([drawn for row in rows for drawn in row.drawn]),
        torch.from_numpy(own.repeat(each, axis=0)),
        torch.tensor([row.target for row in rows]).repeat_interleave(each),
        tuple(row.name for row in rows),
        bad,
    )


def loader(dataset: PairBatches, workers: int) -> Iterator[Batch]:
    """Whole batches in order, made by `workers` processes (0: by this one). Raises what they
    raise, and DataError where one of them is killed."""
    batches = DataLoader(
        _Errors(dataset),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=begin_worker,
        pin_memory=torch.cuda.is_available(),
    )
    try:
        for batch in batches:
            if isinstance(batch, EdgeClipError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a process that makes batches was killed ({error}): was there too little memory, or "
            "room in /dev/shm? Fewer --workers need less of both"
        ) from error


class _Errors(IterableDataset[Batch | EdgeClipError]):
    """The same batches; an error comes as the last item, for from a worker PyTorch would raise it
    with a whole traceback for its message."""

    def __init__(self, batches: PairBatches) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch | EdgeClipError]:
        try:
            yield from self._batches
        except EdgeClipError as error:
            yield error


def _as_it_is(batch: Any) -> Any:
    return batch


def begin_worker(_: int) -> None:
    """What a process of a loader does first."""
    leave_signals_to_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or the library warns that it was forked
