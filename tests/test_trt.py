"""The TensorRT backend's memory and graphs, over each binding of CUDA."""

from pathlib import Path
from typing import Any

import fake_cuda
import pytest
from fake_machine import NEW, Machine, built, copied

from export.engine import BuildOptions
from runtime.backends import image_border
from runtime.bundle import Bundle
from runtime.cuda import NAMES, open_cuda
from runtime.engine_file import find_engine
from runtime.golden import Golden, load_golden
from runtime.trt import TrtEncoder, platform

pytestmark = pytest.mark.skipif(
    fake_cuda.COMPILER is None, reason="no C compiler (cc or gcc) to build the stub of CUDA with"
)
DYNAMIC = BuildOptions(batches=(1, 2, 4))


@pytest.fixture
def bundle(every_precision: Path, tmp_path: Path) -> Path:
    return copied(every_precision, tmp_path)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_cuda.compile_stub(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, library: Path, tmp_path: Path) -> Machine:
    made = Machine(monkeypatch, library, tmp_path / "package")
    fake_cuda.install(monkeypatch, library)
    made.has(NEW)
    return made


def opened(bundle: Path, name: str = "ctypes") -> TrtEncoder:
    cuda, content = open_cuda(name), Bundle(bundle)
    plan, info = find_engine(content, "image", "fp16", platform(cuda))
    return TrtEncoder(plan, info, image_border(content.manifest), cuda)


def golden(bundle: Path) -> Golden:
    content = Bundle(bundle)
    return load_golden(content.file(str(content.manifest.golden)), content.manifest)


def cosine(rows: Any, reference: Any) -> float:
    return float((rows * reference).sum(axis=1).min())


@pytest.mark.parametrize("batches", [(1, 1, 1), (3, 3, 3), (1, 2, 4)])
def test_every_binding_embeds_alike(
    bundle: Path, machine: Machine, batches: tuple[int, int, int]
) -> None:
    """As graphs, where the batch is of a fixed size; and all that was allocated is given back."""
    built(bundle, precision="fp16", build=BuildOptions(batches=batches))
    given, before = golden(bundle), machine.library.stub_live()
    for name in NAMES:
        encoder = opened(bundle, name)
        assert (", CUDA graph" in repr(encoder)) == (batches[0] == batches[2])
        for count in (1, 2, 5, len(given.frames)):
            assert cosine(encoder(given.frames[:count]), given.embeddings[:count]) > 0.999
        encoder.close()
        assert machine.library.stub_live() == before


@pytest.mark.parametrize("options", [BuildOptions(), DYNAMIC])
@pytest.mark.parametrize(("slow", "kept"), [("copies", "zero-copy"), ("mapped", "copies")])
def test_shared_memory_is_used_where_it_is_faster(
    bundle: Path, machine: Machine, slow: str, kept: str, options: BuildOptions
) -> None:
    built(bundle, precision="fp16", build=options)
    machine.has(NEW, "slow-mapped" if slow == "mapped" else "")
    machine.library.stub_slow_copies(3 if slow == "copies" else 0)
    given, before = golden(bundle), machine.library.stub_live()
    try:
        encoder = opened(bundle)
    finally:
        machine.library.stub_slow_copies(0)
    assert f", {kept}, " in repr(encoder)
    # a stream, two host arrays, two of the GPU's where it has its own, and a graph
    expected = 3 + 2 * (kept == "copies") + (options is not DYNAMIC)
    assert machine.library.stub_live() - before == expected
    assert cosine(encoder(given.frames), given.embeddings) > 0.999
    spans = encoder.timed(given.frames[:1])
    assert (spans["upload"] > 0) == (spans["download"] > 0) == (kept == "copies")
    assert cosine(encoder(given.frames), given.embeddings) > 0.999
    encoder.close()


@pytest.mark.parametrize("options", [BuildOptions(), DYNAMIC])
def test_a_card_has_memory_of_its_own(
    bundle: Path, machine: Machine, options: BuildOptions
) -> None:
    machine.has_card("8.9")
    built(bundle, precision="fp16", build=options)
    machine.library.stub_slow_copies(1)
    try:
        encoder = opened(bundle)
    finally:
        machine.library.stub_slow_copies(0)
    assert ", copies, " in repr(encoder)
    encoder.close()


@pytest.mark.parametrize("function", ["cudaHostGetDevicePointer", "cudaMalloc", "cudaGraphLaunch"])
def test_what_fails_at_the_start_leaves_nothing(
    bundle: Path, machine: Machine, function: str
) -> None:
    built(bundle, precision="fp16")
    before = machine.library.stub_live()
    machine.library.stub_fail(function.encode(), 2)
    with pytest.raises(Exception, match=f"{function}.*out of memory"):
        opened(bundle)
    assert machine.library.stub_live() == before


def test_a_run_that_cannot_be_recorded_is_called(bundle: Path, machine: Machine) -> None:
    built(bundle, precision="fp16")
    given, before = golden(bundle), machine.library.stub_live()
    machine.has(NEW, "no-capture")
    encoder = opened(bundle)
    assert "no CUDA graph" in repr(encoder)
    assert cosine(encoder(given.frames), given.embeddings) > 0.999
    encoder.close()
    assert machine.library.stub_live() == before
