"""The OpenVINO backend: the same embeddings as ONNX Runtime's, from any thread, and bf16 only where
the golden frames allow it."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from conftest import COLORS, square
from test_choice import kept

import runtime
from runtime import manifest, vino_bf16
from runtime.backends import Border, image_border
from runtime.bank_file import read_bank, save_bank
from runtime.bundle import Bundle, describe
from runtime.errors import BackendUnavailable, BundleError, FrameError, UnsupportedFormat
from runtime.vino_bf16 import KIND, Deviation, open_vino

pytest.importorskip("openvino")

from runtime import vino  # noqa: E402
from runtime.vino import VinoEncoder, computes_bf16  # noqa: E402

PRECISIONS = ("fp32", "fp16", "int8", "int8_fp16")


@pytest.fixture
def no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vino_bf16, "computes_bf16", lambda: False)


def pictures(count: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [square(color, rng)[..., ::-1] for _ in range(count) for color in COLORS.values()]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_agrees_with_onnxruntime(every_precision: Path, no_bf16: None, precision: str) -> None:
    """Fp32 exactly; what is quantised is rounded otherwise here and there."""
    ours = runtime.load(every_precision, backend="openvino", precision=precision)
    theirs = runtime.load(every_precision, backend="onnxruntime", precision=precision)
    assert repr(ours._image).startswith("openvino 20") and repr(ours._image).endswith(", CPU")
    for frame in pictures():
        least = 0.999999 if precision == "fp32" else 0.998
        assert ours.embed(frame) @ theirs.embed(frame) > least
    prediction = ours.classify(pictures()[0])
    assert prediction.label == "red" and prediction.backend == "openvino"


def test_batches_equal_single_frames(bundle: Path) -> None:
    classifier = runtime.load(bundle, backend="openvino", precision="fp32")
    frames = pictures()
    single = np.stack([classifier.classify(frame).cosines for frame in frames])
    for size in (2, len(frames), 1):
        batch = classifier.classify_batch(frames[:size])
        np.testing.assert_allclose([p.cosines for p in batch], single[:size], atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_texts(every_precision: Path, precision: str) -> None:
    texts = ["a red square", "blue", "green", "a blue square"]
    rows = [
        runtime.Classifier(
            Bundle(every_precision), backend=name, precision="fp32", text_precision=precision
        ).embed_text(texts)
        for name in ("openvino", "onnxruntime")
    ]
    assert (rows[0] * rows[1]).sum(axis=1).min() > (0.99999 if precision == "fp32" else 0.998)


def test_from_several_threads(bundle: Path) -> None:
    """Each thread has frames and batches of its own; none gets another's rows."""
    classifier = runtime.load(bundle, backend="openvino", precision="fp32")
    frames = pictures(2)
    expected = [classifier.embed(frame) for frame in frames]
    wrong: list[int] = []

    def flow(number: int) -> None:
        for _ in range(20):
            alone = np.abs(classifier.embed(frames[number]) - expected[number]).max()
            two = classifier.classify_batch([frames[number]] * 2)
            if alone > 1e-5 or two[0].label != two[1].label:
                wrong.append(number)

    threads = [threading.Thread(target=flow, args=(n,)) for n in range(len(frames))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_of_its_own(bundle: Path) -> None:
    classifier = runtime.load(bundle, backend="openvino", precision="fp32", threads=1)
    assert classifier.classify(pictures()[0]).label == "red"


@pytest.mark.parametrize(
    ("threads", "cores", "streams"),
    [(None, 4, None), (1, 4, 4), (2, 4, 2), (3, 4, 1), (8, 4, 1), (1, 64, 8)],
)
def test_the_cores_that_a_call_leaves_serve_others(
    monkeypatch: pytest.MonkeyPatch, threads: int | None, cores: int, streams: int | None
) -> None:
    monkeypatch.setattr(vino, "usable_cores", lambda: cores)
    options = vino._options("f32", threads, vino.MOST_STREAMS)
    assert options.get("NUM_STREAMS") == (streams and str(streams))
    total = streams and threads and str(streams * threads)
    assert options.get("INFERENCE_NUM_THREADS") == total


def opened(bundle: Path, **options: Any) -> VinoEncoder:
    made = Bundle(bundle)
    return VinoEncoder(made.file("image.fp32.onnx"), image_border(made.manifest), **options)


FRAME, FRAMES = np.zeros((1, 32, 32, 3), np.uint8), np.zeros((2, 32, 32, 3), np.uint8)


def test_single_frames_do_not_wait_for_the_other_model(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = opened(bundle)
    compiled, begun, may_end = encoder._compiled, threading.Event(), threading.Event()

    def slowly(fixed: bool) -> Any:
        begun.set()
        assert may_end.wait(20)
        return compiled(fixed)

    monkeypatch.setattr(encoder, "_compiled", slowly)
    batch = threading.Thread(target=encoder, args=(FRAMES,))
    batch.start()
    assert begun.wait(20)
    single = threading.Thread(target=encoder, args=(FRAME,))
    single.start()
    single.join(20)
    waits = single.is_alive()
    may_end.set()
    batch.join()
    single.join()
    assert not waits and encoder(FRAMES).shape[0] == 2


def test_no_model_is_made_of_a_file_that_was_replaced(bundle: Path, tmp_path: Path) -> None:
    """Single frames would be embedded by the one, batches by the other."""
    path = Path(shutil.copy(Bundle(bundle).file("image.fp32.onnx"), tmp_path))
    encoder = VinoEncoder(path, image_border(Bundle(bundle).manifest))
    shutil.copy(path, tmp_path / "beside")
    os.replace(tmp_path / "beside", path)
    with pytest.raises(BundleError, match="was changed since it was loaded; load the bundle again"):
        encoder(FRAMES)
    assert encoder(FRAME).shape[0] == 1
    path.unlink()
    with pytest.raises(BundleError):
        encoder(FRAMES)


_SIGNALS = """
import os, signal, sys, threading
from pathlib import Path
import numpy as np
from runtime.backends import image_border
from runtime.bundle import Bundle
from runtime.vino import VinoEncoder

made, caught = Bundle(sys.argv[1]), []
path, border = made.file("image.fp32.onnx"), image_border(made.manifest)
signal.signal(signal.SIGUSR1, lambda *_: caught.append(1))
encoders = [VinoEncoder(path, border) for _ in range(2)]

def close():
    encoders.clear()

thread = threading.Thread(target=close)
thread.start()
thread.join()
os.kill(os.getpid(), signal.SIGUSR1)
encoders += [VinoEncoder(path, border) for _ in range(2)]
del encoders[0], encoders[0]
os.kill(os.getpid(), signal.SIGUSR1)
print(len(caught))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no POSIX signals")
def test_a_signal_after_encoders_were_closed(bundle: Path) -> None:
    """Closed in any order and thread they leave no stack behind on which a signal would kill."""
    command = [sys.executable, "-c", _SIGNALS, str(bundle)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


def test_a_folder_that_is_named_so_is_no_openvino(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python imports it as an empty package."""
    find = "runtime.on_cpu.find_spec"
    with monkeypatch.context() as patch:
        patch.setattr(find, lambda name: ModuleSpec(name, None, is_package=True))
        with pytest.raises(BackendUnavailable, match=r"pip install 'edgeclip\[openvino\]'"):
            runtime.load(bundle, backend="openvino")
    for name in ("runtime.vino", "runtime.vino_bf16"):
        monkeypatch.delitem(sys.modules, name)
    empty = types.ModuleType("openvino")
    empty.__spec__ = sys.modules["openvino"].__spec__
    monkeypatch.setitem(sys.modules, "openvino", empty)
    with pytest.raises(BackendUnavailable, match="OpenVINO is installed, but does not load"):
        runtime.load(bundle, backend="openvino", precision="fp32")


def test_openvino_that_does_not_start(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("Exception from src/a.cpp:1:\nno plugins.xml\n")

    monkeypatch.setattr(vino, "Core", broken)
    monkeypatch.setattr(vino, "_core", vino._core.__wrapped__)
    for attempt in (lambda: opened(bundle), computes_bf16):
        with pytest.raises(BackendUnavailable, match="OpenVINO does not start: no plugins.xml$"):
            attempt()


def test_other_inputs_are_refused(bundle: Path) -> None:
    encoder = runtime.load(bundle, backend="openvino", precision="fp32")._image
    for wrong in (np.zeros((1, 32, 32, 3), np.float32), np.zeros((2, 1, 1, 3), np.uint8)):
        with pytest.raises(FrameError, match="the encoder takes uint8"):
            encoder(wrong)


def test_files_that_are_no_such_encoder(bundle: Path, tmp_path: Path) -> None:
    made = Bundle(bundle)
    image, border = made.file("image.fp32.onnx"), image_border(made.manifest)
    with pytest.raises(UnsupportedFormat, match="the manifest asks for"):
        VinoEncoder(image, Border("frames", (8, 8, 3), border.dim))
    with pytest.raises(UnsupportedFormat, match="the manifest asks for"):
        VinoEncoder(made.file("text.fp32.onnx"), border)
    (tmp_path / "cut.onnx").write_bytes(image.read_bytes()[:2000])
    with pytest.raises(UnsupportedFormat, match="does not load in OpenVINO: [^\n]*$"):
        VinoEncoder(tmp_path / "cut.onnx", border)


def test_a_failure_in_mid_run(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = VinoEncoder(
        Bundle(bundle).file("image.fp32.onnx"), image_border(Bundle(bundle).manifest)
    )

    def failing(*_: Any) -> Any:
        raise RuntimeError("Exception from src/a.cpp:1:\nout of memory\n\n")

    monkeypatch.setattr("runtime.vino._Requests.run", failing)
    with pytest.raises(BackendUnavailable, match="OpenVINO failed on a batch: out of memory$"):
        encoder(np.zeros((1, 32, 32, 3), np.uint8))


class Compiled:
    """Instead of the backend: which types it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, deviation: Deviation) -> None:
        self.hints: list[str] = []
        self.measured = 0

        class Encoder:
            def __init__(_, path: Path, border: Any, threads: Any, hint: str = "f32") -> None:
                self.hints.append(hint)

        def measured(*_: Any) -> Deviation:
            self.measured += 1
            return deviation

        monkeypatch.setattr(vino_bf16, "VinoEncoder", Encoder)
        monkeypatch.setattr(vino_bf16, "deviation", measured)
        monkeypatch.setattr(vino_bf16, "computes_bf16", lambda: True)


GOOD = Deviation(frames=32, cosine_p1=0.9995, flips=0)


def test_bf16_where_the_golden_frames_allow_it(
    every_precision: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked once for each file; fp32 stays what it is."""
    fake, bundle = Compiled(monkeypatch, GOOD), Bundle(every_precision)
    for precision in ("int8", "int8", "fp16"):
        _, notes = open_vino(bundle, precision, None)
        assert "openvino uses bf16: on 32 golden frames cosine 0.9995" in notes[0]
    assert open_vino(bundle, "fp32", None)[1] == ()
    assert fake.hints == ["bf16", "bf16", "bf16", "f32"] and fake.measured == 2
    assert len(kept(KIND)) == 2


@pytest.mark.parametrize("far", [Deviation(32, 0.9989, 0), Deviation(32, 0.9999, 1)])
def test_f32_where_they_do_not(
    every_precision: Path, monkeypatch: pytest.MonkeyPatch, far: Deviation
) -> None:
    fake, bundle = Compiled(monkeypatch, far), Bundle(every_precision)
    for _ in range(2):
        assert "openvino does not use bf16: on 32" in open_vino(bundle, "int8", None)[1][0]
    assert fake.hints == ["bf16", "f32", "f32"] and fake.measured == 1


def test_f32_without_golden_frames_and_where_the_cpu_has_no_bf16(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = bundle_copy / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"golden": "golden.safetensors"', '"golden": null'))
    fake = Compiled(monkeypatch, GOOD)
    assert "no golden frames; export it again" in open_vino(Bundle(bundle_copy), "fp16", None)[1][0]
    manifest.write_text(text)
    monkeypatch.setattr(vino_bf16, "computes_bf16", lambda: False)
    assert open_vino(Bundle(bundle_copy), "fp16", None)[1] == ()
    assert fake.hints == ["f32", "f32"] and fake.measured == 0


def test_how_far_it_really_is(every_precision: Path) -> None:
    """On the golden frames f32 is fp32 itself, and an encoder that turns all round is not."""
    bundle = Bundle(every_precision)
    encoder = VinoEncoder(bundle.file("image.fp32.onnx"), image_border(bundle.manifest))
    found = vino_bf16.deviation(encoder, bundle)
    assert found.small and found.cosine_p1 > 0.9999 and found.flips == 0
    turned: Any = lambda batch: -encoder(batch)  # noqa: E731
    found = vino_bf16.deviation(turned, bundle)
    assert not found.small and found.cosine_p1 < -0.9 and found.flips > 1


def test_a_default_bank_of_another_text_encoder(bundle_copy: Path) -> None:
    """It says nothing of labels that change, and is in nobody's way who brings labels."""
    made = Bundle(bundle_copy)
    name = made.manifest.prompts["default"]
    path = made.file(name)
    bank = read_bank(path, made.manifest.model.embedding_dim)
    save_bank(dataclasses.replace(bank, text_encoder="0" * 64), path)
    files = made.manifest.files | {name: describe(path)}
    manifest.write(bundle_copy, msgspec.structs.replace(made.manifest, files=files), made.raw)
    encoder = opened(bundle_copy)
    turned: Any = lambda batch: -encoder(batch)  # noqa: E731
    assert vino_bf16.deviation(turned, Bundle(bundle_copy)).flips == 0
    classifier = runtime.load(bundle_copy, ["red", "blue"], backend="openvino", precision="fp16")
    assert classifier.labels == ("red", "blue")


def test_in_bf16(every_precision: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not computes_bf16():
        pytest.skip("this CPU has no bf16")
    monkeypatch.setattr(vino_bf16, "MIN_COSINE", 0.99)  # of a model so small
    classifier = runtime.load(every_precision, backend="openvino", precision="int8")
    assert "openvino uses bf16" in classifier.notes[0] and ", CPU, bf16" in repr(classifier)
    assert [classifier.classify(frame).label for frame in pictures()] == list(COLORS) * 3
    assert [p.label for p in classifier.classify_batch(pictures())] == list(COLORS) * 3
