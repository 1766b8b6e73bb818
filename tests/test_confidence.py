"""Heads and thresholds that are fitted to frames' cosines."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from calibration import temperature
from calibration.confidence import fit
from calibration.metrics import Counts, Floats, auroc, expected_calibration_error, reliability
from calibration.temperature import fit_head, nll
from calibration.unknown import both, fit_limit, names_some
from runtime.errors import DataError
from runtime.head import cosines_of, predictions
from runtime.manifest import Head
from runtime.prediction import scores_of
from runtime.prompts import PromptBank, build_bank
from runtime.unknown import measured

Activation = Literal["softmax", "sigmoid"]
RIGHT, WRONG, SPREAD = 0.3, 0.2, 0.05  # cosines of a frame with its label, and with another
SCALE = (RIGHT - WRONG) / SPREAD**2  # of normally distributed cosines: 40


def head(scale: float, bias: float = 0.0, activation: Activation = "softmax") -> Head:
    return Head(logit_scale=scale, logit_bias=bias, activation=activation)


def drawn(frames: int, labels: int = 10, seed: int = 0) -> tuple[Floats, Counts]:
    """Normally distributed cosines, and labels.

    By Bayes' rule P(label | cosines) is the softmax of SCALE * cosine, and P(right | one cosine)
    the sigmoid of SCALE * cosine + BIAS (linear discriminant analysis).
    """
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, labels, frames)
    cosines = rng.normal(WRONG, SPREAD, (frames, labels))
    cosines[np.arange(frames), targets] += RIGHT - WRONG
    return cosines.astype(np.float32), targets


def bias_of(labels: int) -> float:
    return float(-np.log(labels - 1) - (RIGHT**2 - WRONG**2) / (2 * SPREAD**2))


def ece(cosines: Floats, targets: Counts, by: Head) -> float:
    right = cosines.argmax(axis=1) == targets
    return expected_calibration_error(reliability(scores_of(cosines, by).max(axis=1), right))


def divergence(cosines: Floats, by: Head, reference: Floats, given: Head) -> float:
    """Kullback-Leibler divergence of the scores from the reference's, mean of the frames."""
    p = scores_of(reference, given).astype(np.float64)
    q = scores_of(cosines, by).astype(np.float64)
    parts = p * np.log(p / q)
    if by.activation == "sigmoid":
        parts += (1 - p) * np.log((1 - p) / (1 - q))
    return float(parts.sum(axis=1).mean())


# The head from labels


@pytest.mark.parametrize("start", [1.0, 10.0, 100.0, 200.0])
def test_a_known_temperature_is_found(start: float) -> None:
    cosines, targets = drawn(20_000)
    found = fit_head(cosines, targets, head(start))
    assert found.logit_scale == pytest.approx(SCALE, rel=0.03)
    assert (found.logit_bias, found.activation) == (0.0, "softmax")


@pytest.mark.parametrize("start", [(10.0, -10.0), (117.0, -12.9), (1.0, 0.0)])
def test_a_known_scale_and_bias_are_found(start: tuple[float, float]) -> None:
    cosines, targets = drawn(10_000)
    found = fit_head(cosines, targets, head(*start, "sigmoid"))
    assert found.logit_scale == pytest.approx(SCALE, rel=0.03)
    assert found.logit_bias == pytest.approx(bias_of(10), rel=0.03)


def test_the_likelihood_by_hand() -> None:
    cosines = np.array([[0.5, 0.1], [0.2, 0.4]], np.float32)
    targets = np.array([0, 0])
    of_first, of_second = np.log(1 + np.exp(-4)), np.log(1 + np.exp(2))
    by_hand = (of_first + of_second) / 2
    assert nll(cosines, targets, head(10.0, 3.0)) == pytest.approx(by_hand, rel=1e-6)
    logits = 10.0 * cosines - 3.0
    by_hand = (np.log(1 + np.exp(-logits[:, 0])) + np.log(1 + np.exp(logits[:, 1]))).mean()
    assert nll(cosines, targets, head(10.0, -3.0, "sigmoid")) == pytest.approx(by_hand, rel=1e-6)


