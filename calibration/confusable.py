"""Which labels lie too close to each other to be told apart, by their text embeddings alone."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.label_sets import LabelSet
from runtime.manifest import Head
from runtime.prompts import PromptBank

from .metrics import Floats

SHARE = 0.05
BLOCK = 256
MOST = 1000  # pairs that are told, and labels that the median is of


@dataclass(frozen=True)
class Pair:
    """A label, and another row that competes with it: a label, a negative prompt ("not"), or
    background. `share` is what the other gets of a frame that lies exactly on the label, `distance`
    how far they are apart as a multiple of the median pair of labels (1 - cosine of each)."""

    label: str
    other: str
    kind: str
    cosine: float
    share: float
    distance: float
    too_close: bool


def confusable(bank: PromptBank, head: Head, most: int = 10) -> list[Pair]:
    """The pairs that are too close, closest first (MOST at most), then others up to `most` in all.

    A frame that lies exactly on label i has cosine 1 with it and c with row j, so that of the two
    j gets share(c) = 1 / (1 + exp(scale (1 - c))) by the model's own scale. Where that is 5 % or
    more, i.e. c >= 1 - ln(19) / scale (0.971 at CLIP's scale of 100), the pair is too close: even a
    perfect frame is not told apart. Real frames do worse: those of a CLIP have a cosine of about
    0.3 with their texts (the modality gap: Liang et al. 2022, arXiv:2203.02053), the difference of
    the two logits shrinks alike, and such a pair gets 29 % there. A sigmoid's head is judged by the
    same two logits.
    """
    limit = 1 - np.log((1 - SHARE) / SHARE) / head.logit_scale
    median = _median_distance(bank.embeddings)
    rows, columns, cosines = _closest(bank, limit, most)
    names = [*bank.labels, *bank.made_of.others]
    logits = head.logit_scale * (1 - cosines.astype(np.float64))  # by how much i is above j
    return [
        Pair(
            label=bank.labels[i],
            other=names[j],
            kind=_kind(bank.made_of, j),
            cosine=float(c),
            share=float(np.exp(-z) / (1 + np.exp(-z))),
            distance=float((1 - c) / median) if median > 0 else 0.0,
            too_close=bool(c >= limit),
        )
        for i, j, c, z in zip(rows, columns, cosines, logits, strict=True)
    ]


def _closest(
    bank: PromptBank, limit: float, most: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], Floats]:
    """The pairs (label, row) with the greatest cosines."""
    found = [np.concatenate(parts) for parts in zip(*_blocks(bank), strict=True)]
    rows, columns, cosines = found[0], found[1], found[2]
    order = np.argsort(-cosines, kind="stable")
    count = min(MOST, max(most, int((cosines >= limit).sum())))
    kept = order[:count]
    return rows[kept], columns[kept], cosines[kept]


def _blocks(bank: PromptBank) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp], Floats]]:
    """The MOST closest pairs of each block of labels with all rows, every pair once."""
    count = len(bank.labels)
    for start in range(0, count, BLOCK):
        block = bank.embeddings[start : start + BLOCK] @ bank.rows.T
        later = np.arange(block.shape[1])[None] > np.arange(start, start + len(block))[:, None]
        rows, columns = np.nonzero(later)
        cosines = block[rows, columns].clip(-1, 1)
        best = np.argsort(-cosines, kind="stable")[:MOST]
        yield rows[best] + start, columns[best], cosines[best]


def _median_distance(embeddings: Floats) -> float:
    """Of all pairs of at most MOST labels, evenly drawn; 0 for a single label."""
    some = embeddings[:: -(-len(embeddings) // MOST)]
    cosines = (some @ some.T)[np.triu_indices(len(some), 1)]
    return float(1 - np.median(cosines)) if len(cosines) else 0.0


def _kind(label_set: LabelSet, row: int) -> str:
    if row < len(label_set.labels):
        return "label"
    text = label_set.others[row - len(label_set.labels)]
    return "background" if text in label_set.background else "not"
