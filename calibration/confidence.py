"""Scores that can be believed: a head, and the threshold of "unknown", fitted to frames' cosines.

A CLIP's logit scale was learned for contrast within a batch, not for the labels of a prompt bank,
and an INT8 encoder moves the cosines a little: each precision gets a head of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.errors import DataError
from runtime.manifest import Head
from runtime.prediction import scores_of

from .metrics import Counts, Floats, expected_calibration_error, reliability
from .temperature import BLOCK, check, check_cosines, fit_head, nll


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """A head whose scores can be believed, the threshold of "unknown", and how good they are.

    `how` says in words what they were fitted to. ECE is that of the best label's score, NLL the
    mean loss of a frame in nats (see `nll`), both of held-out frames; None without labels, or
    with a single frame. A sigmoid score is of one label by itself, unaware that it is the best of
    several: where one label only is right, ECE stays above 0 even with the best head.
    """

    head: Head
    threshold: float
    how: str
    frames: int
    ece_before: float | None = None
    ece_after: float | None = None
    nll_before: float | None = None
    nll_after: float | None = None


def fit(
    cosines: Floats,
    targets: Counts | None,
    head: Head,
    *,
    reference: Floats | None = None,
    unknown: Floats | None = None,
    recall: float = 0.95,
) -> Confidence:
    """Fits head and threshold to the cosines float32 [N, C] of frames with a bank's labels.

    For the other arguments see `fit_head` and `fit_threshold`. With labels the frames are dealt
    into two halves, class by class; each is measured with the head that the other gave. The head
    that is returned is fitted to all. The same input gives the same result. Raises DataError.
    """
    fitted = fit_head(cosines, targets, head, reference)
    threshold = fit_threshold(cosines, fitted, targets, unknown, recall)
    how = _how(targets, reference, unknown, recall)
    if targets is None or len(targets) < 2:
        return Confidence(head=fitted, threshold=threshold, how=how, frames=len(cosines))
    order = np.argsort(targets, kind="stable")
    one, other = order[::2], order[1::2]
    from_one, from_other = (fit_head(cosines[rows], targets[rows], head) for rows in (one, other))
    ece_before, nll_before = _measured(cosines, targets, [(order, head)])
    ece_after, nll_after = _measured(cosines, targets, [(one, from_other), (other, from_one)])
    return Confidence(
        head=fitted,
        threshold=threshold,
        how=how,
        frames=len(cosines),
        ece_before=ece_before,
        ece_after=ece_after,
        nll_before=nll_before,
        nll_after=nll_after,
    )


def _how(
    targets: Counts | None, reference: Floats | None, unknown: Floats | None, recall: float
) -> str:
    head, frames = "head as it was", "frames"
    if targets is not None:
        head, frames = "head fitted to labels", "rightly named frames"
    elif reference is not None:
        head = "head fitted to the reference's scores"
    if unknown is None:
        return f"{head}; threshold that keeps {100 * recall:g}% of the {frames}"
    return f"{head}; threshold that best separates the {frames} from {len(unknown)} of no label"


def _measured(
    cosines: Floats, targets: Counts, parts: Sequence[tuple[Counts, Head]]
) -> tuple[float, float]:
    """ECE and NLL of frames [N] of which these rows are scored by these heads."""
    scores = np.empty(len(cosines), dtype=np.float32)
    loss = 0.0
    for rows, head in parts:
        scores[rows] = _best_scores(cosines[rows], head)
        loss += nll(cosines[rows], targets[rows], head) * len(rows) / len(cosines)
    bins = reliability(scores, cosines.argmax(axis=1) == targets)
    return expected_calibration_error(bins), loss


def fit_threshold(
    cosines: Floats,
    head: Head,
    targets: Counts | None = None,
    unknown: Floats | None = None,
    recall: float = 0.95,
) -> float:
    """The score in [0, 1] below which a frame is "unknown" (see `Prediction.unknown`).

    - With `unknown` float32 [M, C], cosines of frames that are of none of the labels: the score
      with the greatest Youden's J = the share of known frames kept - the share of unknown ones
      kept (Youden 1950; 2 * balanced accuracy - 1). It lies midway between two scores; of equal
      ones it is the lowest, and 0 (nothing is unknown) where none is better than that.
    - Else the highest score that keeps the share `recall` of the known frames: their
      1 - recall quantile.

    Known are, with labels int64 [N], the frames that the best label names rightly, for a wrong
    name may be rejected at no loss; without labels, all. Raises DataError.
    """
    check(cosines, head, targets)
    right = np.ones(len(cosines), bool) if targets is None else cosines.argmax(axis=1) == targets
    if not right.any():
        raise DataError(
            f"none of the {len(cosines)} frames is named rightly, so that there is no score to "
            "keep: check that the targets are in the order of the bank's labels, or leave them out"
        )
    known = np.sort(_best_scores(cosines, head)[right])
    if unknown is not None:
        check_cosines("unknown", unknown, cosines.shape[1])
        return _best_separation(known, np.sort(_best_scores(unknown, head)))
    if not 0 < recall <= 1:
        raise DataError(f"recall is the share of frames to keep, above 0 and up to 1, not {recall}")
    kept = max(1, int(np.ceil(recall * len(known) - 1e-9)))  # 0.07 * 100 is a little over 7
    return float(known[len(known) - kept])


def _best_scores(cosines: Floats, head: Head) -> Floats:
    """The best label's score of each frame, float32 [N], as `Prediction.score`."""
    blocks = (cosines[start : start + BLOCK] for start in range(0, len(cosines), BLOCK))
    return np.concatenate([scores_of(block, head).max(axis=1) for block in blocks])


def _best_separation(known: Floats, unknown: Floats) -> float:
    """The threshold with the greatest Youden's J for scores in ascending order."""
    scores = np.unique(np.concatenate([known, unknown])).astype(np.float64)
    thresholds = np.concatenate([[0.0], (scores[1:] + scores[:-1]) / 2])
    lost = np.searchsorted(known, thresholds) / len(known)
    found = np.searchsorted(unknown, thresholds) / len(unknown)
    return float(thresholds[np.argmax(found - lost)])
