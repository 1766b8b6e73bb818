"""TensorRT engines against the recorded names of every version: built, run, refused, survived."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_cuda
import fake_tensorrt
import numpy as np
import pytest
from conftest import COLORS, square, write_squares

import runtime
from export.build import EngineOptions, build_engines
from export.bundle import ExportOptions, export_bundle
from export.engine import BuildOptions
from export.precisions import CalibrationOptions
from runtime import cuda_ctypes
from runtime.engine_file import EngineInfo, read_info
from runtime.errors import BackendUnavailable, DataError, GateFailed

pytestmark = pytest.mark.skipif(
    fake_cuda.COMPILER is None, reason="no C compiler (cc or gcc) to build the stub of CUDA with"
)
OLD, NEW = "8.6.0", "11.4.0"
SUPPORTED = [version for version in fake_tensorrt.VERSIONS if version != "8.5.3"]


@pytest.fixture(scope="module")
def exported(checkpoint: Path, squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "bundle"
    judged = write_squares(folder.parent / "judged", each=6, seed=9)
    options = ExportOptions(
        checkpoint=str(checkpoint),
        bundle=folder,
        labels=tuple(COLORS),
        templates=("a {} square", "{}"),
        precisions=CalibrationOptions(calibrate=(squares,), judge=(judged,), frames=32),
    )
    export_bundle(options, quiet=True)
    return folder


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """The same files in another folder: its engines are this test's own."""
    return Path(shutil.copytree(exported, tmp_path / "bundle", copy_function=os.link))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_cuda.compile_stub(tmp_path_factory.mktemp("cuda"))


