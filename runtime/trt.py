"""The TensorRT backend: runs an engine on the GPU, with numpy, tensorrt and a CUDA binding only."""

import contextlib
import itertools
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from platform import machine
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends import Border
from .cuda import Cuda, CudaError, open_cuda
from .engine_file import EngineInfo, Platform
from .errors import BackendUnavailable, FrameError
from .trt_buffers import Buffers, fastest
from .trt_plan import INPUT_TYPES, load_plan

OLDEST = (8, 6)


def tensorrt() -> Any:
    """The tensorrt package. Raises BackendUnavailable, with the way to get it, where it is missing
    or too old."""
    try:
        import tensorrt as found
    except (ImportError, OSError) as error:  # OSError: a library that the package needs
        raise BackendUnavailable(_how_to_get_it(error)) from error
    version = tuple(int(part) for part in found.__version__.split(".")[:2])
    if version < OLDEST:
        raise BackendUnavailable(
            f"TensorRT {found.__version__} is too old: before 8.6 it has no LayerNormalization. "
            "On a Jetson, JetPack 6.0 has 8.6"
        )
    return found


def _how_to_get_it(error: Exception) -> str:
    if Path("/etc/nv_tegra_release").exists():
        return (
            f"TensorRT cannot be imported ({error}). On a Jetson it is a system package: "
            "sudo apt-get install nvidia-jetpack, and make the virtual environment with "
            "python3 -m venv --system-site-packages"
        )
    return (
        f"TensorRT cannot be imported ({error}): pip install 'edgeclip[tensorrt]' "
        "(it needs an NVIDIA GPU and its driver)"
    )


def platform(cuda: Cuda) -> Platform:
    """The TensorRT, the GPU and the computer that are here."""
    device, system = cuda.device(), f"{sys.platform}-{machine().lower()}"
    return Platform(str(tensorrt().__version__), device.name, device.capability, system)


