"""The CUDA interface: the same tests for pycuda, cuda-bindings and ctypes, over a stub of CUDA's
libraries, and over a GPU where there is one."""

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fake_cuda
import fake_pycuda
import numpy as np
import pytest
from fake_cuda import BINDINGS

from runtime import cuda as interface
from runtime import cuda_ctypes, cuda_graphs
from runtime.cuda import Cuda, CudaError, open_cuda
from runtime.errors import BackendUnavailable

ROOT = Path(__file__).parent.parent
# what pycuda calls is the driver
DRIVER = {
    "cudaMalloc": "cuMemAlloc", "cudaHostAlloc": "cuMemHostAlloc",
    "cudaMemcpyAsync": "cuMemcpyHtoDAsync", "cudaStreamSynchronize": "cuStreamSynchronize",
    "cudaHostGetDevicePointer": "cuMemHostGetDevicePointer",
    "cudaStreamCreateWithFlags": "cuStreamCreate", "cudaEventCreate": "cuEventCreate",
    "cudaEventRecord": "cuEventRecord", "cudaEventElapsedTime": "cuEventElapsedTime",
    "cudaMemGetInfo": "cuMemGetInfo",
}  # fmt: skip

needs_compiler = pytest.mark.skipif(
    fake_cuda.COMPILER is None, reason="no C compiler (cc or gcc) to build the stub of CUDA with"
)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_cuda.compile_stub(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def stub(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stub in the place of every binding. What a test leaves allocated is a failure."""
    loaded = fake_cuda.install(monkeypatch, library)
    yield loaded
    left = loaded.stub_live()
    loaded.stub_fail(b"", 0)
    assert left == 0, f"{left} things are still allocated"


@pytest.fixture(params=interface.NAMES)
def over_stub(request: pytest.FixtureRequest, stub: Any) -> Cuda:
    return open_cuda(request.param)


def each(*names: str) -> list[Any]:
    """Parameters of `opened`: the implementations, over the stub and over a GPU."""
    return [
        pytest.param((where, name), marks=mark, id=f"{where}-{name}")
        for where, mark in (("stub", needs_compiler), ("GPU", pytest.mark.gpu))
        for name in names
    ]


def opened(request: pytest.FixtureRequest) -> Cuda:
    where, name = request.param
    if where == "stub":
        request.getfixturevalue("stub")
        return open_cuda(name)
    try:
        return open_cuda(name)
    except BackendUnavailable:
        pytest.skip(f"there is no GPU that {name} can use")


@pytest.fixture(params=each(*interface.NAMES))
def cuda(request: pytest.FixtureRequest) -> Cuda:
    return opened(request)


def name_in(cuda: Cuda, function: str) -> str:
    if cuda.name != "pycuda":
        return function
    return DRIVER.get(function, function.replace("cuda", "cu"))


def test_tells_the_device(cuda: Cuda) -> None:
    device, (free, total) = cuda.device(), cuda.memory()
    assert device.name and device.name.isprintable()
    assert device.capability >= (5, 0)
    assert 0 < free <= total
    assert 0.9 < total / device.memory < 1.1
    assert cuda.notes == ()


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32])
@pytest.mark.parametrize("mapped", [False, True])
def test_pinned_arrays(cuda: Cuda, dtype: Any, mapped: bool) -> None:
    host = cuda.host((2, 3, 5), dtype, mapped=mapped)
    array = host.array
    assert (array.shape, array.dtype, array.flags.c_contiguous) == ((2, 3, 5), dtype, True)
    assert array.ctypes.data == host.pointer
    assert bool(host.device_pointer) == mapped
    array[...] = np.arange(30).reshape(2, 3, 5)
    raw = (ctypes.c_byte * array.nbytes).from_address(host.pointer)
    assert np.array_equal(np.frombuffer(memoryview(raw), dtype), np.arange(30))
    assert host.part(4).tobytes() == array.tobytes()[:4]
    cuda.free_host(host)


def test_copies_only_as_much_as_it_is_asked_for(cuda: Cuda) -> None:
    host, back = cuda.host((4, 3), np.float32), cuda.host((4, 3), np.float32)
    device, stream = cuda.alloc(host.array.nbytes), cuda.stream()
    host.array[...] = np.arange(12).reshape(4, 3)
    cuda.upload(device, host, 48, stream)
    cuda.synchronize(stream)
    host.array[...], back.array[...] = -1, 7
    cuda.upload(device, host, 12, stream)
    cuda.download(back, device, 24, stream)
    cuda.synchronize(stream)
    assert back.array.tolist() == [[-1, -1, -1], [3, 4, 5], [7, 7, 7], [7, 7, 7]]
    for size in (49, -1):
        with pytest.raises(ValueError, match="48"):
            cuda.upload(device, host, size, stream)
        with pytest.raises(ValueError, match="48"):
            cuda.download(back, device, size, stream)
    cuda.free(device)
    cuda.free_host(host)
    cuda.free_host(back)
    cuda.free_stream(stream)


def test_events_tell_the_time_between_them(cuda: Cuda) -> None:
    host, stream = cuda.host((1 << 20,), np.uint8), cuda.stream()
    device, events = cuda.alloc(1 << 20), [cuda.event() for _ in range(3)]
    assert len(set(events)) == 3
    for event in events[:2]:
        cuda.record(event, stream)
        cuda.upload(device, host, 1 << 20, stream)
    cuda.record(events[2], stream)
    first, both = cuda.elapsed(events[0], events[1]), cuda.elapsed(events[0], events[2])
    assert 0 < first < both < 10_000
    cuda.free(device)
    cuda.free_host(host)
    cuda.free_stream(stream)
    for event in events:
        cuda.free_event(event)


def test_a_captured_graph_is_replayed(cuda: Cuda) -> None:
    assert cuda.graphs
    host, back = cuda.host((8,), np.int32), cuda.host((8,), np.int32)
    device, stream = cuda.alloc(32), cuda.stream()
    back.array[...] = 0
    cuda.begin_capture(stream)
    cuda.upload(device, host, 32, stream)
    cuda.download(back, device, 32, stream)
    graph = cuda.end_capture(stream)
    assert (back.array == 0).all()  # recorded, not done
    for value in (3, 5):
        host.array[...] = value
        cuda.launch(graph, stream)
        cuda.synchronize(stream)
        assert (back.array == value).all()
    cuda.free_graph(graph)
    cuda.free(device)
    cuda.free_host(host)
    cuda.free_host(back)
    cuda.free_stream(stream)


def test_a_capture_that_fails_is_over(cuda: Cuda) -> None:
    stream = cuda.stream()
    cuda.begin_capture(stream)
    with pytest.raises(CudaError, match="[cC]aptur"):
        cuda.synchronize(stream)
    with pytest.raises(CudaError, match=name_in(cuda, "cudaStreamEndCapture")) as caught:
        cuda.end_capture(stream)
    assert "due to a previous error" in str(caught.value) and not caught.value.lost
    cuda.synchronize(stream)
    cuda.free_stream(stream)


def copies(cuda: Cuda, seed: int) -> bool:
    """Whether random bytes come back from the GPU, many times."""
    rng = np.random.default_rng(seed)
    host, back = cuda.host((1000,), np.uint8), cuda.host((1000,), np.uint8)
    device, stream = cuda.alloc(1000), cuda.stream()
    good = True
    for _ in range(50):
        host.array[...] = rng.integers(0, 256, 1000)
        cuda.upload(device, host, 1000, stream)
        cuda.download(back, device, 1000, stream)
        cuda.synchronize(stream)
        good &= np.array_equal(host.array, back.array)
    cuda.free(device)
    cuda.free_host(host)
    cuda.free_host(back)
    cuda.free_stream(stream)
    return good


def test_threads_use_it_at_once(cuda: Cuda) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda seed: copies(cuda, seed), range(8)))


def test_what_one_thread_made_another_uses_and_frees(cuda: Cuda) -> None:
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(lambda: (cuda.alloc(8), cuda.host((8,), np.uint8), cuda.stream()))
        device, host, stream = made.result()
        event = pool.submit(cuda.event).result()
    cuda.upload(device, host, 8, stream)
    cuda.record(event, stream)
    cuda.synchronize(stream)
    cuda.free(device)
    cuda.free_host(host)
    cuda.free_event(event)
    cuda.free_stream(stream)


@needs_compiler
def test_waiting_lets_other_threads_run(over_stub: Cuda, stub: Any) -> None:
    stream = over_stub.stream()
    stub.stub_hold(1)
    waiting = threading.Thread(target=over_stub.synchronize, args=(stream,))
    waiting.start()
    while not stub.stub_waiting():  # never seen where the other thread keeps the interpreter
        assert waiting.is_alive()
    stub.stub_hold(0)
    waiting.join()
    over_stub.synchronize(stream)
    over_stub.free_stream(stream)


@needs_compiler
@pytest.mark.parametrize(
    ("code", "text", "lost"),
    [
        (1, "invalid argument", False),
        (214, "uncorrectable ECC error", True),
        (700, "illegal memory access", True),
        (719, "unspecified launch failure", True),
    ],
)
def test_errors_name_the_call_and_the_reason(
    over_stub: Cuda, stub: Any, code: int, text: str, lost: bool
) -> None:
    stub.stub_fail(b"cudaMalloc", code)
    with pytest.raises(CudaError, match=text) as caught:
        over_stub.alloc(16)
    assert name_in(over_stub, "cudaMalloc") in str(caught.value)
    assert caught.value.lost == lost
    assert ("start it again" in str(caught.value)) == lost
    assert stub.cudaGetLastError() == 0 or over_stub.name == "pycuda"
    over_stub.free(over_stub.alloc(16))


def test_too_much_memory_is_refused(cuda: Cuda) -> None:
    for ask in (lambda: cuda.alloc(1 << 46), lambda: cuda.host((1 << 46,), np.uint8)):
        with pytest.raises(CudaError, match="out of memory|invalid argument") as caught:
            ask()
        assert not caught.value.lost


@needs_compiler
@pytest.mark.parametrize("function", DRIVER)
def test_every_call_is_checked(over_stub: Cuda, stub: Any, function: str) -> None:
    def everything() -> None:
        over_stub.memory()
        host = over_stub.host((4,), np.uint8, mapped=True)
        undo.append(lambda: over_stub.free_host(host))
        device = over_stub.alloc(4)
        undo.append(lambda: over_stub.free(device))
        stream = over_stub.stream()
        undo.append(lambda: over_stub.free_stream(stream))
        event = over_stub.event()
        undo.append(lambda: over_stub.free_event(event))
        over_stub.record(event, stream)
        over_stub.upload(device, host, 4, stream)
        over_stub.synchronize(stream)
        over_stub.elapsed(event, event)

    undo: list[Any] = []
    stub.stub_fail(function.encode(), 1)
    with pytest.raises(CudaError, match=name_in(over_stub, function)):
        everything()
    for step in undo:
        step()
    assert stub.stub_live() == 0


@needs_compiler
@pytest.mark.parametrize("function", ["cudaStreamEndCapture", "cudaGraphInstantiateWithFlags"])
def test_a_capture_leaves_nothing_behind(over_stub: Cuda, function: str, stub: Any) -> None:
    stream = over_stub.stream()
    over_stub.begin_capture(stream)
    stub.stub_fail(function.encode(), 901)
    with pytest.raises(CudaError, match=name_in(over_stub, function)):
        over_stub.end_capture(stream)
    if function == "cudaStreamEndCapture":
        over_stub.free_graph(over_stub.end_capture(stream))
    over_stub.free_stream(stream)


@needs_compiler
@pytest.mark.parametrize("function", ["cudaStreamBeginCapture", "cudaGraphLaunch"])
def test_a_graph_that_cannot_run_is_said(over_stub: Cuda, function: str, stub: Any) -> None:
    cuda = over_stub
    stream = cuda.stream()
    stub.stub_fail(function.encode(), 700)
    with pytest.raises(CudaError, match="illegal memory access") as caught:
        cuda.begin_capture(stream)
        graph = cuda.end_capture(stream)
        try:
            cuda.launch(graph, stream)
        finally:
            cuda.free_graph(graph)
    assert caught.value.lost
    cuda.free_stream(stream)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "why"), [("libcuda.so.none", "libcuda.so.none"), ("libc.so.6", "cuStreamBegin")]
)
def test_pycuda_without_the_drivers_graphs(
    stub: Any, monkeypatch: pytest.MonkeyPatch, name: str, why: str
) -> None:
    monkeypatch.setattr(cuda_graphs, "LIBRARY", name)
    cuda = open_cuda("pycuda")
    assert not cuda.graphs
    for call in (cuda.begin_capture, cuda.end_capture, cuda.free_graph):
        with pytest.raises(BackendUnavailable, match=f"has no CUDA graphs: .*{why}"):
            call(0)
    with pytest.raises(BackendUnavailable, match="has no CUDA graphs"):
        cuda.launch(0, 0)
    cuda.memory()


@needs_compiler
def test_pycuda_retains_one_context(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    open_cuda("pycuda")
    monkeypatch.delattr(fake_pycuda.Device, "retain_primary_context")
    open_cuda("pycuda").memory()


@needs_compiler
def test_auto_takes_the_first_that_works(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = open_cuda()
    assert (found.name, found.notes) == ("pycuda", ())
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    found = open_cuda()
    assert found.name == "cuda-bindings"
    assert len(found.notes) == 1 and "pip install 'edgeclip[tensorrt]'" in found.notes[0]
    monkeypatch.setitem(sys.modules, BINDINGS, None)
    found = open_cuda()
    assert found.name == "ctypes"
    assert len(found.notes) == 2 and "pip install 'cuda-bindings<13'" in found.notes[1]


@needs_compiler
def test_a_package_without_a_driver_is_told_apart(
    stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_STUB_FAULT", "cudaSetDevice=35")
    for name in interface.NAMES:
        with pytest.raises(BackendUnavailable, match="driver version is insufficient"):
            open_cuda(name)
    with pytest.raises(BackendUnavailable, match=r"pycuda.*cuda-bindings.*ctypes"):
        open_cuda()


@needs_compiler
def test_the_next_library_is_tried(
    stub: Any, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_ctypes, "LIBRARIES", ("libcudart.so.none", "libc.so.6", str(library)))
    assert open_cuda("ctypes").device().name == "Orin (stub)"


def test_what_is_missing_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    monkeypatch.setitem(sys.modules, BINDINGS, None)
    monkeypatch.setattr(cuda_ctypes, "LIBRARIES", ("libcudart.so.none",))
    for name, way_out in [
        ("pycuda", r"edgeclip\[tensorrt\]"),
        ("cuda-bindings", "pip install 'cuda-bindings<13'"),
        ("ctypes", r"libcudart\.so\.none.*apt-get install nvidia-jetpack.*edgeclip\[tensorrt\]"),
    ]:
        with pytest.raises(BackendUnavailable, match=way_out):
            open_cuda(name)
    with pytest.raises(BackendUnavailable, match=r"pycuda.*cuda-bindings.*libcudart"):
        open_cuda()
    with pytest.raises(BackendUnavailable, match="'cupy'.*pycuda, cuda-bindings, ctypes"):
        open_cuda("cupy")


def test_a_broken_pycuda_is_no_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "pycuda").mkdir()
    (tmp_path / "pycuda" / "__init__.py").touch()
    (tmp_path / "pycuda" / "driver.py").write_text("raise RuntimeError('another numpy ABI')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("pycuda.driver", "pycuda"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(BackendUnavailable, match="another numpy ABI"):
        open_cuda("pycuda")
    sys.modules.pop("pycuda", None)


@needs_compiler
def test_the_system_finds_the_library_by_its_name(library: Path) -> None:
    code = "import runtime.cuda as c; d = c.open_cuda('ctypes').device(); print(d.name, d.memory)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LD_LIBRARY_PATH": str(library.parent), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert run.stdout.split() == ["Orin", "(stub)", str(1 << 33)]


def test_nothing_of_cuda_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, runtime, runtime.cuda; "
        "print([m for m in sys.modules if m.split('.')[0] in ('pycuda', 'cuda', 'tensorrt') "
        "or m.startswith('runtime.cuda_')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
