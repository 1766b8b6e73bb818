"""The little of CUDA that an engine needs, behind one interface: pycuda, else cuda-bindings, else
ctypes on CUDA's own runtime library.

All of them work in the primary context of device 0 (CUDA_VISIBLE_DEVICES says which GPU that is),
the one that TensorRT uses as well. Nothing of CUDA is imported before `open_cuda` is called.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .errors import BackendUnavailable, CudaError

__all__ = ["NAMES", "Cuda", "CudaError", "Device", "HostArray", "open_cuda"]

NAMES = ("pycuda", "cuda-bindings", "ctypes")


@dataclass(frozen=True)
class Device:
    """A GPU: `capability` as (8, 7), `integrated` where it shares the host's memory (a Jetson),
    `memory` in bytes, free or not."""

    name: str
    capability: tuple[int, int]
    integrated: bool
    memory: int


@dataclass(frozen=True, eq=False)
class HostArray:
    """Pinned memory of the host: an array that lies in it and its address.

    `device_pointer` is its address for the GPU where it was asked for as `mapped`, else 0. After
    `free_host`, the array must not be touched.
    """

    array: NDArray[Any]
    pointer: int
    device_pointer: int

    def part(self, size: int) -> NDArray[np.uint8]:
        """The first `size` bytes, as a view. Raises ValueError where it has fewer."""
        if not 0 <= size <= self.array.nbytes:
            raise ValueError(f"{size} bytes of an array that has {self.array.nbytes}")
        return self.array.reshape(-1).view(np.uint8)[:size]


class Cuda(Protocol):
    """CUDA on device 0. Handles (memory, streams, events, graphs) are ints; sizes are in bytes.

    Every method may be called from any thread, and raises CudaError where CUDA refuses. `graphs`:
    whether the four methods of graphs work; `notes`: what was tried before, and why it was not
    taken.
    """

    name: str
    graphs: bool
    notes: tuple[str, ...]

    def device(self) -> Device: ...

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the GPU."""
        ...

    def alloc(self, size: int) -> int:
        """Memory of the GPU, not cleared."""
        ...

    def free(self, pointer: int) -> None: ...

    def host(self, shape: tuple[int, ...], dtype: DTypeLike, mapped: bool = False) -> HostArray:
        """A pinned array, not cleared; `mapped` gives it an address on the GPU too."""
        ...

    def free_host(self, host: HostArray) -> None: ...

    def upload(self, device: int, host: HostArray, size: int, stream: int) -> None:
        """Copies the first `size` bytes to the GPU; does not wait."""
        ...

    def download(self, host: HostArray, device: int, size: int, stream: int) -> None:
        """Copies `size` bytes from the GPU to the start of `host`; does not wait."""
        ...

    def stream(self) -> int:
        """A stream that does not wait for the default one."""
        ...

    def free_stream(self, stream: int) -> None: ...

    def synchronize(self, stream: int) -> None:
        """Waits until a stream has done all its work. Other Python threads run meanwhile."""
        ...

    def event(self) -> int: ...

    def free_event(self, event: int) -> None: ...

    def record(self, event: int, stream: int) -> None: ...

    def elapsed(self, start: int, end: int) -> float:
        """Milliseconds between two recorded events, after waiting for `end`."""
        ...

    def begin_capture(self, stream: int) -> None:
        """Records what this thread asks of a stream from here on, instead of doing it."""
        ...

    def end_capture(self, stream: int) -> int:
        """Ends the recording, also of one that failed, and makes a graph of it that can be run.

        Raises CudaError where something in it cannot be recorded.
        """
        ...

    def launch(self, graph: int, stream: int) -> None:
        """Runs a graph on a stream; does not wait."""
        ...

    def free_graph(self, graph: int) -> None: ...


def open_cuda(name: str = "auto") -> Cuda:
    """CUDA by `name`: "pycuda", "cuda-bindings", "ctypes", or "auto" for the first that works.

    Raises BackendUnavailable, with what is missing and how to get it.
    """
    if name != "auto":
        return _open(name)
    notes: list[str] = []
    for each in NAMES:
        try:
            found = _open(each)
        except BackendUnavailable as error:
            notes.append(str(error))
        else:
            found.notes = tuple(notes)
            return found
    raise BackendUnavailable("CUDA cannot be used here. " + ". ".join(notes))


def _open(name: str) -> Cuda:
    if name == "pycuda":
        from .cuda_pycuda import PycudaCuda

        return PycudaCuda()
    if name == "cuda-bindings":
        from .cuda_bindings import BindingsCuda

        return BindingsCuda()
    if name == "ctypes":
        from .cuda_ctypes import open_ctypes

        return open_ctypes()
    raise BackendUnavailable(f"there is no CUDA binding {name!r}; use {', '.join(NAMES)} or 'auto'")
