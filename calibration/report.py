"""Writes a report folder: report.md to read, report.json for programs, pictures beside them."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from . import plots
from .contact_sheet import Example, Query, contact_sheet, query_sheet, small
from .evaluation import Evaluation, Mistake, Retrieval
from .sections import Report, json_of, markdown

MARKER = "report.json"


def write_report(folder: Path, report: Report) -> None:
    """Writes the report into an existing folder (see `runtime.folders.new_folder`).

    The galleries read their pictures' files again.
    """
    text = json.dumps(json_of(report), indent=2, ensure_ascii=False)
    for name, content in ((MARKER, text + "\n"), ("report.md", markdown(report))):
        # The name of a picture may be no UTF-8.
        (folder / name).write_text(content, encoding="utf-8", errors="replace")
    for name, picture in _pictures(report):
        if isinstance(picture, Figure):
            with warnings.catch_warnings():  # a label in a script that the font lacks
                warnings.filterwarnings("ignore", message="Glyph .* missing from")
                picture.savefig(folder / name)
        else:
            picture.save(folder / name)


def _pictures(report: Report) -> Iterator[tuple[str, Figure | Image.Image]]:
    if report.history or report.steps:
        yield "curves.png", plots.curves(report.history, report.steps)
    if report.wise_ft:
        yield "wise_ft.png", plots.wise_ft(report.wise_ft)
    for section in report.more:
        yield from section.pictures()
    if report.evaluation:
        yield from _evaluation_pictures(report.evaluation)


def _evaluation_pictures(evaluation: Evaluation) -> Iterator[tuple[str, Figure | Image.Image]]:
    if evaluation.confusion is not None:
        labels = [row.label for row in evaluation.classes]
        yield "reliability.png", plots.reliability(evaluation.bins)
        yield "confusion.png", plots.confusion(labels, evaluation.confusion)
    if evaluation.mistakes:
        examples = [_example(mistake) for mistake in evaluation.mistakes]
        yield "mistakes.png", contact_sheet(examples, "The surest mistakes", columns=6)
    if evaluation.retrievals:
        queries = [_query(retrieval) for retrieval in evaluation.retrievals]
        title = "Captions and the pictures most similar to them"
        yield "retrievals.png", query_sheet(queries, title)


def _example(mistake: Mistake) -> Example:
    return Example(small(mistake.file), mistake.prediction, mistake.label)


def _query(retrieval: Retrieval) -> Query:
    """The pictures found, and the caption's own where it is not among them."""
    pictures = [(small(f.file), f.right, f"{f.cosine:.2f}") for f in retrieval.found]
    if retrieval.place > len(retrieval.found):
        pictures.append((small(retrieval.own), True, f"its picture, place {retrieval.place:,}"))
    return Query(retrieval.caption, pictures)
