"""Metrics, and the evaluation of embeddings and of whole models."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
from conftest import write_squares
from PIL import Image

from calibration import embed, evaluation, metrics
from calibration.evaluation import evaluate
from calibration.metrics import Floats
from calibration.pairs import Bad, Pairs
from calibration.subject import bundle_subject, measure
from runtime.errors import DataError, FrameError, GateFailed
from runtime.frames import Frame
from runtime.manifest import Head, ImageSpec
from runtime.tokenizer import Tokenizer
from training.evaluate import checkpoint_subject, image_encoder, text_encoder
from training.model import create
from training.text import text_side

SPEC = ImageSpec(height=8, width=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
HEAD = Head(logit_scale=10.0, logit_bias=0.0, activation="softmax")


def unit(rows: Any) -> Floats:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / norms, dtype=np.float32)


def labelled(files: Sequence[Path], targets: Sequence[int], names: Sequence[str]) -> Pairs:
    own = tuple((target,) for target in targets)
    return Pairs(tuple(files), own, tuple(names), tuple(names), tuple(targets))


def pictures(folder: Path, count: int) -> list[Path]:
    """`count` pictures of one gray level each, which says their number."""
    folder.mkdir(exist_ok=True)
    for n in range(count):
        Image.new("RGB", (12, 9), (n, n, n)).save(folder / f"{n:03}.png")
    return sorted(folder.iterdir())


# Metrics


def test_ranks_count_ties_and_nan_against_the_model() -> None:
    similarity = np.array([[3, 2, 1], [1, 1, 0], [0, np.nan, 2], [np.nan, 1, 2]], np.float32)
    positives = np.array([[1, 0, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0]], bool)
    assert metrics.ranks(similarity, positives).tolist() == [0, 1, 1, metrics.NOWHERE]
    several = np.array([[0, 1, 1], [0, 0, 0], [1, 0, 1], [0, 1, 1]], bool)
    assert metrics.ranks(similarity, several)[:2].tolist() == [1, metrics.NOWHERE]
    assert metrics.share_within(np.array([0, 1, 1, 3]), 2) == 0.75


def test_class_figures_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    targets, predicted = rng.integers(0, 5, 80), rng.integers(0, 4, 80)  # 4 is never predicted
    confusion = metrics.confusion_matrix(targets, predicted, 6)  # 5 does not occur at all
    labels = list(range(6))
    np.testing.assert_array_equal(
        confusion, sklearn.metrics.confusion_matrix(targets, predicted, labels=labels)
    )
    expected = sklearn.metrics.precision_recall_fscore_support(
        targets, predicted, labels=labels, zero_division=0
    )
    np.testing.assert_allclose(metrics.class_figures(confusion), expected[:3], atol=1e-12)


def test_calibration_error_by_hand() -> None:
    confidence = np.array([0.0, 0.25, 0.375, 1.0, 1.0], np.float32)
    right = np.array([0, 0, 1, 1, 0], bool)
    bins = metrics.reliability(confidence, right, bins=4)
    assert [b.number for b in bins] == [2, 1, 0, 2]  # (low, high], and 0 is in the first
    assert bins[3] == (0.75, 1.0, 2, 1.0, 0.5) and bins[2] == (0.5, 0.75, 0, 0.0, 0.0)
    by_hand = (2 * 0.125 + 1 * 0.625 + 2 * 0.5) / 5
    assert metrics.expected_calibration_error(bins) == pytest.approx(by_hand)


# Pictures to embeddings


def means(frames: Frame) -> Floats:
    assert frames.dtype == np.uint8 and frames.shape[1:] == (8, 8, 3)
    assert len(frames) <= embed.BATCH
    return np.asarray(frames.mean(axis=(1, 2, 3))[:, None], dtype=np.float32)


def test_pictures_keep_their_order_and_bad_ones_are_named(tmp_path: Path) -> None:
    files = pictures(tmp_path / "pictures", 150)
    files[70].write_text("this is a text")
    done: list[int] = []
    pairs = labelled(files, [n % 3 for n in range(150)], "abc")
    kept, rows = embed.embed_pictures(pairs, embed.Pictures(pairs.files, SPEC), means, done.append)
    assert sum(done) == 150
    assert rows[:, 0].tolist() == [n for n in range(150) if n != 70]
    assert kept.files == tuple(f for f in files if f != files[70])
    assert kept.targets == tuple(n % 3 for n in range(150) if n != 70)
    assert kept.bad == (Bad(str(files[70]), "unreadable picture"),)


def test_pictures_are_not_decoded_far_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Path] = []

    def read(file: Path, spec: ImageSpec) -> Frame:
        decoded.append(file)
        return np.zeros((8, 8, 3), np.uint8)

    encoded = 0

    def encode(frames: Frame) -> Floats:
        nonlocal encoded
        encoded += len(frames)
        assert len(decoded) <= encoded + embed.AHEAD
        return np.zeros((len(frames), 2), np.float32)

    monkeypatch.setattr(embed, "preprocess", read)
    pairs = labelled([tmp_path] * 1000, [0] * 1000, "a")
    embed.embed_pictures(pairs, embed.Pictures(pairs.files, SPEC), encode)
    assert encoded == len(decoded) == 1000


def test_pictures_that_fit_in_memory_are_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = pictures(tmp_path / "pictures", 10)
    files[3].write_text("this is a text")
    expected = list(embed.Pictures(files, SPEC))
    kept = embed.Pictures(files, SPEC, keep=7 * expected[0].nbytes)  # type: ignore[union-attr]
    decoded: list[Path] = []
    read = embed._read

    def noted(file: Path, spec: ImageSpec) -> Frame | FrameError:
        decoded.append(file)
        return read(file, spec)

    monkeypatch.setattr(embed, "_read", noted)
    for _ in range(2):
        found = list(kept)
        assert isinstance(found[3], FrameError)
        for one, other in zip(found[:3] + found[4:], expected[:3] + expected[4:], strict=True):
            np.testing.assert_array_equal(one, other)
    assert decoded == files + files[7:]


def test_real_bad_pictures(data: Path) -> None:
    files = sorted((data / "badimages" / "files").iterdir())
    pairs = labelled(files, [0] * len(files), "a")
    kept, rows = embed.embed_pictures(pairs, embed.Pictures(pairs.files, SPEC), means)
    assert len(kept) == len(rows) > 10 and len(kept.bad) > 10
    assert len(kept) + len(kept.bad) == len(files)
    assert {b.reason for b in kept.bad} == {"unreadable picture"}


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    pairs = labelled([tmp_path / "a.png", tmp_path / "b.png"], [0, 0], "a")
    with pytest.raises(DataError, match=r"none of the 2 pictures.*there is no picture .*a\.png"):
        embed.embed_pictures(pairs, embed.Pictures(pairs.files, SPEC), means)


# Embeddings to figures


def texts_of(table: Mapping[str, Sequence[float]]) -> Any:
    return lambda texts: unit([table[text] for text in texts])


def test_zero_shot_by_hand() -> None:
    files = [Path(f"{n}.png") for n in range(4)]
    table = {"a x": (1, 0.1), "the x": (1, -0.1), "a y": (0, 1), "the y": (0, 1)}
    images = unit([(1, 0), (0.9, 0.1), (0.2, 1), (1, 0.05)])
    pairs = labelled(files, [0, 0, 1, 1], "xy")
    found = evaluate(pairs, images, texts_of(table), HEAD, ["a {}", "the {}"])
    assert found.figures["top1"] == 0.75
    assert "top5" not in found.figures  # of two classes it would say nothing
    assert found.confusion is not None and found.confusion.tolist() == [[2, 0], [1, 1]]
    assert [row[:4] for row in found.classes] == [("x", 2, 2 / 3, 1.0), ("y", 2, 1.0, 0.5)]
    assert found.figures["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    (mistake,) = found.mistakes
    assert (mistake.file, mistake.label, mistake.prediction.label) == (files[3], "y", "x")
    cosines = images[3] @ np.eye(2)  # the templates' mean is (1, 0) for x
    assert mistake.prediction.score == pytest.approx(
        1 / (1 + np.exp(10 * (cosines[1] - cosines[0]))), abs=1e-5
    )
    assert found.templates == ("a {}", "the {}") and found.pictures == 4
    assert sum(b.number for b in found.bins) == 4


def test_the_surest_mistakes_come_first_and_a_class_without_pictures_does_not_count() -> None:
    rng = np.random.default_rng(0)
    images, bank = unit(rng.normal(size=(600, 8))), unit(rng.normal(size=(5, 8)))
    pairs = labelled([Path(f"{n}") for n in range(600)], [n % 4 for n in range(600)], "abcde")
    found = evaluate(pairs, images, lambda _: bank, HEAD, ["{}"])
    scores = [m.prediction.score for m in found.mistakes]
    assert len(scores) == evaluation.MISTAKES and scores == sorted(scores, reverse=True)
    assert all(m.prediction.label != m.label for m in found.mistakes)
    recalls = [row.recall for row in found.classes if row.label != "e"]
    assert found.figures["macro_recall"] == pytest.approx(np.mean(recalls))
    similarity = images @ bank.T
    targets = np.array(pairs.targets)
    assert found.figures["top1"] == (similarity.argmax(axis=1) == targets).mean()


def test_retrieval_in_blocks_is_retrieval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "BLOCK", 7)
    rng = np.random.default_rng(0)
    texts = unit(rng.normal(size=(61, 8)))
    images = unit(texts[:60:2] + 0.8 * rng.normal(size=(30, 8)))
    captions = tuple((2 * n, 2 * n + 1) for n in range(29)) + ((0, 58),)  # 0 is true of two
    names = tuple(f"caption {n}" for n in range(61))  # and some of no picture
    files = tuple(Path(f"{n}.png") for n in range(30))
    found = evaluate(Pairs(files, captions, names), images, lambda t: texts[: len(t)], HEAD, [])
    positives = np.zeros((30, 59), bool)
    for row, own in enumerate(captions):
        positives[row, list(own)] = True
    similarity = images @ texts[:59].T
    for way, matrix, true in (
        ("image_to_text", similarity, positives),
        ("text_to_image", similarity.T, positives.T),
    ):
        for k in (1, 5, 10):
            best = np.argsort(-matrix, axis=1)[:, :k]
            hits = np.take_along_axis(true, best, axis=1).any(axis=1)
            assert found.figures[f"{way}_r{k}"] == hits.mean()
    assert found.captions == 59 and found.classes == ()
    places = [r.place for r in found.retrievals]
    assert places[: evaluation.CASES] == [1] * evaluation.CASES
    assert min(places[evaluation.CASES :]) > 1
    for retrieval in found.retrievals:
        assert [f.file == retrieval.own for f in retrieval.found[:1]] == [retrieval.place == 1]
        assert [f.cosine for f in retrieval.found] == sorted(
            (f.cosine for f in retrieval.found), reverse=True
        )


def test_what_is_not_finite_is_refused() -> None:
    images = unit([(1, 0), (0, 1)])
    pairs = labelled([Path("a.png"), Path("b.png")], [0, 1], "xy")
    broken = np.full((2, 2), np.nan, np.float32)
    with pytest.raises(GateFailed, match=r"2 of 2 inputs, first 'a\.png'"):
        evaluate(pairs, broken, lambda _: images, HEAD, ["{}"])
    with pytest.raises(GateFailed, match="first 'x'"):
        evaluate(pairs, images, lambda _: broken, HEAD, ["{}"])


# Whole models


def test_encoders_leave_every_part_of_the_model_in_its_mode(tiny_config: Path) -> None:
    clip = create(str(tiny_config))
    clip.model.train()
    clip.model.visual.eval()  # a part that is frozen
    before = [module.training for module in clip.model.modules()]
    frames = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), dtype=np.uint8)
    tokenizer = Tokenizer(*text_side(clip))
    texts = [f"text {n}" for n in range(300)]
    rows, words = image_encoder(clip)(frames), text_encoder(clip, tokenizer)(texts)
    assert [module.training for module in clip.model.modules()] == before
    assert rows.shape == (5, 32) and words.shape == (300, 32)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([rows, words]), axis=1), 1, atol=1e-5)
    assert all(p.requires_grad for p in clip.model.parameters())
    half = image_encoder(clip, "bf16")(frames)
    assert half.dtype == np.float32 and metrics.row_cosines(rows, half).min() > 0.99
    assert not np.array_equal(rows, half)


def test_a_checkpoint_and_its_bundle_agree(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    val = write_squares(tmp_path / "val", each=10, seed=5)
    templates = ("a {} square", "{}")
    pairs, of_model = measure(checkpoint_subject(str(checkpoint)), val, templates, quiet=True)
    _, of_bundle = measure(bundle_subject(bundle), val, quiet=True)  # has the same templates
    assert len(pairs) == 30 and of_model.figures["top1"] >= 0.9
    assert of_bundle.templates == templates
    assert of_model.figures == pytest.approx(of_bundle.figures, abs=1e-4)
    np.testing.assert_array_equal(of_model.confusion, of_bundle.confusion)
