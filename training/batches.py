"""Batches for contrastive training: pixels, one caption an image, and who is true of whom."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from runtime.frames import Frame

from .data import Pairs


class Batch(NamedTuple):
    """`frames`: uint8 [N, H, W, 3]; `tokens`: int64 [N, L]; `positives`: bool [N, N], True where
    the caption of row j is one of the captions of image i."""

    frames: Tensor
    tokens: Tensor
    positives: Tensor


Rows = NDArray[np.int64]  # [N, 2]: image and caption


class PairDataset(Dataset[Batch]):
    """Whole batches by (image, caption) rows."""

    def __init__(self, pairs: Pairs, frames: Frame, tokens: NDArray[np.int32]) -> None:
        self.captions = pairs.captions
        self._frames, self._tokens = frames, tokens

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, rows: Rows) -> Batch:
        images, captions = rows[:, 0], rows[:, 1].tolist()
        columns: dict[int, list[int]] = {}
        for column, caption in enumerate(captions):
            columns.setdefault(caption, []).append(column)
        positives = torch.zeros(len(rows), len(rows), dtype=torch.bool)
        for row, image in enumerate(images):
            for caption in self.captions[image]:
                positives[row, columns.get(caption, [])] = True
        return Batch(
            torch.from_numpy(np.ascontiguousarray(self._frames[images])),
            torch.from_numpy(self._tokens[captions]).long(),
            positives,
        )


class PairSampler(Sampler[Rows]):
    """Each epoch: every image once in a new order, with one of its captions drawn at random.

    The last, smaller batch is dropped, unless it is the only one.
    """

    def __init__(self, dataset: PairDataset, batch_size: int, seed: int) -> None:
        self._captions, self._seed, self._epoch = dataset.captions, seed, 0
        self._size = min(batch_size, len(dataset))

    def __len__(self) -> int:
        return len(self._captions) // self._size

    def __iter__(self) -> Iterator[Rows]:
        rng = np.random.default_rng((self._seed, self._epoch))
        self._epoch += 1
        order = rng.permutation(len(self._captions))
        draws = rng.random(len(order))
        for start in range(0, len(self) * self._size, self._size):
            part = slice(start, start + self._size)
            rows = [
                (i, self._captions[i][int(draw * len(self._captions[i]))])
                for i, draw in zip(order[part].tolist(), draws[part].tolist(), strict=True)
            ]
            yield np.array(rows, dtype=np.int64)


def loader(dataset: PairDataset, batch_size: int, seed: int) -> DataLoader[Batch]:
    """A loader of whole batches, in this process: pixels are already decoded."""
    sampler = PairSampler(dataset, batch_size, seed)
    return DataLoader(dataset, sampler=sampler, batch_size=None)
