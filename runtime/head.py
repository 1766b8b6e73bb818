"""From a frame's cosines with a prompt bank to what it is taken for."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .layout import Layout, Tree
from .manifest import Head
from .prediction import Prediction, scores_of
from .prompts import PromptBank
from .unknown import RULED_OUT, measured

Floats = NDArray[np.float32]


def predictions(
    cosines: Floats,
    bank: PromptBank,
    head: Head,
    *,
    precision: str = "",
    threshold: float | None = None,
    timings: Mapping[str, float] | None = None,
    backend: str = "",
) -> list[Prediction]:
    """What each frame is taken for, from its cosines with all rows of the bank, [B, N + E].

    All rows share one softmax. A label is ruled out where one of its negative prompts has the
    greater cosine: it scores 0 and comes last. With groups the best label is found coarse to fine:
    a group scores the sum of its labels (sigmoid: their maximum). `unknown` is said by background
    with a greater cosine than all labels, or by `threshold`; where that is None, by what was fitted
    with the bank for the `precision`, as are the scores.
    """
    fitted = bank.fitted.get(precision)
    head = fitted.head if fitted else head
    layout, count = bank.layout, len(bank.labels)
    own = cosines[:, :count]
    scores = scores_of(cosines, head)[:, :count]
    ruled_out = ruled_out_labels(cosines, layout, count)
    standing = own
    if ruled_out is not None:
        scores = np.where(ruled_out, np.float32(0), scores)
        standing = np.where(ruled_out, RULED_OUT, own)
    certainty: list[float] | None = None
    if threshold is None and fitted and fitted.measure != "score":
        certainty = measured(fitted.measure, standing, scores, head).tolist()
    if threshold is None:
        threshold = fitted.threshold if fitted else 0.0
    background = _background(cosines, standing, layout)
    groups, best = _chosen(scores, standing, layout.tree, head)
    if ruled_out is not None:
        alone = own.argmax(axis=1)  # nothing stands: what is closest, though it is unknown
        best = [int(alone[n]) if ruled_out[n].all() else best[n] for n in range(len(best))]
    return [
        Prediction(
            labels=bank.labels,
            scores=scores[n],
            cosines=own[n],
            threshold=threshold,
            timings=timings or {},
            backend=backend,
            best=best[n],
            ruled_out=None if ruled_out is None else ruled_out[n],
            background=background[n] if background else None,
            tree=layout.tree,
            group_scores=groups[n],
            certainty=certainty[n] if certainty else None,
        )
        for n in range(len(cosines))
    ]


class Cosines(NamedTuple):
    """Cosines of frames with all rows of a bank, float32 [B, N + E]. All count in the softmax; in
    `standing` there is RULED_OUT in the place of labels that are."""

    all: Floats
    standing: Floats

    def rows(self, which: NDArray[Any]) -> "Cosines":
        """Those of some frames."""
        return Cosines(self.all[which], self.standing[which])

    def scores(self, head: Head, labels: int) -> Floats:
        """The scores of the first `labels` rows [B, labels]: 0 where they are ruled out."""
        scores = scores_of(self.all, head)[:, :labels]
        return np.where(self.standing[:, :labels] > RULED_OUT, scores, np.float32(0))


def cosines_of(embeddings: Floats, bank: PromptBank) -> Cosines:
    """Cosines of unit rows [B, D] with a bank."""
    cosines = np.asarray(embeddings @ bank.rows.T, dtype=np.float32)
    ruled_out = ruled_out_labels(cosines, bank.layout, len(bank.labels))
    standing = cosines
    if ruled_out is not None:
        standing = cosines.copy()
        standing[:, : len(bank.labels)][ruled_out] = RULED_OUT
    return Cosines(cosines, standing)


def ruled_out_labels(cosines: Floats, layout: Layout, count: int) -> NDArray[np.bool_] | None:
    """Which of the `count` labels, bool [B, N], are ruled out by cosines [B, N + E]: those of which
    a negative prompt fits better. None where there are no negative prompts."""
    if not layout.negated.size:
        return None
    negative = np.maximum.reduceat(cosines[:, layout.negatives], layout.starts, axis=1)
    ruled_out = np.zeros((len(cosines), count), dtype=np.bool_)
    ruled_out[:, layout.negated] = negative > cosines[:, layout.negated]
    return ruled_out


def _background(cosines: Floats, standing: Floats, layout: Layout) -> list[str | None] | None:
    """The background text that fits better than every label that stands; None where none does."""
    if not layout.background.size:
        return None
    rows = cosines[:, layout.background]
    better = rows.max(axis=1) > standing.max(axis=1)
    best = rows.argmax(axis=1)
    return [
        layout.texts[n] if is_better else None for n, is_better in zip(best, better, strict=True)
    ]


def _chosen(
    scores: Floats, standing: Floats, tree: Tree | None, head: Head
) -> tuple[Floats, list[int]]:
    """The groups' scores [B, G], and the best label of each frame.

    By sigmoids the greatest cosine decides: scores may be so sure that they are equal.
    """
    if tree is None:
        return np.empty((len(scores), 0), np.float32), standing.argmax(axis=1).tolist()
    if head.activation == "sigmoid":
        groups = tree.of_groups(scores, np.maximum)
        values = np.concatenate([standing, tree.of_groups(standing, np.maximum)], axis=1)
    else:
        groups = tree.of_groups(scores, np.add)
        stands = standing > RULED_OUT
        in_groups = tree.of_groups(stands.astype(np.float32), np.maximum) > 0
        values = np.concatenate(
            [np.where(stands, scores, -1), np.where(in_groups, groups, -1)], axis=1
        )
    return groups, [tree.best(row) for row in values]