def test_no_scale_of_a_grid_is_better() -> None:
    cosines, targets = drawn(3000, seed=1)
    found = fit_head(cosines, targets, head(100.0))
    grid = np.geomspace(5, 200, 400)
    losses = [nll(cosines, targets, head(float(scale))) for scale in grid]
    best = float(grid[int(np.argmin(losses))])
    assert found.logit_scale == pytest.approx(best, rel=0.01)
    assert nll(cosines, targets, found) < min(losses) + 1e-6  # the prior has the weight of 1/3000


def test_no_scale_and_bias_of_a_grid_are_better() -> None:
    cosines, targets = drawn(1000, labels=4, seed=1)
    found = fit_head(cosines, targets, head(100.0, -10.0, "sigmoid"))
    losses = [
        nll(cosines, targets, head(found.logit_scale + a, found.logit_bias + b, "sigmoid"))
        for a in np.linspace(-20, 20, 21)
        for b in np.linspace(-5, 5, 21)
    ]
    assert nll(cosines, targets, found) < min(losses) + 1e-5


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_the_derivatives_are_those_of_the_loss(activation: Activation) -> None:
    cosines, targets = drawn(50, labels=4)
    means = temperature._means_of_labels(cosines, targets)

    def loss(scale: float, bias: float) -> temperature._Loss:
        at = head(scale, bias, activation)
        return temperature._with_prior(
            temperature._loss_at(cosines, means, at), at, head(60.0, -9.0, activation), 50
        )

    here = loss(30.0, -7.0)
    for axis, (a, b) in enumerate([(1e-3, 0.0), (0.0, 1e-3)]):
        more, less = loss(30.0 + a, -7.0 + b), loss(30.0 - a, -7.0 - b)
        slope = (more.value - less.value) / 2e-3
        assert here.gradient[axis] == pytest.approx(slope, rel=1e-5, abs=1e-9)
        bend = (more.gradient - less.gradient) / 2e-3
        np.testing.assert_allclose(here.curvature[axis], bend, rtol=1e-5, atol=1e-9)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cosines, targets = drawn(300)
    whole = fit(cosines, targets, head(100.0), unknown=cosines[:50] - np.float32(0.1))
    monkeypatch.setattr(temperature, "BLOCK", 7)
    parts = fit(cosines, targets, head(100.0), unknown=cosines[:50] - np.float32(0.1))
    assert parts.head.logit_scale == pytest.approx(whole.head.logit_scale, rel=1e-9)
    assert parts.limit.threshold == pytest.approx(whole.limit.threshold, rel=1e-6)


@pytest.mark.parametrize("given", [head(100.0), head(117.0, -12.9, "sigmoid")])
def test_overconfident_scores_are_mended_and_no_ranking_changes(given: Head) -> None:
    cosines, targets = drawn(4000)
    found = fit_head(cosines[:2000], targets[:2000], given)
    rest, labels = cosines[2000:], targets[2000:]
    before, after = ece(rest, labels, given), ece(rest, labels, found)
    assert after < (0.3 if given.activation == "softmax" else 0.5) * before
    assert nll(rest, labels, found) < nll(rest, labels, given)
    scores = scores_of(rest, found)
    assert (scores.argmax(axis=1) == rest.argmax(axis=1)).all()
    order = np.argsort(-rest, axis=1, kind="stable")
    assert (np.diff(np.take_along_axis(scores, order, axis=1), axis=1) <= 0).all()


# The head from the scores of fp32


@pytest.mark.parametrize("given", [head(60.0), head(60.0, -18.0, "sigmoid")])
def test_noisy_cosines_are_brought_back_to_the_scores_of_fp32(given: Head) -> None:
    reference, _ = drawn(1000)
    rng = np.random.default_rng(2)
    noise = rng.normal(0, 0.005, reference.shape)
    cosines = (0.8 * reference + 0.03 + noise).astype(np.float32)
    found = fit_head(cosines, None, given, reference)
    before = divergence(cosines, given, reference, given)
    after = divergence(cosines, found, reference, given)
    assert after < 0.7 * before
    for factor in (0.98, 1.02):
        other = head(factor * found.logit_scale, found.logit_bias, given.activation)
        assert divergence(cosines, other, reference, given) > after