class Machine:
    """Puts a TensorRT of some version, over the stub of CUDA, where processes find it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, library: Path, folder: Path) -> None:
        self._patch, self._library = monkeypatch, library
        package = fake_tensorrt.fake_package(folder)
        monkeypatch.setenv("PYTHONPATH", str(package))
        monkeypatch.setenv("LD_LIBRARY_PATH", str(library.parent))
        monkeypatch.setenv("FAKE_CUDART", str(library))
        monkeypatch.setattr(cuda_ctypes, "LIBRARIES", (str(library),))

    def has(self, version: str, fault: str = "") -> None:
        """What TensorRT is here from now on, and what goes wrong with it."""
        self._patch.setenv("FAKE_TENSORRT", version)
        self._patch.setenv("FAKE_TENSORRT_FAULT", fault)
        self._patch.setitem(sys.modules, "tensorrt", fake_tensorrt.load(version, fault))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, library: Path, tmp_path: Path) -> Iterator[Machine]:
    yield Machine(monkeypatch, library, tmp_path / "package")


def built(bundle: Path, **changes: Any) -> list[EngineInfo]:
    return build_engines(EngineOptions(bundle=bundle, **{"text": False, **changes}))


def frames() -> list[Any]:
    rng = np.random.default_rng(5)
    return [square(color, rng)[..., ::-1].copy() for color in COLORS.values()]


@pytest.mark.parametrize("version", SUPPORTED)
def test_every_version_builds_and_classifies(bundle: Path, machine: Machine, version: str) -> None:
    machine.has(version)
    image, text = built(bundle, text=True)
    major = int(version.split(".")[0])
    assert image.precision == ("int8_fp16" if major >= 10 else "int8")
    assert image.strongly_typed is (major >= 10) and text.precision == "fp32"
    assert image.figures["cosine_p1"] >= 0.99 and image.figures["flips"] == 0
    assert image.figures["ms"] > 0 and sum(image.layers.values()) > 50
    classifier = runtime.load(bundle, backend="tensorrt")
    assert [classifier.classify(frame).label for frame in frames()] == list(COLORS)
    assert f"tensorrt {version}" in repr(classifier) and ", CUDA graph" in repr(classifier)
    classifier.set_labels(["red", "blue"])
    assert classifier.classify(frames()[list(COLORS).index("red")]).label == "red"


def test_too_old(bundle: Path, machine: Machine) -> None:
    machine.has("8.5.3")
    with pytest.raises(BackendUnavailable, match=r"TensorRT 8\.5\.3 is too old"):
        built(bundle)


def test_auto_takes_the_engine_where_there_is_one(bundle: Path, machine: Machine) -> None:
    machine.has(NEW)
    assert runtime.load(bundle).backend == "onnxruntime"
    built(bundle)
    assert runtime.load(bundle).backend == "tensorrt"
    machine.has("10.3.0")
    classifier = runtime.load(bundle)
    assert classifier.backend == "onnxruntime"
    assert "no TensorRT engine for" in classifier.notes[0]


def test_batches(bundle: Path, machine: Machine) -> None:
    """Of a fixed size, the last is filled up; of a range, larger ones are run in parts."""
    machine.has(NEW)
    exact = runtime.load(bundle, backend="onnxruntime", precision="fp16")
    pictures = frames() * 3
    want = np.stack([exact.embed(frame) for frame in pictures])
    for batches in ((1, 1, 1), (4, 4, 4), (1, 2, 4)):
        built(bundle, precision="fp16", build=BuildOptions(batches=batches))
        classifier = runtime.load(bundle, backend="tensorrt", precision="fp16")
        found = classifier.classify_batch(pictures)
        assert [p.label for p in found] == list(COLORS) * 3
        rows = np.stack([classifier.embed(frame) for frame in pictures])
        assert (rows * want).sum(axis=1).min() > 0.999


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("no-gpu", "finds no GPU that it can use: CUDA initialization failure"),
        ("parse", "cannot read image.fp16.onnx: Strange_0 Strange: No importer registered"),
        ("build-none", "builds no engine: Could not find any implementation"),
        ("out-of-memory", "OutOfMemory"),
        ("deserialise-none", "does not load"),
        ("no-context", "has no room to run the engine: OutOfMemory"),
        ("lost", "an illegal memory access was encountered"),
        ("killed", "killed by signal 9 \\(out of memory\\?"),
    ],
)
def test_what_goes_wrong_is_named_and_leaves_nothing(
    bundle: Path, machine: Machine, fault: str, said: str
) -> None:
    machine.has(NEW, fault)
    with pytest.raises(BackendUnavailable, match=said):
        built(bundle, precision="fp16")
    assert not [path for path in (bundle / "engines").iterdir() if path.suffix != ".timing"]


@pytest.mark.parametrize("fault", ["parse", "build-none", "deserialise-none", "killed", "lost"])
def test_the_last_good_engine_stays(bundle: Path, machine: Machine, fault: str) -> None:
    machine.has(NEW)
    (before,) = built(bundle, precision="fp16")
    machine.has(NEW, fault)
    with pytest.raises(BackendUnavailable):
        built(bundle, precision="fp16")
    machine.has(NEW)
    classifier = runtime.load(bundle, backend="tensorrt", precision="fp16")
    assert [classifier.classify(frame).label for frame in frames()] == list(COLORS)
    assert before.plan in {path.name for path in (bundle / "engines").iterdir()}


def test_the_ladder_says_each_step(bundle: Path, machine: Machine) -> None:
    machine.has(NEW, "build-none:int8_fp16")
    (info,) = built(bundle)
    assert info.precision == "int8" and len(info.steps) == 1
    assert info.steps[0].startswith("int8_fp16: TensorRT 11.4.0 builds no engine")


def test_a_weakly_typed_second_try_on_10(bundle: Path, machine: Machine) -> None:
    """Some releases refuse fp16 scales where types are strong; 11 knows nothing else."""
    machine.has("10.16.1", "strong-none")
    (info,) = built(bundle, precision="int8")
    assert not info.strongly_typed and "INT8" in info.flags
    machine.has(NEW, "strong-none")
    with pytest.raises(BackendUnavailable, match="Could not infer output types"):
        built(bundle, precision="int8")


def test_the_gate(bundle: Path, machine: Machine) -> None:
    machine.has(NEW)
    with pytest.raises(GateFailed, match="less than --min-cosine 1"):
        built(bundle, precision="int8", min_cosine=1.0)
    assert not list((bundle / "engines").glob("*.plan"))


def test_an_unknown_precision(bundle: Path, machine: Machine) -> None:
    machine.has(NEW)
    with pytest.raises(DataError, match="has no precision 'int4'"):
        built(bundle, precision="int4")


def sidecar(bundle: Path) -> Path:
    (path,) = (bundle / "engines").glob("*.json")
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"onnx_sha256": "0" * 64}, "built from another image.fp16.onnx"),
        ({"tensorrt": "10.3.0"}, "built by TensorRT 10.3.0, here is 11.4.0"),
        ({"gpu": "Orin", "capability": [8, 7]}, r"built on Orin \(compute capability 8.7\)"),
        ({"plan_sha256": "0" * 64}, "not those that were built"),
        ({"plan": "other.plan"}, "other.plan is missing"),
        ({"plan": "../other.plan"}, "is not the sidecar of an engine"),
        ({"format": 2}, "has format 2"),
    ],
)
def test_an_engine_of_something_else_is_refused(
    bundle: Path, machine: Machine, changes: dict[str, Any], said: str
) -> None:
    machine.has(NEW)
    built(bundle, precision="fp16")
    path = sidecar(bundle)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(runtime.EdgeClipError, match=said):
        runtime.load(bundle, backend="tensorrt", precision="fp16")
    built(bundle, precision="fp16")
    assert runtime.load(bundle, backend="tensorrt", precision="fp16").backend == "tensorrt"


def test_a_damaged_plan_is_not_deserialised(bundle: Path, machine: Machine) -> None:
    machine.has(NEW)
    (info,) = built(bundle, precision="fp16")
    plan = bundle / "engines" / info.plan
    plan.write_bytes(plan.read_bytes()[:-1] + b"x")
    with pytest.raises(BackendUnavailable, match="not those that were built"):
        runtime.load(bundle, backend="tensorrt", precision="fp16")


def test_a_device_that_is_lost_in_mid_run(bundle: Path, machine: Machine) -> None:
    machine.has(NEW)
    built(bundle, precision="fp16", build=BuildOptions(batches=(1, 1, 2)))
    machine.has(NEW, "lost")
    classifier = runtime.load(bundle, backend="tensorrt", precision="fp16")
    with pytest.raises(BackendUnavailable, match="an illegal memory access"):
        for _ in range(8):
            classifier.classify(frames()[0])


KILLED = """
import os, sys
from pathlib import Path

