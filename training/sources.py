"""Where a run's pairs come from: tables, folders and shards, mixed by weight."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from calibration.pairs import Pairs, read_pairs
from runtime.errors import DataError

from .options import TrainOptions
from .shards import Shards, is_shards, open_shards

Slots = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Source:
    """Pairs by row, or shards as a stream, and how often they are drawn from."""

    name: str
    data: Pairs | Shards
    weight: float

    @property
    def size(self) -> int:
        """How many pictures there are."""
        return self.data.samples if isinstance(self.data, Shards) else len(self.data)


def open_sources(options: TrainOptions, progress: Progress) -> list[Source]:
    """Opens DATA and every --mix. Raises DataError for what cannot be used."""
    sources = [_open(options.data, 1.0, options, progress)]
    for text in options.mix:
        name, _, weight = text.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not name or not (math.isfinite(value) and value > 0):
            raise DataError(f"--mix is SOURCE=WEIGHT, such as more.csv=0.5, not {text!r}")
        sources.append(_open(name, value, options, progress))
    return sources


def _open(name: str, weight: float, options: TrainOptions, progress: Progress) -> Source:
    path = name if "://" in name else os.path.expanduser(name)
    if not is_shards(path):
        if "://" in path:
            raise DataError(f"{name}: from the net only shards (.tar) are read")
        return Source(name, read_pairs(Path(path), options.templates), weight)
    task = progress.add_task("Counting shards", total=None)
    shards = open_shards(
        path,
        options.templates,
        options.resampled,
        options.epoch_size,
        lambda: progress.advance(task),
    )
    progress.remove_task(task)
    return Source(name, shards, weight)


@dataclass(frozen=True)
class Plan:
    """Which pair stands in which slot of which batch: fixed by the seed, for any number of
    processes, so that a run can be taken up at any step.

    `sizes` are the sources' rows, None for a stream.
    """

    sizes: tuple[int | None, ...]
    weights: tuple[float, ...]
    pairs: int
    batch_size: int
    seed: int

    @property
    def batches(self) -> int:
        """Batches an epoch; what is left over of the last is another time's."""
        return self.pairs // self.batch_size

    def slots(self, epoch: int) -> Slots:
        """The slots of an epoch, [batches * batch_size, 2]: source, and row in it (-1: the next of
        the stream). Within a source no row comes twice before each has come once."""
        rng = np.random.default_rng((self.seed, epoch))
        count = self.batches * self.batch_size
        if self.sizes == (None,):
            return np.broadcast_to(np.array([0, -1]), (count, 2))  # of any length in no memory
        sources = np.zeros(count, np.int64)
        if len(self.sizes) > 1:
            share = np.array(self.weights) / sum(self.weights)
            sources = rng.choice(len(self.sizes), count, p=share)
        rows = np.full(count, -1, np.int64)
        for source, size in enumerate(self.sizes):
            if size is not None:
                own = np.flatnonzero(sources == source)
                passes = [rng.permutation(size) for _ in range(-(-len(own) // size))]
                rows[own] = np.concatenate([*passes, own[:0]])[: len(own)]
        return np.stack([sources, rows], axis=1)


def make_plan(sources: Sequence[Source], options: TrainOptions, world: int) -> Plan:
    """The plan of a run on `world` devices. Raises DataError where there is too little data."""
    pairs = options.epoch_size or sum(source.size for source in sources)
    batch = min(options.batch_size, pairs // world * world)
    if batch < 2:
        raise DataError(
            f"{options.data}: {pairs} pictures are too few: at least 2, and one for each device"
        )
    return Plan(
        tuple(None if isinstance(s.data, Shards) else s.size for s in sources),
        tuple(s.weight for s in sources),
        pairs,
        batch,
        options.seed,
    )
