"""Where an engine's input and output lie: in memory of the GPU's own, or in the host's."""

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from .cuda import Cuda, HostArray

ROUNDS = 7


class Buffers:
    """The input and the output of one engine: pinned arrays of the host, and their addresses on
    the GPU.

    With `mapped` the GPU reads and writes the host's arrays (zero-copy), which only one that shares
    the host's memory does well; otherwise it has memory of its own, and every run copies. `graph`
    is a recorded run over them, 0 where there is none. Raises CudaError.
    """

    def __init__(
        self, cuda: Cuda, batch: tuple[int, ...], dtype: DTypeLike, dim: int, mapped: bool
    ) -> None:
        self.mapped, self.graph = mapped, 0
        self._cuda = cuda
        self._held = contextlib.ExitStack()
        try:
            self.input = self._host(batch, dtype)
            self.output = self._host((batch[0], dim), np.float32)
            self.device_input = self._device(self.input)
            self.device_output = self._device(self.output)
        except BaseException:
            self.close()
            raise
        self._held.callback(self.keep, 0)
        self.input.array[...] = 0

    def _host(self, shape: tuple[int, ...], dtype: DTypeLike) -> HostArray:
        made = self._cuda.host(shape, dtype, mapped=self.mapped)
        self._held.callback(self._cuda.free_host, made)
        return made

    def _device(self, host: HostArray) -> int:
        if self.mapped:
            return host.device_pointer
        pointer = self._cuda.alloc(host.array.nbytes)
        self._held.callback(self._cuda.free, pointer)
        return pointer

    def upload(self, size: int, stream: int) -> None:
        """Has the input of a batch copied to the GPU, where it is not there already."""
        if not self.mapped:
            row = self.input.array[:1].nbytes
            self._cuda.upload(self.device_input, self.input, size * row, stream)

    def download(self, size: int, stream: int) -> None:
        """Has the output of a batch copied to the host, where it is not there already."""
        if not self.mapped:
            row = self.output.array[:1].nbytes
            self._cuda.download(self.output, self.device_output, size * row, stream)

    def keep(self, graph: int) -> None:
        """Takes a recorded run in the place of another; 0 for none."""
        if self.graph:
            self._cuda.free_graph(self.graph)
        self.graph = graph

    def close(self) -> None:
        """Gives all of it back. The arrays must not be touched after it."""
        self._held.close()


def fastest(calls: Sequence[Callable[[], Any]]) -> int:
    """Which of several calls takes the least time: the medians of rounds in which they take turns,
    so that a clock that speeds up or slows down meanwhile favours none."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, taken in zip(calls, seconds, strict=True):
            begin = time.perf_counter()
            call()
            taken.append(time.perf_counter() - begin)
    medians = [statistics.median(taken) for taken in seconds]
    return medians.index(min(medians))
