"""Engines built by a real TensorRT and run on a real GPU; skipped where there is none.

On a machine without torch, which cannot make the tests' own bundle, $EDGECLIP_GPU_BUNDLE names one:

    EDGECLIP_GPU_BUNDLE=bundle python -m pytest --noconftest -m gpu tests/test_gpu.py

EDGECLIP_NO_EXTERNAL_TACTICS=1 builds without cuBLAS and cuDNN, where TensorRT 8 has none.
"""

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

import runtime
from export.build import EngineOptions, build_engines
from export.engine import STRONG, BuildOptions
from runtime.backends import image_border
from runtime.bundle import Bundle
from runtime.cuda import NAMES, open_cuda
from runtime.engine_file import EngineInfo, Platform, find_engine
from runtime.errors import BackendUnavailable
from runtime.golden import Golden, load_golden
from runtime.trt import TrtEncoder, platform
from runtime.trt_plan import HOST_CODE

pytestmark = pytest.mark.gpu
BUNDLE = os.environ.get("EDGECLIP_GPU_BUNDLE")
EXTERNAL_TACTICS = os.environ.get("EDGECLIP_NO_EXTERNAL_TACTICS") != "1"
BARS = {"fp32": 0.9999, "fp16": 0.9999, "int8": 0.99, "int8_fp16": 0.99}  # cosines with fp32
CLEAR = 0.01  # between the two best cosines: closer ones may change places by rounding
FRAMES = 20_000
MIB = 1 << 20


@pytest.fixture(scope="module")
def here() -> Platform:
    try:
        return platform(open_cuda())
    except BackendUnavailable as error:
        first = str(error).partition(". ")[0]  # what was tried is long
        pytest.skip(f"needs an NVIDIA GPU and TensorRT: {first}")


