"""The content of a report: as sections of Markdown, and as JSON."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from .evaluation import ClassRow, Evaluation
from .pairs import Bad, count

FIGURES = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "macro_precision": "precision, mean of the classes",
    "macro_recall": "recall, mean of the classes",
    "macro_f1": "F1, mean of the classes",
    "confidence": "score of the best label, mean",
    "ece": "expected calibration error (ECE)",
    "image_to_text_r1": "picture to caption, R@1",
    "image_to_text_r5": "picture to caption, R@5",
    "image_to_text_r10": "picture to caption, R@10",
    "text_to_image_r1": "caption to picture, R@1",
    "text_to_image_r5": "caption to picture, R@5",
    "text_to_image_r10": "caption to picture, R@10",
    "agreement": "same best label as the teacher",
    "teacher_cosine": "cosine with the teacher's embedding, mean",
    "text_cosine": "cosine with the teacher's embedding of a text, mean",
}
LOGGED = {
    "lr": "learning rate",
    "accuracy": "accuracy within the batch",
    "images_per_second": "pictures a second",
}
ALL_CLASSES, WORST, BEST = 40, 20, 10  # up to 40 classes are listed; of more, these
CONFUSED, BAD_ITEMS, EPOCHS, TEXT = 15, 30, 50, 120
_SPECIAL = str.maketrans({char: f"\\{char}" for char in "\\`*_[]<>|#$~"} | {"&": "&amp;"})

Row = Mapping[str, float]


class Section(Protocol):
    """What a report tells beside."""

    @property
    def name(self) -> str:
        """Its key in report.json."""
        ...

    def json(self) -> Any:
        """Its content for programs."""
        ...

    def markdown(self) -> Iterable[str]:
        """Its lines, an empty one last."""
        ...

    def pictures(self) -> Iterable[tuple[str, Image.Image]]:
        """The pictures that its lines show, with their file names."""
        ...


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a report tells. What is empty has no section.

    `about` says in words what was evaluated. `history` has a row for each epoch ({"epoch": 1,
    "loss": 2.3, "logit_scale": 14.0, "top1": 0.4, "guard_top1": 0.6}: any figures, `guard_` before
    those on other data), `steps` one for each logged step ({"step": 10, "loss": 2.5, "lr": 1e-4}),
    `wise_ft` one for each mixture of weights ({"alpha": 0.5, "top1": 0.4, "guard_top1": 0.6};
    Wortsman et al. 2022, arXiv:2109.01903). `more` stands before what is about the training.
    """

    title: str
    about: Mapping[str, str]
    evaluation: Evaluation | None = None
    history: Sequence[Row] = ()
    steps: Sequence[Row] = ()
    wise_ft: Sequence[Row] = ()
    bad: Sequence[Bad] = ()
    more: Sequence[Section] = ()


def shortened(text: str, length: int = TEXT) -> str:
    """The text in one line, cut to `length` characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def words(name: str) -> str:
    """The name of a figure, or of something else that was logged, in words."""
    if name.startswith("guard_"):
        return f"guard: {words(name.removeprefix('guard_'))}"
    return (FIGURES | LOGGED).get(name, name.replace("_", " "))


def is_figure(name: str) -> bool:
    """Whether a name is that of a figure, and so of a share; on the guard's data too."""
    return name.removeprefix("guard_") in FIGURES


def json_of(report: Report) -> dict[str, Any]:
    """The report for programs, without `steps`; confusion as (true, taken for, count) rows."""
    content: dict[str, Any] = {"title": report.title, "about": dict(report.about)}
    if report.evaluation:
        content |= _evaluation_json(report.evaluation)
    for name in ("history", "wise_ft"):
        if rows := getattr(report, name):
            content[name] = [dict(row) for row in rows]
    content |= {section.name: section.json() for section in report.more}
    return content | {"bad": {"counts": count(report.bad), "items": [list(b) for b in report.bad]}}