point, count, replace = int(sys.argv[1]), 0, Path.replace

def deadly(self, target):
    global count
    count += 1
    if count == abs(point) and point > 0:
        os.kill(os.getpid(), 9)
    replace(self, target)
    if count == abs(point):
        os.kill(os.getpid(), 9)

Path.replace = deadly
from export.build import EngineOptions, build_engines
from export.engine import BuildOptions
options = BuildOptions(batches=(2, 2, 2))
build_engines(
    EngineOptions(bundle=Path(sys.argv[2]), precision="fp16", text=False, build=options)
)
"""


@pytest.mark.parametrize("point", [1, 2, -2, 3, -3])
def test_a_build_that_is_killed_leaves_a_sound_engine(
    bundle: Path, machine: Machine, point: int
) -> None:
    """Before and after each of its renames: timing cache, plan, sidecar."""
    machine.has(NEW)
    (before,) = built(bundle, precision="fp16")
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(point), str(bundle)], capture_output=True, check=False
    )
    assert run.returncode == -9, run.stderr.decode()
    now = read_info(sidecar(bundle))
    assert now.batches == ((2, 2, 2) if point == -3 else before.batches)
    classifier = runtime.load(bundle, backend="tensorrt", precision="fp16")
    assert [classifier.classify(frame).label for frame in frames()] == list(COLORS)
    built(bundle, precision="fp16", build=BuildOptions(batches=(4, 4, 4)))
    left = sorted(path.suffix for path in (bundle / "engines").iterdir())
    assert left == [".json", ".plan", ".timing"]


def test_a_rebuild_takes_the_place_of_the_old(bundle: Path, machine: Machine) -> None:
    machine.has(NEW)
    built(bundle, precision="fp16")
    built(bundle, precision="fp16", build=BuildOptions(batches=(2, 2, 2)))
    assert len(list((bundle / "engines").glob("*.plan"))) == 1
    assert read_info(sidecar(bundle)).batches == (2, 2, 2)


def test_without_tensorrt(bundle: Path, monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    monkeypatch.setattr(cuda_ctypes, "LIBRARIES", (str(library),))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'edgeclip\[tensorrt\]'"):
        runtime.load(bundle, backend="tensorrt")
