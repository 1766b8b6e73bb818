"""CUDA through pycuda, in the primary context, which every thread enters for the time of a call."""

import atexit
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

from numpy.typing import DTypeLike

from .cuda import Device, HostArray
from .cuda_graphs import DriverGraphs
from .errors import BackendUnavailable, CudaError

_STREAM_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING, which pycuda has no name for


def _unusable(error: Exception) -> str:
    return (
        f"pycuda cannot be used ({error}): it needs NVIDIA's driver, and the CUDA toolkit and a "
        "C++ compiler to install: pip install 'edgeclip[tensorrt]' (on a Jetson, where TensorRT "
        "is a system package: pip install pycuda)"
    )


def _driver() -> Any:
    """pycuda's module. Raises BackendUnavailable where it is missing or was built for another
    Python, numpy or CUDA, which it says by errors of several kinds."""
    try:
        return import_module("pycuda.driver")
    except Exception as error:
        raise BackendUnavailable(_unusable(error)) from error


@cache
def _primary_context(driver: Any) -> Any:
    """The primary context of device 0, for the life of the process.

    It has to be detached by name: pycuda's destructor takes it for a context of its own, fails to
    destroy it, and says so on the terminal.
    """
    driver.init()
    context = driver.Device(0).retain_primary_context()
    atexit.register(context.detach)
    return context


class PycudaCuda:
    """CUDA over pycuda, which has no CUDA graphs: those are the driver's own. Raises
    BackendUnavailable.

    pycuda frees what is no longer referred to, in whatever thread that happens, and warns where it
    cannot: so every object is kept until it is freed by its handle, in the context.
    """

    name = "pycuda"
    notes: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._driver = _driver()
        self._memory: dict[int, Any] = {}
        self._streams: dict[int, Any] = {}
        self._events: dict[int, Any] = {}
        try:
            self._context = _primary_context(self._driver)
            self.memory()
        except (self._driver.Error, CudaError, AttributeError) as error:
            raise BackendUnavailable(_unusable(error)) from error
        self._recorder: DriverGraphs | None = None
        try:
            self._recorder = DriverGraphs()
        except BackendUnavailable as error:
            self._no_graphs = str(error)
        self.graphs = self._recorder is not None

    @contextmanager
    def _current(self) -> Iterator[Any]:
        """pycuda's module, with the context current in this thread."""
        try:
            self._context.push()
            try:
                yield self._driver
            finally:
                self._context.pop()
        except self._driver.Error as error:
            call, _, text = str(error).partition(" failed: ")
            # without the frames that it passed: they would keep objects beyond their being freed
            raise CudaError(call, "", text) from error.with_traceback(None)

    def device(self) -> Device:
        with self._current() as driver:
            found, attribute = driver.Device(0), driver.device_attribute.INTEGRATED
            major, minor = found.compute_capability()
            shared = bool(found.get_attribute(attribute))
            return Device(found.name(), (major, minor), shared, int(found.total_memory()))

    def memory(self) -> tuple[int, int]:
        with self._current() as driver:
            free, total = driver.mem_get_info()
            return int(free), int(total)

    def alloc(self, size: int) -> int:
        with self._current() as driver:
            found = driver.mem_alloc(size)
            self._memory[int(found)] = found
            return int(found)

    def free(self, pointer: int) -> None:
        with self._current():
            self._memory.pop(pointer).free()

    def host(self, shape: tuple[int, ...], dtype: DTypeLike, mapped: bool = False) -> HostArray:
        """A pinned array; freed again where the GPU gives it no address."""
        with self._current() as driver:
            flags = driver.host_alloc_flags.PORTABLE
            if mapped:
                flags |= driver.host_alloc_flags.DEVICEMAP
            array = driver.pagelocked_empty(shape, dtype, mem_flags=flags)
            try:
                device = int(array.base.get_device_pointer()) if mapped else 0
            except driver.Error:
                array.base.free()
                raise
            pointer = int(array.ctypes.data)
            self._memory[pointer] = array.base
            return HostArray(array, pointer, device)

    def free_host(self, host: HostArray) -> None:
        self.free(host.pointer)

    def upload(self, device: int, host: HostArray, size: int, stream: int) -> None:
        with self._current() as driver:
            driver.memcpy_htod_async(device, host.part(size), self._streams[stream])

    def download(self, host: HostArray, device: int, size: int, stream: int) -> None:
        with self._current() as driver:
            driver.memcpy_dtoh_async(host.part(size), device, self._streams[stream])

    def stream(self) -> int:
        with self._current() as driver:
            found = driver.Stream(_STREAM_NON_BLOCKING)
            self._streams[found.handle] = found
            return int(found.handle)

    def free_stream(self, stream: int) -> None:
        with self._current():
            del self._streams[stream]

    def synchronize(self, stream: int) -> None:
        with self._current():
            self._streams[stream].synchronize()

    def event(self) -> int:
        with self._current() as driver:
            found = driver.Event()
            self._events[id(found)] = found  # pycuda does not tell CUDA's own handle
            return id(found)

    def free_event(self, event: int) -> None:
        with self._current():
            del self._events[event]

    def record(self, event: int, stream: int) -> None:
        with self._current():
            self._events[event].record(self._streams[stream])

    def elapsed(self, start: int, end: int) -> float:
        with self._current():
            self._events[end].synchronize()
            return float(self._events[start].time_till(self._events[end]))

    def begin_capture(self, stream: int) -> None:
        with self._recording() as graphs:
            graphs.begin(stream)

    def end_capture(self, stream: int) -> int:
        with self._recording() as graphs:
            return graphs.end(stream)

    def launch(self, graph: int, stream: int) -> None:
        with self._recording() as graphs:
            graphs.launch(graph, stream)

    def free_graph(self, graph: int) -> None:
        with self._recording() as graphs:
            graphs.free(graph)

    @contextmanager
    def _recording(self) -> Iterator[DriverGraphs]:
        """The driver's graphs, with the context current in this thread."""
        if self._recorder is None:
            raise BackendUnavailable(self._no_graphs)
        with self._current():
            yield self._recorder
