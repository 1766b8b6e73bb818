"""The OpenVINO backend: the same embeddings as ONNX Runtime's, from any thread, and bf16 only where
the golden frames allow it."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COLORS, square
from test_choice import kept

import runtime
from runtime import vino_bf16
from runtime.backends import Border, image_border
from runtime.bundle import Bundle
from runtime.errors import BackendUnavailable, FrameError, UnsupportedFormat
from runtime.vino_bf16 import KIND, Deviation, open_vino

pytest.importorskip("openvino")

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


GOOD = Deviation(frames=32, cosine_p1=0.995, flips=1)


def test_bf16_where_the_golden_frames_allow_it(
    every_precision: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked once for each file; fp32 stays what it is."""
    fake, bundle = Compiled(monkeypatch, GOOD), Bundle(every_precision)
    for precision in ("int8", "int8", "fp16"):
        _, notes = open_vino(bundle, precision, None)
        assert "openvino uses bf16: on 32 golden frames cosine 0.9950" in notes[0]
    assert open_vino(bundle, "fp32", None)[1] == ()
    assert fake.hints == ["bf16", "bf16", "bf16", "f32"] and fake.measured == 2
    assert len(kept(KIND)) == 2


@pytest.mark.parametrize("far", [Deviation(32, 0.989, 0), Deviation(32, 0.999, 2)])
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


def test_in_bf16(every_precision: Path) -> None:
    if not computes_bf16():
        pytest.skip("this CPU has no bf16")
    classifier = runtime.load(every_precision, backend="openvino", precision="int8")
    assert "openvino uses bf16" in classifier.notes[0] and ", CPU, bf16" in repr(classifier)
    assert [classifier.classify(frame).label for frame in pictures()] == list(COLORS) * 3
    assert [p.label for p in classifier.classify_batch(pictures())] == list(COLORS) * 3
