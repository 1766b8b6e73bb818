"""The runtime API on a bundle that was really trained: colours of squares."""

import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import COLORS, square
from PIL import Image

import runtime
from runtime import api
from runtime.classifier import Classifier
from runtime.errors import BackendUnavailable, BundleError, DataError, FrameError
from runtime.manifest import Head
from runtime.prediction import Prediction, scores_of


@pytest.fixture(scope="module")
def classifier(bundle: Path) -> Classifier:
    return runtime.load(bundle, backend="onnxruntime", precision="fp32")


def frames(count: int = 8) -> list[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(7)
    return [(name, square(COLORS[name], rng)[..., ::-1]) for name in COLORS for _ in range(count)]


def test_classifies_bgr_frames(classifier: Classifier) -> None:
    found = [classifier.classify(frame).label == name for name, frame in frames()]
    assert np.mean(found) >= 0.9


def test_module_level_classify_uses_the_last_loaded(bundle: Path) -> None:
    runtime.load(bundle, labels=["red", "blue"])
    assert set(runtime.classify(frames(1)[0][1]).labels) == {"red", "blue"}


def test_module_level_classify_takes_the_bundle_from_the_environment(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "_current", None)
    monkeypatch.setenv("EDGECLIP_BUNDLE", str(bundle))
    assert runtime.classify(frames(1)[0][1]).label in COLORS


def test_module_level_classify_without_a_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_current", None)
    monkeypatch.delenv("EDGECLIP_BUNDLE", raising=False)
    with pytest.raises(BundleError, match=r"runtime\.load.*EDGECLIP_BUNDLE"):
        runtime.classify(frames(1)[0][1])


def test_prediction(classifier: Classifier) -> None:
    prediction = classifier.classify(frames(1)[0][1])
    assert prediction.scores.sum() == pytest.approx(1, abs=1e-5)
    assert prediction.top(2)[0] == (prediction.label, prediction.score)
    assert prediction.top(2)[0][1] >= prediction.top(2)[1][1]
    assert len(prediction.top(99)) == len(COLORS)
    assert -1 <= prediction.cosine <= 1
    assert set(prediction.timings) == {"preprocess", "encode", "head"}
    assert prediction.backend == "onnxruntime"
    assert not prediction.unknown


def test_unknown_below_the_threshold(bundle: Path) -> None:
    strict = runtime.load(bundle, threshold=1.01)
    assert strict.classify(frames(1)[0][1]).unknown


def test_batch_equals_single_frames_of_different_sizes(classifier: Classifier) -> None:
    mixed = [frame for _, frame in frames(1)] + [np.zeros((120, 33, 3), dtype=np.uint8)]
    single = [classifier.classify(frame) for frame in mixed]
    for one, other in zip(single, classifier.classify_batch(mixed), strict=True):
        np.testing.assert_allclose(one.cosines, other.cosines, atol=1e-5)


def test_frames_of_a_batch_have_a_channel_order_each(classifier: Classifier) -> None:
    bgr = frames(1)[1][1]
    rgb = np.ascontiguousarray(bgr[..., ::-1])
    one, other = classifier.classify_batch([bgr, rgb], ["bgr", "rgb"])
    np.testing.assert_allclose(one.cosines, other.cosines, atol=1e-6)
    with pytest.raises(FrameError, match="1 channel orders for 2 frames"):
        classifier.classify_batch([bgr, rgb], ["bgr"])


def test_color_orders_and_files_agree(classifier: Classifier, tmp_path: Path) -> None:
    bgr = frames(1)[1][1]
    rgb = np.ascontiguousarray(bgr[..., ::-1])
    bgra = np.dstack([bgr, np.full(bgr.shape[:2], 255, dtype=np.uint8)])
    Image.fromarray(rgb).save(tmp_path / "frame.png")
    expected = classifier.embed(bgr)
    for other in (
        classifier.embed(rgb, color="rgb"),
        classifier.embed(bgra, color="bgra"),
        classifier.embed(tmp_path / "frame.png"),
        classifier.embed(bgr[:, ::-1][:, ::-1]),  # a view that is not contiguous
    ):
        np.testing.assert_allclose(expected, other, atol=1e-6)


def test_embeddings_are_unit_rows(classifier: Classifier) -> None:
    assert np.linalg.norm(classifier.embed(frames(1)[0][1])) == pytest.approx(1, abs=1e-5)
    rows = classifier.embed_text(["red", "a blue square", ""] * 30)
    assert rows.shape == (90, 32)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert classifier.embed_text([]).shape == (0, 32)


def test_labels_from_the_text_encoder_equal_the_exported_bank(bundle: Path) -> None:
    exported = runtime.load(bundle)
    computed = runtime.load(bundle, labels=list(COLORS))
    assert exported.bank and computed.bank
    np.testing.assert_allclose(exported.bank.embeddings, computed.bank.embeddings, atol=1e-5)


def test_synonyms_are_averaged(bundle: Path) -> None:
    clf = runtime.load(bundle, labels={"warm": ["red", "orange"], "cold": ["blue"]})
    assert clf.bank
    rows = clf.embed_text(["a red square", "red", "a orange square", "orange"])
    mean = rows.mean(axis=0)
    np.testing.assert_allclose(clf.bank.embeddings[0], mean / np.linalg.norm(mean), atol=1e-5)


def test_labels_change_while_frames_flow(bundle: Path) -> None:
    clf = runtime.load(bundle)
    sets = [("red", "green"), ("blue", "red", "green")]
    frame, wrong, stop = frames(1)[0][1], [], threading.Event()

    def flow() -> None:
        while not stop.is_set():
            prediction = clf.classify(frame)
            whole = len(prediction.scores) == len(prediction.labels)
            if not whole or set(prediction.labels) not in (set(COLORS), *map(set, sets)):
                wrong.append(prediction)

    threads = [threading.Thread(target=flow) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(40):
        clf.set_labels(sets[turn % 2])
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "at least one label"),
        ("red", "list of texts"),
        (["red", "red"], "more than once: red"),
        (["red", " "], "not empty"),
        ([1], "not 1"),
        ([["red"]], "not"),
        ({"cat": "kitty"}, "list of texts, not 'kitty'"),
        ({"cat": None}, "list of texts"),
        ({"red": []}, "list of texts"),
    ],
)
def test_bad_labels(classifier: Classifier, labels: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        classifier.set_labels(labels)


def test_bad_template(classifier: Classifier) -> None:
    with pytest.raises(DataError, match="no {} where"):
        classifier.set_labels(["red"], templates=["a photo"])


def test_no_labels(bundle_copy: Path) -> None:
    manifest = bundle_copy / "manifest.json"
    text = manifest.read_text().replace('"default": "prompts/default.safetensors"', "")
    manifest.write_text(text)
    clf = runtime.load(bundle_copy)
    assert clf.labels == ()
    with pytest.raises(DataError, match="set_labels"):
        clf.classify(frames(1)[0][1])


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"backend": "tpu"}, BackendUnavailable, "no backend 'tpu'"),
        ({"precision": "int3"}, BundleError, "no precision 'int3'; it has: fp32"),
        ({"prompts": "birds"}, BundleError, "no prompt bank 'birds'; it has: default"),
        ({"prompts": "default", "labels": ["a"]}, DataError, "not both"),
        ({"templates": ["a {}"]}, DataError, "templates go with labels"),
    ],
)
def test_bad_options(
    bundle: Path, kwargs: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        runtime.load(bundle, **kwargs)  # type: ignore[arg-type]


def test_empty_batch(classifier: Classifier) -> None:
    with pytest.raises(FrameError, match="no frame"):
        classifier.classify_batch([])


def test_one_path_is_no_batch(classifier: Classifier) -> None:
    with pytest.raises(FrameError, match="not the one path"):
        classifier.classify_batch("photo.jpg")


def test_repr_says_what_runs(classifier: Classifier) -> None:
    text = repr(classifier)
    assert "fp32" in text and "onnxruntime" in text and "CPU" in text


def test_scores() -> None:
    cosines = np.array([[0.2, 0.3], [0.0, -1.0]], dtype=np.float32)
    softmax = Head(logit_scale=100, logit_bias=0, activation="softmax")
    expected = np.exp(100 * cosines) / np.exp(100 * cosines).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(scores_of(cosines, softmax), expected, rtol=1e-4)
    sigmoid = Head(logit_scale=10, logit_bias=-2, activation="sigmoid")
    expected = 1 / (1 + np.exp(-(10 * cosines - 2)))
    np.testing.assert_allclose(scores_of(cosines, sigmoid), expected, rtol=1e-5)


def test_the_best_label_where_scores_are_too_sure_to_differ() -> None:
    head = Head(logit_scale=100.0, logit_bias=-10.0, activation="sigmoid")
    cosines = np.array([0.30, 0.45], np.float32)
    prediction = Prediction(("a", "b"), scores_of(cosines, head), cosines)
    assert prediction.label == "b" and [label for label, _ in prediction.top(2)] == ["b", "a"]