def _evaluation_json(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "figures": evaluation.figures,
        "pictures": evaluation.pictures,
        "captions": evaluation.captions,
        "templates": list(evaluation.templates),
        "classes": [row._asdict() for row in evaluation.classes],
        "confusion": [] if evaluation.confusion is None else _confused(evaluation),
        "reliability": [b._asdict() for b in evaluation.bins],
        "mistakes": [
            {"file": str(m.file), "label": m.label, "taken_for": m.prediction.top(3)}
            for m in evaluation.mistakes
        ],
        "retrievals": [
            {"caption": r.caption, "place": r.place, "own": str(r.own)}
            | {"found": [str(f.file) for f in r.found]}
            for r in evaluation.retrievals
        ],
    }


def _confused(evaluation: Evaluation) -> list[tuple[str, str, int]]:
    """(true, taken for, count) of every pair that occurs, right ones included; most first."""
    assert evaluation.confusion is not None
    labels = [row.label for row in evaluation.classes]
    true, taken = np.nonzero(evaluation.confusion)
    times = evaluation.confusion[true, taken]
    order = np.argsort(-times, kind="stable")
    return [(labels[true[i]], labels[taken[i]], int(times[i])) for i in order]


def markdown(report: Report) -> str:
    """The report to read; its pictures lie beside it (see `report.pictures`)."""
    lines = [f"# {escaped(report.title)}", "", *_about(report)]
    if report.evaluation:
        lines += _figures(report.evaluation)
    for section in report.more:
        lines += section.markdown()
    lines += _training(report)
    if report.evaluation and report.evaluation.classes:
        lines += _classification(report.evaluation)
    if report.evaluation and report.evaluation.retrievals:
        lines += _retrievals(report.evaluation)
    return "\n".join([*lines, *_bad(report.bad)]).rstrip() + "\n"


def _about(report: Report) -> Iterator[str]:
    rows = [(name, escaped(value)) for name, value in report.about.items()]
    if evaluation := report.evaluation:
        rows.append(("pictures", f"{evaluation.pictures:,}"))
        if evaluation.classes:
            rows.append(("classes", f"{len(evaluation.classes):,}"))
        if evaluation.captions:
            rows.append(("captions", f"{evaluation.captions:,}"))
        if evaluation.templates:
            rows.append(("templates", ", ".join(escaped(repr(t)) for t in evaluation.templates)))
    if report.bad:
        rows.append(("left out", f"{len(report.bad):,} items (see the end)"))
    return table_of(("", ""), rows)


def _figures(evaluation: Evaluation) -> Iterator[str]:
    yield from ("## Figures", "")
    rows = [(words(name), percent(value)) for name, value in evaluation.figures.items()]
    yield from table_of(("figure", "value"), rows)
    if evaluation.captions:
        yield "R@k: the share of queries with a right answer among the first k. A hit is any of a"
        yield "picture's captions, or any picture of a caption."
        yield ""


def _training(report: Report) -> Iterator[str]:
    if report.history or report.steps:
        yield from ("## Training", "", "![The training's curves](curves.png)", "")
    if report.history:
        yield from _number_table(report.history)
    if report.wise_ft:
        yield from ("## Weights between the start and the end", "")
        yield "Each model has the weights (1 - alpha) * start + alpha * end of training (WiSE-FT,"
        yield from ("arXiv:2109.01903).", "", "![Figures over alpha](wise_ft.png)", "")
        yield from _number_table(report.wise_ft)


def _number_table(rows: Sequence[Row]) -> Iterator[str]:
    """A row for each record, the last one included; of many, evenly chosen ones."""
    rows = rows[(len(rows) - 1) % math.ceil(len(rows) / EPOCHS) :: math.ceil(len(rows) / EPOCHS)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[f"{row[name]:.4g}" if name in row else "" for name in names] for row in rows]
    return table_of([name.replace("_", " ") for name in names], cells)


