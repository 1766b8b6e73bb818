"""Evaluates embeddings: zero-shot classification where there are labels, retrieval where not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runtime.errors import GateFailed
from runtime.manifest import Head
from runtime.prediction import Prediction, scores_of
from runtime.prompts import build_bank

from .metrics import (
    Bin,
    Counts,
    Floats,
    class_figures,
    confusion_matrix,
    expected_calibration_error,
    ranks,
    reliability,
    share_within,
)
from .pairs import Pairs

RANKS = (1, 5, 10)  # where there is more than that to choose from
BLOCK = 256  # rows compared at once: 25 MB of cosines with 25,000 texts
MISTAKES = 24
CASES = 4  # captions found, and as many missed
SHOWN = 5  # pictures for each of them


class ClassRow(NamedTuple):
    """One class: how many pictures it has, and how well they were told from the others."""

    label: str
    pictures: int
    precision: float
    recall: float
    f1: float


class Mistake(NamedTuple):
    """A picture that was taken for something else than its label."""

    file: Path
    label: str
    prediction: Prediction


class Found(NamedTuple):
    """One picture that a caption found: whether it is one of the caption's own, and the cosine."""

    file: Path
    right: bool
    cosine: float


class Retrieval(NamedTuple):
    """A caption, the pictures most similar to it, and the place (from 1) and file of the best of
    its own pictures."""

    caption: str
    place: int
    own: Path
    found: tuple[Found, ...]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model reached on one data set.

    `figures` are shares: with labels top1, top5, macro_precision, macro_recall, macro_f1 (means
    over the classes with pictures), confidence (the mean score of the best label) and ece; with
    captions image_to_text_r1, _r5, _r10 and text_to_image_r1, _r5, _r10; but none that is of no
    more candidates than its k. The rest is empty or None
    where it does not apply. `confusion` is int64 [C, C], true classes in rows.
    """

    figures: dict[str, float]
    pictures: int
    captions: int = 0
    templates: tuple[str, ...] = ()
    classes: tuple[ClassRow, ...] = ()
    confusion: Counts | None = None
    bins: tuple[Bin, ...] = ()
    mistakes: tuple[Mistake, ...] = ()
    retrievals: tuple[Retrieval, ...] = ()


def evaluate(
    pairs: Pairs,
    images: Floats,
    embed_text: Callable[[Sequence[str]], Floats],
    head: Head,
    templates: Sequence[str],
) -> Evaluation:
    """Evaluates the unit embeddings [N, D] of the pairs' pictures.

    With labels each class is put into every template, and the mean of the embeddings is compared
    (see `runtime.prompts`). With captions a hit is any of a picture's captions, or any picture of
    a caption. Raises GateFailed where an embedding is not finite.
    """
    _check_finite(images, [str(file) for file in pairs.files])
    if pairs.targets is None:
        return _retrieval(pairs, images, embed_text)
    bank = build_bank(pairs.classes, templates, embed_text, "")
    _check_finite(bank.embeddings, pairs.classes)
    return _classification(pairs, images, bank.embeddings, head, bank.templates)


def _check_finite(rows: Floats, names: Sequence[str]) -> None:
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise GateFailed(
            f"the model gives no finite embedding for {len(bad)} of {len(rows)} inputs, first "
            f"{names[bad[0]]!r}: its weights or its precision do not work"
        )


def _classification(
    pairs: Pairs, images: Floats, bank: Floats, head: Head, templates: tuple[str, ...]
) -> Evaluation:
    targets = np.array(pairs.targets)
    found = _ranks(images, bank, [(target,) for target in targets])
    predicted, confidence = _best(images, bank, head)
    right = predicted == targets
    confusion = confusion_matrix(targets, predicted, len(pairs.classes))
    rows = _class_rows(pairs.classes, confusion)
    bins = reliability(confidence, right)
    figures = {"top1": float(right.mean())}
    if len(bank) > 5:
        figures["top5"] = share_within(found, 5)
    for name in ("precision", "recall", "f1"):
        values = [getattr(row, name) for row in rows if row.pictures]
        figures[f"macro_{name}"] = float(np.mean(values))
    figures["confidence"] = float(confidence.mean())
    figures["ece"] = expected_calibration_error(bins)
    wrong = np.flatnonzero(~right)
    surest = wrong[np.argsort(-confidence[wrong], kind="stable")]
    return Evaluation(
        figures,
        len(pairs),
        templates=templates,
        classes=rows,
        confusion=confusion,
        bins=bins,
        mistakes=tuple(_mistake(pairs, i, images, bank, head) for i in surest[:MISTAKES]),
    )


def _ranks(rows: Floats, columns: Floats, positives: Sequence[Sequence[int]]) -> Counts:
    """`metrics.ranks` of rows [N, D] among columns [M, D], a block of rows at a time."""
    parts = []
    for start in range(0, len(rows), BLOCK):
        similarity = rows[start : start + BLOCK] @ columns.T
        own = np.zeros(similarity.shape, dtype=bool)
        for row, of_row in enumerate(positives[start : start + BLOCK]):
            own[row, of_row] = True
        parts.append(ranks(similarity, own))
    return np.concatenate(parts)


def _best(images: Floats, bank: Floats, head: Head) -> tuple[Counts, Floats]:
    """The best label of every picture [N], and its score [N]."""
    blocks = [images[start : start + BLOCK] for start in range(0, len(images), BLOCK)]
    cosines = [block @ bank.T for block in blocks]
    best = [block.argmax(axis=1) for block in cosines]  # scores may be so sure that they are equal
    scores = [scores_of(block, head).max(axis=1) for block in cosines]
    return np.concatenate(best), np.concatenate(scores)


def _class_rows(classes: Sequence[str], confusion: Counts) -> tuple[ClassRow, ...]:
    figures, pictures = class_figures(confusion), confusion.sum(axis=1)
    return tuple(
        ClassRow(label, int(pictures[i]), *(float(values[i]) for values in figures))
        for i, label in enumerate(classes)
    )


def _mistake(pairs: Pairs, row: int, images: Floats, bank: Floats, head: Head) -> Mistake:
    cosines = images[row] @ bank.T
    prediction = Prediction(pairs.classes, scores_of(cosines, head), cosines)
    return Mistake(pairs.files[row], pairs.classes[(pairs.targets or ())[row]], prediction)


def _retrieval(
    pairs: Pairs, images: Floats, embed_text: Callable[[Sequence[str]], Floats]
) -> Evaluation:
    used = sorted({c for own in pairs.captions for c in own})
    column = {caption: j for j, caption in enumerate(used)}
    captions_of = [[column[c] for c in own] for own in pairs.captions]
    images_of: list[list[int]] = [[] for _ in used]
    for image, own in enumerate(captions_of):
        for caption in own:
            images_of[caption].append(image)
    texts = [pairs.texts[c] for c in used]
    rows = embed_text(texts)
    _check_finite(rows, texts)
    to_text, to_image = _ranks(images, rows, captions_of), _ranks(rows, images, images_of)
    figures = {f"image_to_text_r{k}": share_within(to_text, k) for k in RANKS if k < len(rows)}
    figures |= {f"text_to_image_r{k}": share_within(to_image, k) for k in RANKS if k < len(images)}
    cases = _cases(to_image, (images[[own[0] for own in images_of]] * rows).sum(axis=1), images_of)
    return Evaluation(
        figures,
        len(pairs),
        captions=len(texts),
        retrievals=tuple(
            _case(pairs.files, texts[c], images_of[c], images @ rows[c], int(to_image[c]))
            for c in cases
        ),
    )


def _cases(found: Counts, cosines: Floats, images_of: Sequence[Sequence[int]]) -> list[int]:
    """Captions to show: the surest of those that found their picture at once, then those that
    missed it by most, each of another picture."""
    hits, misses = np.flatnonzero(found == 0), np.flatnonzero(found)
    surest = hits[np.argsort(-cosines[hits], kind="stable")]
    worst = misses[np.argsort(-found[misses], kind="stable")]
    return _of_different_images(surest, images_of) + _of_different_images(worst, images_of)


def _of_different_images(captions: Counts, images_of: Sequence[Sequence[int]]) -> list[int]:
    first: dict[int, int] = {}
    for caption in captions.tolist():
        if len(first) == CASES:
            break
        first.setdefault(images_of[caption][0], caption)
    return list(first.values())


def _case(
    files: Sequence[Path], caption: str, own: Sequence[int], cosines: Floats, rank: int
) -> Retrieval:
    best = np.argsort(-cosines, kind="stable")[:SHOWN].tolist()
    found = tuple(Found(files[i], i in own, float(cosines[i])) for i in best)
    return Retrieval(caption, rank + 1, files[max(own, key=lambda i: cosines[i])], found)
