"""TensorRT engines against the recorded names of every version: built, run, refused, survived."""

import contextlib
import fcntl
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_cuda
import fake_tensorrt
import numpy as np
import pytest
from conftest import COLORS
from fake_machine import NEW, Machine, built, copied, frames
from typer.testing import CliRunner

import runtime
from export.cli import app
from export.engine import BuildOptions
from export.verify import verify
from runtime import cuda_ctypes
from runtime.backends import ON_CPU
from runtime.bundle import Bundle
from runtime.engine_file import read_info
from runtime.errors import BackendUnavailable, DataError, FrameError, GateFailed
from runtime.opening import open_image

pytestmark = pytest.mark.skipif(
    fake_cuda.COMPILER is None, reason="no C compiler (cc or gcc) to build the stub of CUDA with"
)
SUPPORTED = [version for version in fake_tensorrt.VERSIONS if version != "8.5.3"]


@pytest.fixture
def bundle(every_precision: Path, tmp_path: Path) -> Path:
    return copied(every_precision, tmp_path)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_cuda.compile_stub(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, library: Path, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, library, tmp_path / "package")


def kinds(bundle: Path) -> set[str]:
    """What lies in the folder of the engines, beside the lock."""
    return {path.suffix for path in (bundle / "engines").iterdir()}


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
    assert runtime.load(bundle).backend in ON_CPU
    built(bundle)
    assert runtime.load(bundle).backend == "tensorrt"
    machine.has("10.3.0")
    classifier = runtime.load(bundle)
    assert classifier.backend in ON_CPU
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
    assert kinds(bundle) - {".timing"} == set()


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
        ({"plan": "other.plan"}, "other.plan cannot be read: No such file"),
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
    built(bundle, precision="fp16")
    classifier = runtime.load(bundle, backend="tensorrt", precision="fp16")
    machine.library.stub_fail(b"cudaStreamSynchronize", 700)
    with pytest.raises(BackendUnavailable, match="an illegal memory access.*start it again"):
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
    assert len(list((bundle / "engines").iterdir())) == 3
    assert kinds(bundle) == {".json", ".plan", ".timing"}


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


def test_auto_embeds_texts_on_onnxruntime_where_there_is_no_engine(
    bundle: Path, machine: Machine
) -> None:
    machine.has(NEW)
    built(bundle, precision="fp16")
    classifier = runtime.load(bundle, labels=list(COLORS))
    assert classifier.backend == "tensorrt"
    assert classifier.notes[0].startswith("the text encoder runs on onnxruntime: ")
    assert [classifier.classify(frame).label for frame in frames()] == list(COLORS)
    with pytest.raises(BackendUnavailable, match="no TensorRT engine of its fp32 text encoder"):
        runtime.load(bundle, labels=["a label that was never embedded"], backend="tensorrt")
    assert verify(bundle) == []


def test_auto_does_without_engines_that_are_damaged(bundle: Path, machine: Machine) -> None:
    machine.has(NEW)
    built(bundle, precision="fp16")
    sidecar(bundle).write_text("")
    classifier = runtime.load(bundle)
    assert classifier.backend in ON_CPU and "is not the sidecar" in classifier.notes[0]
    fp16 = sidecar(bundle)
    (info,) = built(bundle, precision="int8")
    classifier = runtime.load(bundle)
    assert (classifier.backend, classifier.precision) == ("tensorrt", "int8")
    fp16.write_bytes(fp16.with_name(fp16.name.replace("fp16", "int8")).read_bytes())
    with pytest.raises(BackendUnavailable, match="it is of the int8 image encoder"):
        runtime.load(bundle, backend="tensorrt", precision="fp16")
    (bundle / "engines" / info.plan).unlink()
    assert runtime.load(bundle).backend in ON_CPU


def test_the_command(bundle: Path, machine: Machine) -> None:
    """Its bar shows TensorRT's names of phases, with what a terminal could take for markup."""
    machine.has(NEW)
    run = CliRunner().invoke(app, ["build", str(bundle), "--precision", "fp16"])
    assert run.exit_code == 0, run.output
    assert "image: fp16" in run.output and "text: fp32" in run.output
    run = CliRunner().invoke(app, ["build", str(bundle), "--no-text", "--json"])
    assert json.loads(run.stdout)[0]["precision"] == "int8_fp16"


def test_modules_of_the_working_folder_are_not_taken(
    bundle: Path, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.has(NEW)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "__init__.py").touch()
    (tmp_path / "queue.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    assert built(Path("bundle"), precision="fp16")[0].precision == "fp16"


def test_one_build_at_a_time(bundle: Path, machine: Machine) -> None:
    machine.has(NEW)
    (bundle / "engines").mkdir()
    lock = os.open(bundle / "engines", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another build is at work"):
        built(bundle)
    os.close(lock)
    built(bundle, precision="fp16")


def test_a_timing_cache_that_is_damaged(bundle: Path, machine: Machine) -> None:
    machine.has(NEW)
    built(bundle, precision="fp16")
    (cache,) = (bundle / "engines").glob("*.timing")
    cache.write_bytes(b"damaged")
    built(bundle, precision="fp16")
    assert cache.read_bytes() == b"1"


@pytest.mark.parametrize("fault", ["", "no-context"])
def test_nothing_stays_allocated(bundle: Path, machine: Machine, fault: str) -> None:
    machine.has(NEW)
    built(bundle, precision="fp16")
    machine.has(NEW, fault)
    gc.collect()
    before = machine.library.stub_live()
    classifier: runtime.Classifier | None
    with contextlib.suppress(BackendUnavailable):
        classifier = runtime.Classifier(Bundle(bundle), backend="tensorrt")
        classifier.embed(frames()[0])
        assert machine.library.stub_live() > before
    classifier = None
    gc.collect()
    assert machine.library.stub_live() == before


def test_other_inputs_are_refused(bundle: Path, machine: Machine) -> None:
    machine.has(NEW)
    built(bundle, precision="fp16")
    encoder = open_image(Bundle(bundle), "tensorrt", "fp16", None).encoder
    for wrong in (np.zeros((1, 32, 32, 3), np.float32), np.zeros((2, 1, 1, 3), np.uint8)):
        with pytest.raises(FrameError, match="the engine takes uint8"):
            encoder(wrong)


@pytest.mark.parametrize("limits", [{"min_cosine": float("nan")}, {"min_agreement": 2.0}])
def test_limits_that_are_none(limits: dict[str, Any]) -> None:
    from export.build import EngineOptions

    with pytest.raises(DataError, match="at most 1, not"):
        EngineOptions(bundle=Path("bundle"), **limits)