def test_cosines_that_only_shrank_get_their_scores_back() -> None:
    reference, _ = drawn(500)
    cosines = (0.8 * reference + 0.02).astype(np.float32)
    found = fit_head(cosines, None, head(100.0), reference)
    assert found.logit_scale == pytest.approx(125.0, rel=1e-2)
    found = fit_head(cosines, None, head(100.0, -25.0, "sigmoid"), reference)
    assert found.logit_scale == pytest.approx(125.0, rel=1e-2)
    assert found.logit_bias == pytest.approx(-27.5, rel=1e-2)


@pytest.mark.parametrize("given", [head(300.0), head(0.5, -3.0, "sigmoid")])
def test_what_needs_no_mending_stays(given: Head) -> None:
    cosines, _ = drawn(50)
    assert fit_head(cosines, None, given, cosines) == given
    assert fit_head(cosines, None, given) == given


def test_labels_are_worth_more_than_a_reference() -> None:
    cosines, targets = drawn(100)
    both = fit_head(cosines, targets, head(100.0), reference=-cosines)
    assert both == fit_head(cosines, targets, head(100.0))


# Too little to go by


def test_one_frame_hardly_moves_the_head() -> None:
    cosines, targets = np.array([[0.3, 0.2, 0.1]], np.float32), np.array([0])
    found = fit_head(cosines, targets, head(20.0))
    assert 20.0 < found.logit_scale < 30.0
    both = fit_head(cosines, targets, head(20.0, -4.0, "sigmoid"))
    assert 10.0 < both.logit_scale < 40.0 and -8.0 < both.logit_bias < 0.0
    alone = fit(cosines, targets, head(20.0))
    assert alone.ece_before is alone.ece_after is alone.nll_before is alone.nll_after is None
    assert alone.limit.threshold == scores_of(cosines, found).max()


def test_a_single_label_has_no_softmax_scale() -> None:
    cosines, targets = drawn(20, labels=1)
    assert fit_head(cosines, targets, head(100.0)) == head(100.0)
    assert fit(cosines, targets, head(100.0)).limit.threshold == 1.0
    found = fit_head(cosines, targets, head(100.0, -30.0, "sigmoid"))  # always right: surer
    assert (
        scores_of(cosines, found).mean() > scores_of(cosines, head(100.0, -30.0, "sigmoid")).mean()
    )
    assert 1 <= found.logit_scale <= 200 and np.isfinite(found.logit_bias)


@pytest.mark.parametrize("given", [head(20.0), head(20.0, -5.0, "sigmoid")])
def test_frames_of_a_single_class_fit(given: Head) -> None:
    cosines, targets = drawn(2000)
    own = targets == 3
    found = fit_head(cosines[own], targets[own], given)
    assert found.logit_scale == pytest.approx(SCALE, rel=0.3)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_separable_frames_do_not_run_away(activation: Activation) -> None:
    rows = np.arange(100)
    cosines = np.full((100, 5), 0.2, np.float32)
    cosines[rows, rows % 5] = 0.3
    found = fit_head(cosines, rows % 5, head(30.0, -7.5, activation))
    assert 50 < found.logit_scale < 150  # log(100 frames) over the margin of 0.1, and some
    cosines[rows, rows % 5] = 0.201
    found = fit_head(cosines, rows % 5, head(100.0, -20.0, activation))
    assert found.logit_scale == 200.0
    scores = scores_of(cosines, found)  # the bias is still the best one
    if activation == "sigmoid":
        assert scores.sum(axis=1).mean() == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_model_that_is_always_wrong_is_not_sure(activation: Activation) -> None:
    cosines, targets = drawn(500)
    wrong = fit_head(cosines, (targets + 1) % 10, head(100.0, -25.0, activation))
    assert wrong.logit_scale == 1.0
    assert scores_of(cosines, wrong).max() < 0.2


