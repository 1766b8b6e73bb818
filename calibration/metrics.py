"""Figures of merit, in NumPy: the same for a PyTorch model, an ONNX file and an engine."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Counts = NDArray[np.int64]
NOWHERE = np.iinfo(np.int64).max


def ranks(similarity: Floats, positives: NDArray[np.bool_]) -> Counts:
    """The rank of each row's best positive among its columns [N, M]; 0 is the most similar.

    A tie with a negative counts against the model. A row without a positive, or with NaN at it,
    has the rank NOWHERE.
    """
    best = np.where(positives, similarity, -np.inf).max(axis=1)
    ahead = (~positives & ~(similarity < best[:, None])).sum(axis=1)
    return np.asarray(np.where(np.isfinite(best), ahead, NOWHERE), dtype=np.int64)


def share_within(ranks: Counts, k: int) -> float:
    """The share of ranks below k: top-k accuracy, or R@k where a row has several positives."""
    return float((ranks < k).mean())


def confusion_matrix(targets: Counts, predicted: Counts, classes: int) -> Counts:
    """Counts [C, C]: how often class i (row) was taken for class j (column)."""
    matrix = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(matrix, (targets, predicted), 1)
    return matrix


class ClassFigures(NamedTuple):
    """Figures of each class, float64 [C]; 0 where a share has nothing to be a share of."""

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]


def class_figures(confusion: Counts) -> ClassFigures:
    """Precision TP / (TP + FP), recall TP / (TP + FN) and their harmonic mean F1, by class.

    As scikit-learn's `precision_recall_fscore_support(zero_division=0)`.
    """
    right = np.diag(confusion).astype(np.float64)
    predicted, true = confusion.sum(axis=0), confusion.sum(axis=1)
    return ClassFigures(
        right / np.maximum(predicted, 1),
        right / np.maximum(true, 1),
        2 * right / np.maximum(predicted + true, 1),
    )


class Bin(NamedTuple):
    """Predictions whose confidence is in (low, high]: how many, how sure and how right.

    `confidence` and `accuracy` are means over the bin, 0 where it is empty.
    """

    low: float
    high: float
    number: int
    confidence: float
    accuracy: float


def reliability(confidence: Floats, right: NDArray[np.bool_], bins: int = 15) -> tuple[Bin, ...]:
    """Bins of equal width over [0, 1] for confidences [N] and whether each was right.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv:1706.04599, section 2; 15
    bins as there.
    """
    index = np.clip(np.ceil(confidence.astype(np.float64) * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(index, minlength=bins)
    sure = np.bincount(index, weights=confidence, minlength=bins) / np.maximum(counts, 1)
    true = np.bincount(index, weights=right, minlength=bins) / np.maximum(counts, 1)
    return tuple(
        Bin(i / bins, (i + 1) / bins, int(counts[i]), float(sure[i]), float(true[i]))
        for i in range(bins)
    )


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """ECE = sum over bins of number / N * |accuracy - confidence| (Guo et al. 2017, equation 3)."""
    total = sum(b.number for b in bins)
    return sum(b.number * abs(b.accuracy - b.confidence) for b in bins) / total


def auroc(higher: NDArray[np.float64], lower: NDArray[np.float64]) -> float:
    """Area under the ROC curve: how often a value of `higher` is above one of `lower`, ties
    counting half (Mann-Whitney's U over all pairs). 0.5 is chance."""
    order = np.sort(lower)
    below = np.searchsorted(order, higher, "left") + np.searchsorted(order, higher, "right")
    return float(below.sum() / (2 * len(higher) * len(lower)))


def row_cosines(a: Floats, b: Floats) -> NDArray[np.float64]:
    """Cosine of each row of a [N, D] with the same row of b; NaN where a row is not finite."""
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a64, axis=1) * np.linalg.norm(b64, axis=1)
    return np.asarray((a64 * b64).sum(axis=1) / np.maximum(norms, 1e-300), dtype=np.float64)
