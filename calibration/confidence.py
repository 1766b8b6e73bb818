"""Scores that can be believed: a head, and the limit of "unknown", fitted to frames' cosines.

A CLIP's logit scale was learned for contrast within a batch, not for the labels of a prompt bank,
and an INT8 encoder moves the cosines a little: each precision gets a head of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.head import Cosines
from runtime.manifest import Head

from .metrics import Counts, Floats, expected_calibration_error, reliability
from .temperature import fit_head, nll
from .unknown import Limit, blocks, both, fit_limit


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """A head whose scores can be believed, the limit of "unknown", and how good they are.

    `how` says in words what they were fitted to. ECE is that of the best label's score, NLL the
    mean loss of a frame in nats (see `nll`), both of held-out frames; None without labels, or
    with a single frame. A sigmoid score is of one label by itself, unaware that it is the best of
    several: where one label only is right, ECE stays above 0 even with the best head.
    """

    head: Head
    limit: Limit
    how: str
    frames: int
    ece_before: float | None = None
    ece_after: float | None = None
    nll_before: float | None = None
    nll_after: float | None = None


def fit(
    cosines: Floats | Cosines,
    targets: Counts | None,
    head: Head,
    *,
    reference: Floats | None = None,
    unknown: Floats | Cosines | None = None,
    recall: float = 0.95,
    labels: int | None = None,
) -> Confidence:
    """Fits head and limit to the cosines float32 [N, C] of frames with a bank's labels.

    For the other arguments see `fit_head` and `fit_limit`. With labels the frames are dealt
    into two halves, class by class; each is measured with the head that the other gave. The head
    that is returned is fitted to all. The same input gives the same result. Raises DataError.
    """
    seen = both(cosines)
    fitted = fit_head(seen.all, targets, head, reference)
    limit = fit_limit(cosines, fitted, targets, unknown, recall, labels)
    strange = None if unknown is None else both(unknown).all
    how = _how(targets, reference, strange, recall)
    if targets is None or len(targets) < 2:
        return Confidence(head=fitted, limit=limit, how=how, frames=len(seen.all))
    order = np.argsort(targets, kind="stable")
    one, other = order[::2], order[1::2]
    from_one, from_other = (fit_head(seen.all[rows], targets[rows], head) for rows in (one, other))
    count = labels or seen.all.shape[1]
    ece_before, nll_before = _measured(seen, targets, [(order, head)], count)
    crossed = [(one, from_other), (other, from_one)]
    ece_after, nll_after = _measured(seen, targets, crossed, count)
    return Confidence(
        head=fitted,
        limit=limit,
        how=how,
        frames=len(seen.all),
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
    chosen = "" if unknown is None else f", the measure chosen on {len(unknown)} frames of no label"
    return f"{head}; threshold that keeps {100 * recall:g}% of the {frames}{chosen}"


def _measured(
    cosines: Cosines, targets: Counts, parts: Sequence[tuple[Counts, Head]], labels: int
) -> tuple[float, float]:
    """ECE and NLL of frames [N] of which these rows are scored by these heads. Of frames that fit
    background best nothing is said, so that they do not count in the ECE."""
    scores = np.empty(len(targets), dtype=np.float32)
    loss = 0.0
    for rows, head in parts:
        scores[rows] = _best_scores(cosines.rows(rows), head, labels)
        loss += nll(cosines.all[rows], targets[rows], head) * len(rows) / len(targets)
    best = cosines.standing.argmax(axis=1)
    said = best < labels
    if not said.any():
        return 0.0, loss
    return expected_calibration_error(reliability(scores[said], best[said] == targets[said])), loss


def _best_scores(cosines: Cosines, head: Head, labels: int) -> Floats:
    """The best label's score of each frame, float32 [N], as `Prediction.score`."""
    return np.concatenate([b.scores(head, labels).max(axis=1) for b in blocks(cosines)])