def test_equal_cosines_say_nothing() -> None:
    cosines, targets = np.full((30, 4), 0.25, np.float32), np.arange(30) % 4
    assert fit_head(cosines, targets, head(50.0)) == head(50.0)
    found = fit_head(cosines, targets, head(50.0, -20.0, "sigmoid"))
    np.testing.assert_allclose(scores_of(cosines, found), 0.25, atol=0.01)  # a quarter is right


# The threshold

TEN = head(10.0)


def of_scores(*scores: float) -> Floats:
    """Cosines [N, 2] whose best label, the first, has this score under TEN."""
    logits = np.log(np.array(scores) / (1 - np.array(scores)))
    return np.stack([logits / 20, -logits / 20], axis=1).astype(np.float32)


def test_unknown_frames_choose_the_measure_and_say_what_is_found() -> None:
    known, unknown = of_scores(0.52, 0.7, 0.72, 0.74), of_scores(0.54, 0.56, 0.71, 0.5)
    found = fit_limit(known, TEN, unknown=unknown, recall=0.6)
    assert scores_of(known, TEN).max(axis=1)[1] == pytest.approx(found.threshold)
    assert found.auroc == 12 / 16  # pairs in which the known frame's score is the higher one
    assert (found.measure, found.found) == ("score", 0.75)


def test_a_wrong_name_may_be_rejected() -> None:
    known = of_scores(0.51, 0.7, 0.72)
    targets = np.array([1, 0, 0])
    found = fit_limit(known, TEN, targets, recall=1.0)
    values = measured(found.measure, known, scores_of(known, TEN), TEN)
    assert found.threshold == values[1]


@pytest.mark.parametrize(
    "recall, kept", [(1.0, 10), (0.95, 10), (0.9, 10), (0.7, 8), (0.55, 7), (1e-12, 1)]
)
def test_recall_by_hand(recall: float, kept: int) -> None:
    cosines = of_scores(*np.linspace(0.6, 0.96, 10))
    mixed = np.concatenate([cosines[::-1], of_scores(*[0.55] * 5)])
    targets = np.array([0] * 10 + [1] * 5)
    for found in (
        fit_limit(mixed, TEN, targets, recall=recall),  # of the rightly named ones
        fit_limit(cosines[::-1], TEN, recall=recall),  # of all
    ):
        values = measured(found.measure, cosines, scores_of(cosines, TEN), TEN)
        assert (values >= found.threshold).sum() == kept


@pytest.mark.parametrize("recall, kept", [(0.9, 91), (0.07, 8)])
def test_the_threshold_keeps_that_share_of_predictions(recall: float, kept: int) -> None:
    cosines, _ = drawn(100)
    by = head(40.0)
    found = fit_limit(cosines, by, recall=recall)
    values = measured(found.measure, cosines, scores_of(cosines, by), by)
    assert (values >= found.threshold).sum() == kept


@pytest.mark.parametrize("frames", [40, 400])
def test_new_frames_are_called_unknown_no_more_often_than_promised(frames: int) -> None:
    by, alarms, told = head(40.0), list[float](), list[float]()
    for seed in range(60):
        cosines, targets = drawn(frames + 500, seed=seed)
        found = fit_limit(cosines[:frames], by, targets[:frames])
        new = cosines[frames:][(cosines.argmax(axis=1) == targets)[frames:]]
        values = measured(found.measure, new, scores_of(new, by), by)
        alarms.append(float((values < found.threshold).mean()))
        told.append(found.false_alarms or 0.0)
    assert np.mean(alarms) < 0.055
    assert np.mean(told) == pytest.approx(np.mean(alarms), abs=0.05)


def test_the_measure_that_tells_frames_of_no_label_best_is_taken() -> None:
    known, targets = drawn(1000)
    vague = known - np.float32(0.15)  # as sure of the best label, but near none
    assert fit_limit(known, head(SCALE), targets, vague).measure == "energy"
    lifted = known + np.random.default_rng(3).normal(0, 0.3, (1000, 1)).astype(np.float32)
    assert (
        fit_limit(lifted / np.float32(3), head(SCALE), targets).measure != "energy"
    )  # says nothing then


