"""A student held against its teacher on the same pictures: figures of both, and where they differ.

Neither needs labels: without them it is told how often both name a picture alike.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from runtime.manifest import Head
from runtime.prediction import Prediction, scores_of

from .contact_sheet import Example, contact_sheet, small
from .metrics import Floats
from .sections import escaped, file_of, is_figure, percent, table_of, words

SHOWN = 24
LISTED = 100  # classes
NO_SCORES = ("confidence", "ece")  # more is not better
SHEET = "differences.png"


class Banks(NamedTuple):
    """What pictures are named by: labels, their embeddings [C, D] by the student's text tower and
    by the teacher's (the same where it has no other), and the head that turns cosines into
    scores."""

    labels: Sequence[str]
    student: Floats
    teacher: Floats
    head: Head


class ClassAgainst(NamedTuple):
    """One class: the share of its pictures that each names right, and on which both agree. Without
    labels a class is what the teacher says, and `student` and `teacher` are None."""

    label: str
    pictures: int
    student: float | None
    teacher: float | None
    agreement: float


class Difference(NamedTuple):
    """A picture that the two name differently; `label` is the true one, where it is known."""

    file: Path
    student: Prediction
    teacher: Prediction
    label: str | None


@dataclass(frozen=True, kw_only=True)
class Against:
    """What a report says of both.

    `figures` are shares by name (student's, teacher's), `sizes` rows of words (what, student,
    teacher). `cosines` are percentiles of the cosine between both embeddings of a picture,
    `text_cosine` is the mean over texts where the student has a text tower of its own, and
    `borrowed` its figures with the teacher's. The rest is empty or None where there are no labels
    to name pictures by.
    """

    compared: int
    figures: Mapping[str, tuple[float, float]]
    sizes: Sequence[tuple[str, str, str]]
    cosines: Mapping[str, float]
    agreement: float | None = None
    text_cosine: float | None = None
    borrowed: Mapping[str, float] = dataclasses.field(default_factory=dict)
    classes: Sequence[ClassAgainst] = ()
    differences: Sequence[Difference] = ()
    name: str = "teacher"

    def json(self) -> dict[str, Any]:
        """The same for programs; of a difference the three best labels."""
        return {
            "pictures": self.compared,
            "figures": {k: {"student": s, "teacher": t} for k, (s, t) in self.figures.items()},
            "sizes": [list(row) for row in self.sizes],
            "cosines": dict(self.cosines),
            "agreement": self.agreement,
            "text_cosine": self.text_cosine,
            "with_teachers_texts": dict(self.borrowed),
            "classes": [row._asdict() for row in self.classes],
            "differences": [
                {"file": str(d.file), "label": d.label}
                | {"student": d.student.top(3), "teacher": d.teacher.top(3)}
                for d in self.differences
            ],
        }

    def markdown(self) -> Iterator[str]:
        """The section "Student and teacher"."""
        yield from ("## Student and teacher", "", *table_of(("", "student", "teacher"), self.sizes))
        yield from self._figures()
        spread = ", ".join(f"{name} {value:.3f}" for name, value in self.cosines.items())
        yield f"The cosine between both embeddings of a picture ({self.compared:,}): {spread}."
        yield ""
        if self.text_cosine is not None:
            yield f"The cosine between both embeddings of a text: {self.text_cosine:.3f}."
            yield ""
        if self.agreement is not None:
            yield f"Both give {percent(self.agreement)} of the pictures the same label."
            yield from ("", *self._by_class(), *self._differences())

    def _figures(self) -> Iterator[str]:
        if not self.figures:
            return
        own_text = ["student, teacher's text tower"] if self.borrowed else []
        cells = []
        for name, (own, other) in self.figures.items():
            part = "" if name in NO_SCORES or not other else percent(own / other)
            borrowed = [percent(self.borrowed[name])] if self.borrowed else []
            cells.append((words(name), percent(own), *borrowed, percent(other), part))
        yield from table_of(("figure", "student", *own_text, "teacher", "student / teacher"), cells)

    def _by_class(self) -> Iterator[str]:
        worst = sorted(self.classes, key=lambda row: row.agreement)[:LISTED]
        cells = [
            (escaped(r.label), f"{r.pictures:,}", _share(r.student), _share(r.teacher))
            + (percent(r.agreement),)
            for r in worst
        ]
        header = "class", "pictures", "student right", "teacher right", "agree"
        yield from table_of(header, cells)

    def _differences(self) -> Iterator[str]:
        if not self.differences:
            return
        yield from ("The pictures on which they differ, the teacher's surest first:", "")
        yield from (f"![Where student and teacher differ]({SHEET})", "")
        cells = [
            (escaped(d.student.label), escaped(d.teacher.label), escaped(d.label or ""))
            + (file_of(d.file),)
            for d in self.differences
        ]
        yield from table_of(("student", "teacher", "is", "file"), cells)

    def pictures(self) -> Iterable[tuple[str, Image.Image]]:
        """The contact sheet of the differences."""
        if self.differences:
            examples = [
                Example(small(d.file), d.student, d.teacher.label, d.label or "")
                for d in self.differences
            ]
            title = "Where they differ: the student's labels, in red the teacher's"
            yield SHEET, contact_sheet(examples, title, columns=6, word="teacher")


def against(
    student: Floats,
    teacher: Floats,
    files: Sequence[Path],
    figures: Mapping[str, tuple[float, float]],
    sizes: Sequence[tuple[str, str, str]],
    banks: Banks | None = None,
    targets: Sequence[int] | None = None,
) -> Against:
    """Holds unit embeddings [N, D] of the same pictures against each other.

    `banks` are what they are named by; `targets` the true labels' places in it, where they are
    known.
    """
    cosines = (student * teacher).sum(axis=1)
    spread = {"mean": float(cosines.mean())} | {
        f"p{p}": float(np.percentile(cosines, p)) for p in (1, 50)
    }
    figures = {name: both for name, both in figures.items() if is_figure(name)}
    plain = Against(compared=len(files), figures=figures, sizes=sizes, cosines=spread)
    if banks is None:
        return plain
    labels, head = banks.labels, banks.head
    own, other = student @ banks.student.T, teacher @ banks.teacher.T
    same = own.argmax(axis=1) == other.argmax(axis=1)
    surest = np.flatnonzero(~same)
    surest = surest[np.argsort(-other[surest].max(axis=1), kind="stable")]
    true = None if targets is None else [labels[target] for target in targets]

    def predicted(cosines: Floats) -> Prediction:
        return Prediction(tuple(labels), scores_of(cosines, head), cosines)

    differences = [
        Difference(
            files[i],
            predicted(own[i]),
            predicted(other[i]),
            true[i] if true else None,
        )
        for i in surest[:SHOWN].tolist()
    ]
    return dataclasses.replace(
        plain,
        agreement=float(same.mean()),
        classes=_classes(labels, own.argmax(axis=1), other.argmax(axis=1), targets),
        differences=differences,
    )


def _classes(
    labels: Sequence[str],
    student: np.ndarray[Any, Any],
    teacher: np.ndarray[Any, Any],
    targets: Sequence[int] | None,
) -> list[ClassAgainst]:
    true = teacher if targets is None else np.array(targets)
    made = []
    for place, label in enumerate(labels):
        own = true == place
        if own.any():
            right: tuple[float | None, float | None] = None, None
            if targets is not None:
                right = float((student[own] == place).mean()), float((teacher[own] == place).mean())
            agree = float((student[own] == teacher[own]).mean())
            made.append(ClassAgainst(label, int(own.sum()), *right, agree))
    return made


def _share(value: float | None) -> str:
    return "" if value is None else percent(value)
