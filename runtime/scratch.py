"""Memory that a thread uses again for each frame, so that a stream of frames allocates none."""

import math
import threading
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

MOST = 64 << 20  # bytes: what is larger came of an unusual frame, and goes with it


class Scratch(threading.local):
    """Named pieces of memory, of each thread its own: no two frames ever meet in one."""

    def __init__(self) -> None:
        self._kept: dict[str, NDArray[np.uint8]] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array with anything in it; the caller's until this thread takes `name` again."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        memory = self._kept.get(name)
        if memory is None or memory.size < size:
            memory = np.empty(size, dtype=np.uint8)
            if size <= MOST:
                self._kept[name] = memory
        return memory[:size].view(dtype).reshape(shape)


scratch = Scratch()