def test_hiding_labels_tells_how_well_frames_of_no_label_will_be_known() -> None:
    cosines, targets = drawn(4000)
    by = head(SCALE)
    keep = targets < 8
    found = fit_limit(cosines[keep][:, :8], by, targets[keep])
    values = measured(found.measure, cosines[:, :8], scores_of(cosines[:, :8], by), by)
    assert found.auroc == pytest.approx(auroc(values[keep], values[~keep]), abs=0.03)
    assert fit_limit(cosines, by).auroc is None  # there were no labels to hide


def test_what_competes_with_the_labels_is_not_one_of_them() -> None:
    cosines, targets = drawn(300)
    by = head(SCALE)
    found = fit_limit(cosines, by, targets.clip(max=7), labels=8)
    assert found.threshold != fit_limit(cosines[:, :8], by, targets.clip(max=7)).threshold
    background = targets >= 8
    values = measured(found.measure, cosines[:, :8], scores_of(cosines, by)[:, :8], by)
    assert (values[background] < found.threshold).mean() > 0.3


@pytest.mark.parametrize("scale", [1.0, 200.0])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_limits_are_finite(scale: float, activation: Activation) -> None:
    cosines, targets = drawn(200)
    by = head(scale, -200.0 if activation == "sigmoid" else 0.0, activation)
    for labels in (None, targets):
        for unknown in (None, cosines - np.float32(0.1)):
            assert np.isfinite(fit_limit(cosines, by, labels, unknown).threshold)


# All of it


def test_the_figures_are_of_frames_that_the_head_has_not_seen() -> None:
    cosines, targets = drawn(2000)
    found = fit(cosines, targets, head(100.0))
    assert found == fit(cosines, targets, head(100.0))
    assert found.head == fit_head(cosines, targets, head(100.0))
    assert found.limit == fit_limit(cosines, found.head, targets)
    assert found.frames == 2000
    assert found.ece_before == pytest.approx(ece(cosines, targets, head(100.0)))
    assert found.nll_before == pytest.approx(nll(cosines, targets, head(100.0)))
    assert found.ece_before and found.ece_after and found.nll_before and found.nll_after
    assert found.ece_after < 0.3 * found.ece_before
    assert nll(cosines, targets, found.head) < found.nll_after < found.nll_before


def test_both_halves_have_frames_of_every_class() -> None:
    cosines, targets = drawn(2000)
    hard = targets < 5
    cosines[hard] = cosines[hard] / 4 + 0.15  # a head of these alone would be far too sure
    order = np.argsort(targets, kind="stable")
    found = fit(cosines[order], targets[order], head(100.0))
    assert found.nll_after == pytest.approx(nll(cosines, targets, found.head), rel=0.005)


def test_what_was_done_is_said() -> None:
    cosines, targets = drawn(100)
    unlabelled = fit(cosines, None, head(100.0), recall=0.9)
    assert unlabelled.how == "head as it was; threshold that keeps 90% of the frames"
    assert (unlabelled.ece_before, unlabelled.nll_after) == (None, None)
    refitted = fit(cosines, None, head(100.0), reference=cosines)
    assert refitted.how.startswith("head fitted to the reference's scores; ")
    labelled = fit(cosines, targets, head(100.0), unknown=cosines[:7])
    assert labelled.how == (
        "head fitted to labels; threshold that keeps 95% of the rightly named frames, "
        "the measure chosen on 7 frames of no label"
    )


# What cannot be used

COSINES = np.full((4, 3), 0.2, np.float32)
TARGETS = np.zeros(4, np.int64)
NAN = np.array([[0.1, 0.2, 0.3]] * 3 + [[0.1, np.nan, 0.3]], np.float32)