@pytest.fixture(scope="module")
def bundle(
    here: Platform, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle whose engines are these tests' own."""
    folder = tmp_path_factory.mktemp("gpu") / "bundle"
    if BUNDLE:
        ignored = shutil.ignore_patterns("engines")
        return Path(shutil.copytree(Path(BUNDLE).expanduser(), folder, ignore=ignored))
    pytest.importorskip("torch", reason="without torch, set EDGECLIP_GPU_BUNDLE to a bundle")
    return exported(request, folder)


def exported(request: pytest.FixtureRequest, folder: Path) -> Path:
    """The tests' small model with all its precisions."""
    from conftest import COLORS, write_squares

    from export.bundle import ExportOptions, export_bundle
    from export.precisions import CalibrationOptions

    judged = write_squares(folder.parent / "judged", each=6, seed=9)
    options = ExportOptions(
        checkpoint=str(request.getfixturevalue("checkpoint")),
        bundle=folder,
        labels=tuple(COLORS),
        templates=("a {} square", "{}"),
        precisions=CalibrationOptions(
            calibrate=(request.getfixturevalue("squares"),), judge=(judged,), frames=32
        ),
    )
    export_bundle(options, quiet=True)
    return folder


@pytest.fixture(scope="module")
def golden(bundle: Path) -> Golden:
    opened = Bundle(bundle)
    return load_golden(opened.file(str(opened.manifest.golden)), opened.manifest)


def built(
    bundle: Path,
    precision: str,
    batches: tuple[int, int, int] = (1, 1, 1),
    text: bool = False,
    compatible: str = "",
) -> list[EngineInfo]:
    """Builds without a gate, so that the tests' own bars tell the figure."""
    options = BuildOptions(
        batches=batches,
        external_tactics=EXTERNAL_TACTICS,
        version_compatible=compatible == "version",
        hardware_compatible=compatible == "hardware",
    )
    return build_engines(
        EngineOptions(
            bundle=bundle,
            precision=precision,
            text=text,
            build=options,
            min_cosine=-1,
            min_agreement=0,
        )
    )


def loaded(bundle: Path, precision: str) -> runtime.Classifier:
    classifier = runtime.load(bundle, backend="tensorrt", precision=precision)
    if classifier.bank is None:  # a bundle that was exported without labels
        classifier.set_labels(["a cat", "a dog", "an empty room"])
    return classifier


def embedded(classifier: runtime.Classifier, golden: Golden) -> NDArray[np.float32]:
    return np.stack([classifier.embed(frame, "rgb") for frame in golden.frames])


def cosine_p1(rows: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    assert rows.shape == reference.shape and np.isfinite(rows).all()
    return float(np.quantile((rows * reference).sum(axis=1), 0.01))


def changed(classifier: runtime.Classifier, golden: Golden) -> int:
    """How many of the golden frames with a clear label are named otherwise than by fp32."""
    cosines = golden.embeddings @ classifier.require_bank().embeddings.T
    best = np.sort(cosines, axis=1)
    clear = best[:, -1] - best[:, -2] > CLEAR
    found = classifier.classify_batch(list(golden.frames), "rgb")
    names = np.array([prediction.index for prediction in found])
    return int((names != cosines.argmax(axis=1))[clear].sum())


@pytest.mark.parametrize("precision", BARS)
def test_precision(bundle: Path, golden: Golden, here: Platform, precision: str) -> None:
    strong = int(here.tensorrt.split(".")[0]) >= STRONG
    if precision not in Bundle(bundle).manifest.precisions:
        pytest.skip(f"the bundle has no {precision}")
    if precision == "int8_fp16" and not strong:
        pytest.skip(f"TensorRT {here.tensorrt} takes no fp16 scales")
    (info,) = built(bundle, precision)
    classifier = loaded(bundle, precision)
    assert cosine_p1(embedded(classifier, golden), golden.embeddings) >= BARS[precision], info
    allowed = max(1, len(golden.frames) // 100) if precision.startswith("int8") else 0
    assert changed(classifier, golden) <= allowed, info
    assert info.layers, "the inspector told nothing"
    if precision != "fp32":
        kinds = {"int8"} if precision.startswith("int8") else {"fp16", "half"}
        assert kinds & set(info.layers), info.layers


def test_auto_and_the_text_encoder(bundle: Path, golden: Golden) -> None:
    image, text = built(bundle, "auto", text=True)
    assert text.figures["cosine_p1"] >= 0.9999
    classifier = loaded(bundle, "auto")
    assert classifier.backend == "tensorrt" and image.tensorrt in repr(classifier)
    classifier.set_labels(["red", "blue"])
    assert classifier.classify(golden.frames[0], "rgb").label in ("red", "blue")


@pytest.mark.parametrize("batches", [(1, 1, 1), (4, 4, 4), (1, 4, 8)])
def test_batches(bundle: Path, golden: Golden, batches: tuple[int, int, int]) -> None:
    """A fixed size is replayed as a graph and filled up; larger batches are run in parts."""
    built(bundle, "fp16", batches)
    classifier = loaded(bundle, "fp16")
    frames = np.concatenate([golden.frames, golden.frames[:3]])
    want = np.concatenate([golden.embeddings, golden.embeddings[:3]])
    for count in (1, 3, len(frames)):
        rows = classifier._image(frames[:count])
        assert cosine_p1(rows, want[:count]) >= BARS["fp16"]
    graphs = open_cuda().graphs and batches[0] == batches[2]
    assert ("no CUDA graph" in repr(classifier)) is not graphs


@pytest.mark.parametrize("kind", ["version", "hardware"])
def test_compatible(
    bundle: Path, golden: Golden, here: Platform, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """TensorRT knows code in a plan by itself, whatever its sidecar says."""
    if kind == "hardware" and here.against_hardware_compatible():
        pytest.skip(here.against_hardware_compatible())
    shutil.rmtree(bundle / "engines", ignore_errors=True)
    monkeypatch.delenv(HOST_CODE, raising=False)
    (info,) = built(bundle, "fp16", compatible=kind)
    if info.version_compatible:
        with pytest.raises(BackendUnavailable, match=HOST_CODE):
            loaded(bundle, "fp16")
        opened = Bundle(bundle)
        plan, _ = find_engine(opened, "image", "fp16", here)
        silent = msgspec.structs.replace(info, version_compatible=False)
        with pytest.raises(BackendUnavailable, match="does not load"):
            TrtEncoder(plan, silent, image_border(opened.manifest))
        monkeypatch.setenv(HOST_CODE, "1")
    classifier = loaded(bundle, "fp16")
    assert f"{kind} compatible" in repr(classifier)
    assert cosine_p1(embedded(classifier, golden), golden.embeddings) >= BARS["fp16"]


@pytest.mark.parametrize("name", NAMES)
def test_bindings(bundle: Path, golden: Golden, here: Platform, name: str) -> None:
    try:
        cuda = open_cuda(name)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    built(bundle, "fp16")
    opened = Bundle(bundle)
    plan, info = find_engine(opened, "image", "fp16", here)
    encoder = TrtEncoder(plan, info, image_border(opened.manifest), cuda)
    assert cosine_p1(encoder(golden.frames), golden.embeddings) >= BARS["fp16"]
    spans = encoder.timed(golden.frames[:1])
    assert list(spans) == ["upload", "engine", "download"] and spans["engine"] > 0
    encoder.close()


def test_a_rebuild_does_not_disturb_what_runs(bundle: Path, golden: Golden) -> None:
    built(bundle, "fp16")
    running = loaded(bundle, "fp16")
    before = embedded(running, golden)
    built(bundle, "fp16", (2, 2, 2))
    assert len(list((bundle / "engines").glob("image.fp16.*.plan"))) == 1
    np.testing.assert_array_equal(embedded(running, golden), before)
    assert cosine_p1(embedded(loaded(bundle, "fp16"), golden), before) >= BARS["fp16"]


def test_threads(bundle: Path, golden: Golden) -> None:
    built(bundle, "fp16")
    classifier = loaded(bundle, "fp16")
    want, wrong = embedded(classifier, golden), []

    def work(start: int) -> None:
        for i in range(start, start + 200):
            row = i % len(want)
            if not np.array_equal(classifier.embed(golden.frames[row], "rgb"), want[row]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(7 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def memory() -> tuple[float, float]:
    """MiB in use: of the GPU by everyone, and of the host by this process."""
    free, total = open_cuda().memory()
    status = Path("/proc/self/status").read_text()
    (resident,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    return (total - free) / MIB, int(resident) / 1024


def grown(call: Any, times: int) -> tuple[float, float]:
    """MiB by which both grow in so many calls, after a few to warm up."""
    for _ in range(max(1, times // 50)):
        call()
    before = memory()
    for _ in range(times):
        call()
    gpu, host = np.subtract(memory(), before)
    return float(gpu), float(host)


def test_memory_does_not_grow_with_frames(bundle: Path, golden: Golden) -> None:
    built(bundle, "fp16")
    classifier = loaded(bundle, "fp16")
    gpu, host = grown(lambda: classifier.classify(golden.frames[0], "rgb"), FRAMES)
    assert gpu < 8 and host < 8


def test_close_gives_memory_back(bundle: Path, here: Platform) -> None:
    built(bundle, "fp16")
    opened = Bundle(bundle)
    plan, info = find_engine(opened, "image", "fp16", here)
    gpu, host = grown(lambda: TrtEncoder(plan, info, image_border(opened.manifest)).close(), 20)
    assert gpu < 32 and host < 32