class TrtEncoder:
    """An engine that is ready to run: one input, `embeddings` float32 [N, D] out.

    Buffers are allocated once. A GPU that shares the host's memory (Jetson) may work on that, or on
    copies in memory of its own: both are timed at the start, and the faster one stays. A batch of a
    fixed size is replayed as a CUDA graph where the binding can. Larger batches are run in parts.
    Safe to call from several threads, which take turns.

    `trusted` says that this process built the plan itself. Raises as `load_plan`, and
    BackendUnavailable where the engine does not run.
    """

    name = "tensorrt"

    def __init__(
        self,
        plan: Path,
        info: EngineInfo,
        border: Border,
        cuda: Cuda | None = None,
        trusted: bool = False,
    ) -> None:
        self.info = info
        self._border = border
        self._trt = tensorrt()
        self._cuda = cuda or open_cuda()
        self._here = platform(self._cuda)
        self._engine, self._runtime, self._logger = load_plan(
            self._trt, plan, info, border, trusted
        )
        self._lock = threading.Lock()
        self._held = contextlib.ExitStack()
        self._free = weakref.finalize(self, self._held.close)
        self._free.atexit = False  # CUDA may be gone by then, and its memory with it
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        """A stream, an execution context, and the buffers that are the fastest here."""
        cuda = self._cuda
        self._stream = cuda.stream()
        self._held.callback(cuda.free_stream, self._stream)
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise BackendUnavailable(
                f"TensorRT has no room to run the engine: {self._logger.said()}"
            )
        ways = [self._allocated(mapped=False)]
        if cuda.device().integrated:
            ways.append(self._allocated(mapped=True))
        best = self._fastest(ways) if len(ways) > 1 else ways[0]
        for buffers in ways:
            if buffers is not best:
                buffers.close()
        self._prepare(best)

    def _allocated(self, mapped: bool) -> Buffers:
        _, dtype = INPUT_TYPES[self._border.name]
        batch = (self.info.batches[2], *self._border.shape)
        made = Buffers(self._cuda, batch, dtype, self._border.dim, mapped)
        self._held.callback(made.close)
        return made

    def _fastest(self, ways: Sequence[Buffers]) -> Buffers:
        """By whole runs of the batch that the engine is best at, from the host and back to it."""
        _, best, _ = self.info.batches
        batch = np.zeros((best, *self._border.shape), ways[0].input.array.dtype)
        for buffers in ways:
            self._prepare(buffers)
        return ways[fastest([partial(self._through, buffers, batch) for buffers in ways])]

    def _prepare(self, buffers: Buffers) -> None:
        """Has the engine work on these buffers: runs the largest batch, and records it."""
        smallest, _, largest = self.info.batches
        buffers.keep(0)
        self._use(buffers)
        self._run(largest)
        if self._cuda.graphs and smallest == largest:
            buffers.keep(self._captured(largest))

    def _use(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._context.set_tensor_address(self._border.name, buffers.device_input)
        self._context.set_tensor_address("embeddings", buffers.device_output)

    def _through(self, buffers: Buffers, batch: NDArray[Any]) -> None:
        self._use(buffers)
        self._embed(batch, np.empty((len(batch), self._border.dim), np.float32))

    def _captured(self, size: int) -> int:
        """The graph of one run; 0 where TensorRT cannot record it: such are run call by call."""
        self._cuda.begin_capture(self._stream)
        recorded = True
        try:
            self._enqueue(size)
        except BackendUnavailable:
            recorded = False
        try:
            graph = self._cuda.end_capture(self._stream)
        except CudaError:
            return 0
        if not recorded:
            self._cuda.free_graph(graph)
        return graph if recorded else 0

    def _enqueue(self, size: int, events: Sequence[int] = ()) -> None:
        """Upload, engine, download; `events` are recorded before, between and after them."""
        marks = iter(events)
        self._mark(marks)
        self._buffers.upload(size, self._stream)
        self._mark(marks)
        if not self._context.execute_async_v3(self._stream):
            raise BackendUnavailable(f"TensorRT failed on a batch of {size}: {self._logger.said()}")
        self._mark(marks)
        self._buffers.download(size, self._stream)
        self._mark(marks)

    def _mark(self, events: Iterator[int]) -> None:
        event = next(events, 0)
        if event:
            self._cuda.record(event, self._stream)

    def _run(self, size: int) -> None:
        if self._buffers.graph:
            self._cuda.launch(self._buffers.graph, self._stream)
        else:
            self._shape(size)
            self._enqueue(size)
        self._cuda.synchronize(self._stream)

    def _shape(self, size: int) -> None:
        if not self._context.set_input_shape(self._border.name, (size, *self._border.shape)):
            raise BackendUnavailable(f"the engine takes no batch of {size}: {self._logger.said()}")

    def __call__(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Embeds a batch: uint8 frames [N, H, W, 3] or int32 tokens [N, L]."""
        self._require(batch)
        largest = self.info.batches[2]
        found = np.empty((len(batch), self._border.dim), np.float32)
        with self._lock:
            for start in range(0, len(batch), largest):
                end = start + largest
                self._embed(batch[start:end], found[start:end])
        return found

    def _embed(self, part: NDArray[Any], found: NDArray[np.float32]) -> None:
        """One run; of a fixed size, a smaller part is filled up."""
        self._buffers.input.array[: len(part)] = part
        self._run(max(len(part), self.info.batches[0]))
        found[...] = self._buffers.output.array[: len(part)]

    def _require(self, batch: NDArray[Any]) -> None:
        shape, dtype = self._border.shape, self._buffers.input.array.dtype
        if batch.shape[1:] != shape or batch.dtype != dtype:
            raise FrameError(
                f"the engine takes {dtype} {['N', *shape]}, not {batch.dtype} {list(batch.shape)}"
            )

    def timed(self, batch: NDArray[Any]) -> dict[str, float]:
        """Milliseconds on the GPU of one batch of at most the largest size, by CUDA's events:
        upload, engine, download. No graph is used: stages in one cannot be told apart."""
        self._require(batch)
        cuda, size = self._cuda, max(len(batch), self.info.batches[0])
        with self._lock:
            self._buffers.input.array[: len(batch)] = batch
            self._shape(size)
            events = [cuda.event() for _ in range(4)]
            try:
                self._enqueue(size, events)
                cuda.synchronize(self._stream)
                spans = [cuda.elapsed(a, b) for a, b in itertools.pairwise(events)]
            finally:
                for event in events:
                    cuda.free_event(event)
        return dict(zip(("upload", "engine", "download"), spans, strict=True))

    def inspected(self) -> str:
        """What TensorRT says of the engine's layers, as JSON."""
        form = self._trt.LayerInformationFormat.JSON
        return str(self._engine.create_engine_inspector().get_engine_information(form))

    def close(self) -> None:
        """Gives the memory of the GPU back, as the end of the object does too. The encoder cannot
        be used after it."""
        with self._lock:
            self._context = self._engine = self._runtime = None
            self._free()

    def __repr__(self) -> str:
        here, info = self._here, self.info
        words = [f"tensorrt {here.tensorrt}", here.gpu, info.precision]
        words += ["version compatible"] * info.version_compatible
        words += ["hardware compatible"] * info.hardware_compatible
        words += ["zero-copy" if self._buffers.mapped else "copies"]
        return ", ".join([*words, "CUDA graph" if self._buffers.graph else "no CUDA graph"])