@pytest.mark.parametrize(
    "cosines, targets, options, message",
    [
        (NAN, TARGETS, {}, "cosines is not finite in 1 of 4 frames, first in row 3"),
        (COSINES[0], TARGETS, {}, r"cosines has the shape \(3,\)"),
        (COSINES[:0], TARGETS[:0], {}, r"cosines has the shape \(0, 3\)"),
        (COSINES[:, :0], TARGETS, {}, r"cosines has the shape \(4, 0\)"),
        (COSINES * 100, TARGETS, {}, "cosines reaches 20, a cosine at most 1: .*not yet scaled"),
        (COSINES, TARGETS[:3], {}, r"targets are int64 \[3\], not an integer for each of the 4"),
        (COSINES, TARGETS + 0.5, {}, r"targets are float64 \[4\]"),
        (COSINES, TARGETS + 3, {}, r"targets are from 3 to 3, .* 3 labels \(0 to 2\)"),
        (COSINES, TARGETS - 1, {}, "targets are from -1 to -1"),
        (COSINES, TARGETS + 1, {}, "none of the 4 frames is named rightly"),
        (COSINES, None, {"reference": COSINES[:3]}, "reference has 3 frames and cosines 4"),
        (COSINES, None, {"reference": COSINES[:, :2]}, "reference has 2 labels and cosines 3"),
        (COSINES, None, {"reference": NAN}, "reference is not finite"),
        (COSINES, TARGETS, {"unknown": COSINES[:, :2]}, "unknown has 2 labels and cosines 3"),
        (COSINES, TARGETS, {"unknown": COSINES[:0]}, r"unknown has the shape \(0, 3\)"),
        (COSINES, TARGETS, {"unknown": NAN}, "unknown is not finite"),
        (COSINES, TARGETS, {"recall": 0.0}, "recall is the share of frames to keep.*not 0.0"),
        (COSINES, None, {"recall": 95}, "not 95"),
    ],
)
def test_what_cannot_be_used_is_named(
    cosines: Floats, targets: NDArray[Any] | None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        fit(cosines, targets, head(100.0), **options)


@pytest.mark.parametrize("given", [head(0.0), head(float("nan")), head(1.0, float("inf"))])
def test_a_broken_head_is_refused(given: Head) -> None:
    with pytest.raises(DataError, match="no scale above 0 and finite bias"):
        fit_head(COSINES, TARGETS, given)


def negated() -> tuple[PromptBank, Floats]:
    """A bank of which "dog" has a negative prompt, and frames; some are nearer to that."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4, 64))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)

    def embed(texts: Sequence[str]) -> Floats:
        return np.asarray(rows[: len(texts)], np.float32)

    bank = build_bank({"dog": {"not": ["a toy dog"]}, "cat": {}, "fox": {}}, ["{}"], embed, "")
    frames = bank.rows[rng.integers(0, 3, 200)] + rng.normal(0, 0.1, (200, 64))
    frames[:2] = bank.rows[0] + 1.5 * bank.rows[3]  # dogs that look like toys
    frames /= np.linalg.norm(frames, axis=1, keepdims=True)
    return bank, np.asarray(frames, np.float32)


def test_what_is_fitted_is_what_the_runtime_says() -> None:
    bank, frames = negated()
    seen = cosines_of(frames, bank)
    assert (seen.standing < -1).any(axis=1).sum() >= 2
    said = predictions(np.asarray(frames @ bank.rows.T), bank, head(30.0))
    assert np.allclose(seen.scores(head(30.0), 3), [found.scores for found in said])


def test_a_label_that_is_ruled_out_does_not_spoil_the_temperature() -> None:
    bank, frames = negated()
    seen = cosines_of(frames, bank)
    targets = seen.all[:, :3].argmax(axis=1)
    targets[:2] = 0
    found = fit(seen, targets, head(100.0), labels=3)
    assert found.head == fit_head(seen.all, targets, head(100.0))
    spoilt = fit_head(seen.standing, targets, head(100.0))
    assert found.head.logit_scale > 1.2 * spoilt.logit_scale


def test_frames_that_background_fits_best_are_named_by_no_label() -> None:
    cosines = np.tile(np.array([0.1, 0.2, 0.3], np.float32), (5, 1))
    assert not names_some(both(cosines), None, 2) and names_some(both(cosines), None, 3)
    with pytest.raises(DataError, match="background fits all of them better"):
        fit_limit(cosines, head(10.0), labels=2)
