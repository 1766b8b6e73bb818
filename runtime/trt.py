"""The TensorRT backend: runs an engine on the GPU, with numpy, tensorrt and a CUDA binding only."""

import contextlib
import itertools
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends import Border
from .cuda import Cuda, CudaError, HostArray, open_cuda
from .engine_file import EngineInfo, Platform
from .errors import BackendUnavailable, FrameError, UnsupportedFormat

OLDEST = (8, 6)
_INPUT_TYPES = {"frames": ("UINT8", np.uint8), "tokens": ("INT32", np.int32)}


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
    """The TensorRT and the GPU that are here."""
    device = cuda.device()
    return Platform(str(tensorrt().__version__), device.name, device.capability)


def quiet_logger(trt: Any) -> Any:
    """A logger that keeps TensorRT's errors, for our own messages to say them."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

    return Logger()


class TrtEncoder:
    """An engine that is ready to run: one input, `embeddings` float32 [N, D] out.

    Buffers are allocated once: pinned on the host, and on the device; on a GPU that shares the
    host's memory (Jetson) they are one. A batch of a fixed size is replayed as a CUDA graph where
    the binding can. Larger batches are run in parts. Safe to call from several threads, which take
    turns. Raises UnsupportedFormat where the engine is no such encoder, BackendUnavailable where
    it does not run.
    """

    name = "tensorrt"

    def __init__(
        self, plan: Path, info: EngineInfo, border: Border, cuda: Cuda | None = None
    ) -> None:
        self.info = info
        self._border = border
        self._trt = tensorrt()
        self._cuda = cuda or open_cuda()
        self._logger = quiet_logger(self._trt)
        self._engine = self._deserialised(plan)
        self._check()
        self._lock = threading.Lock()
        self._graph = 0
        self._held = contextlib.ExitStack()
        self._free = weakref.finalize(self, self._held.close)
        self._free.atexit = False  # CUDA may be gone by then, and its memory with it
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _deserialised(self, plan: Path) -> Any:
        self._runtime = self._trt.Runtime(self._logger)
        try:
            content = plan.read_bytes()
        except OSError as error:  # a rebuild has just taken its place
            raise BackendUnavailable(f"{plan} cannot be read: {error.strerror}") from error
        engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise BackendUnavailable(
                f"TensorRT {self._trt.__version__} does not load {plan}: {self._said()}; "
                "build it again here with edgeclip build"
            )
        return engine

    def _said(self) -> str:
        return "; ".join(self._logger.errors[-3:]) or "it does not say why"

    def _check(self) -> None:
        """The engine has the inputs and outputs that the manifest asks for."""
        modes, engine = self._trt.TensorIOMode, self._engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        found = [
            (
                "in" if engine.get_tensor_mode(name) == modes.INPUT else "out",
                name,
                str(engine.get_tensor_dtype(name)).rpartition(".")[2],
                tuple(engine.get_tensor_shape(name))[1:],
            )
            for name in names
        ]
        kind, _ = _INPUT_TYPES[self._border.name]
        expected = [
            ("in", self._border.name, kind, self._border.shape),
            ("out", "embeddings", "FLOAT", (self._border.dim,)),
        ]
        if sorted(found) != sorted(expected):
            raise UnsupportedFormat(
                f"the engine has {found}, the manifest asks for {expected}; "
                "build it again with edgeclip build"
            )

    def _open(self) -> None:
        """Buffers, a stream and an execution context, and a first run."""
        cuda, largest = self._cuda, self.info.batches[2]
        _, dtype = _INPUT_TYPES[self._border.name]
        shared = cuda.device().integrated
        self._shared = shared
        self._input = self._host((largest, *self._border.shape), dtype)
        self._output = self._host((largest, self._border.dim), np.float32)
        self._input.array[...] = 0
        self._device_input = self._device(self._input)
        self._device_output = self._device(self._output)
        self._stream = cuda.stream()
        self._held.callback(cuda.free_stream, self._stream)
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise BackendUnavailable(f"TensorRT has no room to run the engine: {self._said()}")
        self._context.set_tensor_address(self._border.name, self._device_input)
        self._context.set_tensor_address("embeddings", self._device_output)
        self._run(largest)
        smallest, _, _ = self.info.batches
        if cuda.graphs and smallest == largest:
            self._capture(largest)

    def _host(self, shape: tuple[int, ...], dtype: Any) -> HostArray:
        """Pinned memory, which the GPU reads itself where it shares the host's."""
        made = self._cuda.host(shape, dtype, mapped=self._shared)
        self._held.callback(self._cuda.free_host, made)
        return made

    def _device(self, host: HostArray) -> int:
        """The GPU's memory beside it: the same, where that is shared."""
        if self._shared:
            return host.device_pointer
        pointer = self._cuda.alloc(host.array.nbytes)
        self._held.callback(self._cuda.free, pointer)
        return pointer

    def _capture(self, size: int) -> None:
        """Records one run for replay. What TensorRT cannot record is run call by call."""
        self._cuda.begin_capture(self._stream)
        recorded = True
        try:
            self._enqueue(size)
        except BackendUnavailable:
            recorded = False
        try:
            graph = self._cuda.end_capture(self._stream)
        except CudaError:
            return
        self._held.callback(self._cuda.free_graph, graph)
        self._graph = graph if recorded else 0

    def _enqueue(self, size: int, events: Sequence[int] = ()) -> None:
        """Upload, engine, download; `events` are recorded before, between and after them."""
        cuda, marks = self._cuda, iter(events)
        self._mark(marks)
        if not self._shared:
            row = self._input.array[:1].nbytes
            cuda.upload(self._device_input, self._input, size * row, self._stream)
        self._mark(marks)
        if not self._context.execute_async_v3(self._stream):
            raise BackendUnavailable(f"TensorRT failed on a batch of {size}: {self._said()}")
        self._mark(marks)
        if not self._shared:
            row = self._output.array[:1].nbytes
            cuda.download(self._output, self._device_output, size * row, self._stream)
        self._mark(marks)

    def _mark(self, events: Iterator[int]) -> None:
        event = next(events, 0)
        if event:
            self._cuda.record(event, self._stream)

    def _run(self, size: int) -> None:
        if self._graph:
            self._cuda.launch(self._graph, self._stream)
        else:
            self._shape(size)
            self._enqueue(size)
        self._cuda.synchronize(self._stream)

    def _shape(self, size: int) -> None:
        if not self._context.set_input_shape(self._border.name, (size, *self._border.shape)):
            raise BackendUnavailable(f"the engine takes no batch of {size}: {self._said()}")

    def __call__(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """Embeds a batch: uint8 frames [N, H, W, 3] or int32 tokens [N, L]."""
        self._require(batch)
        smallest, _, largest = self.info.batches
        found = np.empty((len(batch), self._border.dim), np.float32)
        with self._lock:
            for start in range(0, len(batch), largest):
                part = batch[start : start + largest]
                size = max(len(part), smallest)  # of a fixed size: the last part is filled up
                self._input.array[: len(part)] = part
                self._run(size)
                found[start : start + len(part)] = self._output.array[: len(part)]
        return found

    def _require(self, batch: NDArray[Any]) -> None:
        shape, dtype = self._border.shape, self._input.array.dtype
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
            self._input.array[: len(batch)] = batch
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
        how = "CUDA graph" if self._graph else "no CUDA graph"
        return f"tensorrt {self.info.tensorrt}, {self.info.gpu}, {self.info.precision}, {how}"