def _classification(evaluation: Evaluation) -> Iterator[str]:
    sure, right = evaluation.figures["confidence"], evaluation.figures["top1"]
    yield from ("## Can the scores be believed?", "", "![Reliability](reliability.png)", "")
    yield f"The best label's score is {percent(sure)} on average, and {percent(right)} are right."
    yield "ECE is the mean distance between the score and the share that is right, over 15 bins"
    yield from ("(arXiv:1706.04599).", "")
    yield from ("## Classes", "", *_classes(evaluation.classes))
    yield from ("## Confusion", "", "![The confusion matrix](confusion.png)", "")
    pictures = {row.label: row.pictures for row in evaluation.classes}
    pairs = [row for row in _confused(evaluation) if row[0] != row[1]]
    if not pairs:
        yield "No picture was taken for another class."
    else:
        yield f"The pairs that were confused most often, of {len(pairs):,}:"
        yield ""
        cells = [
            (escaped(true), escaped(taken), f"{times:,} of {pictures[true]:,}")
            for true, taken, times in pairs[:CONFUSED]
        ]
        yield from table_of(("is", "taken for", "pictures"), cells)
        yield from _mistakes(evaluation)


def _classes(rows: Sequence[ClassRow]) -> Iterator[str]:
    by_f1 = sorted(rows, key=lambda row: row.f1)
    groups: list[tuple[str, Sequence[ClassRow]]] = [("", by_f1)]
    if len(rows) > ALL_CLASSES:
        groups = [
            (
                f"The {WORST} worst of {len(rows):,} classes by F1 (all are in report.json):",
                by_f1[:WORST],
            ),
            (f"The {BEST} best:", by_f1[: -BEST - 1 : -1]),
        ]
    for heading, group in groups:
        if heading:
            yield from (heading, "")
        cells = [
            (escaped(r.label), f"{r.pictures:,}", *map(percent, (r.precision, r.recall, r.f1)))
            for r in group
        ]
        yield from table_of(("class", "pictures", "precision", "recall", "F1"), cells)


def _mistakes(evaluation: Evaluation) -> Iterator[str]:
    yield from ("## The surest mistakes", "", "![The surest mistakes](mistakes.png)", "")
    cells = [
        (
            escaped(m.label),
            escaped(m.prediction.label),
            f"{m.prediction.score:.2f}",
            file_of(m.file),
        )
        for m in evaluation.mistakes
    ]
    yield from table_of(("is", "taken for", "score", "file"), cells)


def _retrievals(evaluation: Evaluation) -> Iterator[str]:
    yield from ("## Retrieval", "", "![Captions and what they found](retrievals.png)", "")
    yield "Captions whose own picture came first, the surest; then those that missed it by most."
    yield ""
    cells = [(escaped(r.caption), f"{r.place:,}", file_of(r.own)) for r in evaluation.retrievals]
    yield from table_of(("caption", "place of its picture", "its picture"), cells)


def _bad(bad: Sequence[Bad]) -> Iterator[str]:
    if not bad:
        return
    yield from ("## Left out", "")
    yield from table_of(("reason", "items"), [(r, f"{n:,}") for r, n in count(bad).items()])
    yield from table_of(
        ("item", "reason"), [(escaped(b.item, 200), b.reason) for b in bad[:BAD_ITEMS]]
    )
    if len(bad) > BAD_ITEMS:
        yield f"{len(bad) - BAD_ITEMS:,} more are in report.json."
        yield ""


def table_of(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table's lines in Markdown."""
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def percent(share: float) -> str:
    """A share in words: 12.3%."""
    return f"{share:.1%}"


def file_of(path: Path) -> str:
    """A file and its folder; the whole path is in report.json."""
    return escaped("/".join(path.parts[-2:]))


def escaped(text: str, length: int = TEXT) -> str:
    """A text of the user's, with what Markdown would take for markup escaped."""
    return shortened(text, length).translate(_SPECIAL)
