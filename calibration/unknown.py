"""Which measure tells best that a frame is of none of the labels, and where its threshold lies."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from runtime.errors import DataError
from runtime.head import Cosines
from runtime.manifest import Head
from runtime.unknown import Measure, measured

from .metrics import Counts, Floats, auroc
from .temperature import BLOCK, check, check_cosines

Values = NDArray[np.float64]
HIDDEN = 50  # labels that are hidden at most, to choose a measure: those of the most frames


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A frame whose `measure` is below the `threshold` is unknown (see `Prediction.unknown`).

    `auroc` is how well the measure told known frames from unknown ones; None where there were none
    to tell. `false_alarms` is the share of known frames that a threshold from one half of them
    calls unknown in the other: of those it has not seen; None for fewer than 2. `found` is the
    share of the given unknown frames that are called so.
    """

    measure: Measure
    threshold: float
    auroc: float | None = None
    false_alarms: float | None = None
    found: float | None = None


def both(cosines: Floats | Cosines) -> Cosines:
    """Cosines of which no label is ruled out, where only those are given."""
    return cosines if isinstance(cosines, Cosines) else Cosines(cosines, cosines)


def fit_limit(
    cosines: Floats | Cosines,
    head: Head,
    targets: Counts | None = None,
    unknown: Floats | Cosines | None = None,
    recall: float = 0.95,
    labels: int | None = None,
) -> Limit:
    """The measure and threshold that fit cosines float32 [N, C] of known frames best.

    The first `labels` columns (default: all) are the labels', the others of what competes with
    them in the softmax: a bank's background and negative prompts. Known are, with `targets` int64
    [N], the frames that the best label names rightly, for a wrong name may be rejected at no loss;
    without, all that fit a label best.

    The measure is the one with the greatest area under the ROC curve: of known frames against
    `unknown` float32 [M, C], cosines of frames that are of none of the labels; without those each
    label is hidden in turn, and its frames are taken for unknown ones.

    The threshold keeps the share `recall` of frames to come: it is the k-th lowest value of n, k =
    (n + 1) * (1 - recall) rounded down, below which a new frame falls with probability k / (n + 1)
    (split conformal prediction: Vovk et al. 2005, "Algorithmic Learning in a Random World"). Fewer
    than 1 / (1 - recall) frames cannot promise so much: theirs is the lowest value.

    Raises DataError.
    """
    seen, strange = both(cosines), None if unknown is None else both(unknown)
    check(seen.all, head, targets)
    if not 0 < recall <= 1:
        raise DataError(f"recall is the share of frames to keep, above 0 and up to 1, not {recall}")
    if strange is not None:
        check_cosines("unknown", strange.all, seen.all.shape[1])
    labels = labels or seen.all.shape[1]
    right = _right(seen, targets, labels)
    measure, area = _best_measure(seen, head, targets, strange, labels)
    known = _values(measure, seen.rows(right), head, labels)
    threshold = _quantile(known, recall)
    below = None if strange is None else _values(measure, strange, head, labels) < threshold
    return Limit(
        measure=measure,
        threshold=threshold,
        auroc=area,
        false_alarms=_false_alarms(known, recall),
        found=None if below is None else float(below.mean()),
    )


def names_some(cosines: Cosines, targets: Counts | None, labels: int) -> bool:
    """Whether any frame is named rightly (without `targets`: by a label at all), so that there is
    something to fit."""
    return bool(_named(cosines, targets, labels).any())


def _named(cosines: Cosines, targets: Counts | None, labels: int) -> NDArray[np.bool_]:
    best = cosines.standing.argmax(axis=1)
    return np.asarray(best < labels if targets is None else best == targets)


def _right(cosines: Cosines, targets: Counts | None, labels: int) -> NDArray[np.bool_]:
    right = _named(cosines, targets, labels)
    if not right.any():
        how = "by a label of the bank: background fits all of them better"
        if targets is not None:
            how = "rightly: check that the targets are in the order of the bank's labels"
        raise DataError(
            f"none of the {len(cosines.all)} frames is named {how}. There is no score to keep"
        )
    return right


def _values(measure: Measure, cosines: Cosines, head: Head, labels: int) -> Values:
    return np.concatenate(
        [
            measured(measure, block.standing[:, :labels], block.scores(head, labels), head)
            for block in blocks(cosines)
        ]
    )


def blocks(cosines: Cosines) -> Iterator[Cosines]:
    """The frames, BLOCK at a time."""
    for start in range(0, len(cosines.all), BLOCK):
        yield Cosines(*(part[start : start + BLOCK] for part in cosines))


def _best_measure(
    cosines: Cosines, head: Head, targets: Counts | None, unknown: Cosines | None, labels: int
) -> tuple[Measure, float | None]:
    """The measure with the greatest area under the ROC curve, and that: of equal ones the first.

    Frames without labels are taken for what they are named: that flatters all measures, so their
    area is not told.
    """
    right = _right(cosines, targets, labels)
    areas: dict[Measure, float] = {}
    for measure in get_args(Measure):
        if unknown is not None:
            known = _values(measure, cosines.rows(right), head, labels)
            areas[measure] = auroc(known, _values(measure, unknown, head, labels))
        else:
            best = cosines.standing[:, :labels].argmax(axis=1)
            names = best if targets is None else targets
            areas[measure] = _hiding(measure, cosines, head, names, labels)
    chosen = max(areas, key=areas.__getitem__)
    told = unknown is not None or (targets is not None and areas[chosen] > 0)
    return chosen, areas[chosen] if told else None


def _hiding(measure: Measure, cosines: Cosines, head: Head, names: Counts, labels: int) -> float:
    """The mean area over the labels, where each is hidden in turn and its frames are the unknown;
    0 where there is but one label, or all frames are of one."""
    areas = []
    present, frames = np.unique(names, return_counts=True)
    if labels < 2 or len(present) < 2:
        return 0.0
    for hidden in present[np.argsort(-frames, kind="stable")][:HIDDEN]:
        its = names == hidden
        others = Cosines(*(np.delete(part, hidden, axis=1) for part in cosines))
        values = _values(measure, others, head, labels - 1)
        areas.append(auroc(values[~its], values[its]))
    return float(np.mean(areas))


def _quantile(known: Values, recall: float) -> float:
    rank = int((len(known) + 1) * (1 - recall) + 1e-9)  # what is 1 but for rounding is 1
    return float(np.sort(known)[min(max(rank, 1), len(known)) - 1])


def _false_alarms(known: Values, recall: float) -> float | None:
    """Of two halves, each measured with the threshold of the other."""
    if len(known) < 2:
        return None
    one, other = known[::2], known[1::2]
    lost = (one < _quantile(other, recall)).sum() + (other < _quantile(one, recall)).sum()
    return float(lost / len(known))
