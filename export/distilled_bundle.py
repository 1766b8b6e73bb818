"""A student's bundle, calibrated on the pictures that it learned from, and how fast it is here:
the last part of a distillation's report."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from calibration.report import MARKER
from calibration.sections import percent, table_of, words
from calibration.subject import bundle_subject, measure
from runtime.bench import Row, bench
from runtime.bundle import Bundle
from runtime.errors import GateFailed
from training.distill_options import DistillOptions
from training.results import REPORT

from .bundle import ExportOptions, export_bundle
from .precisions import CalibrationOptions

SECONDS = 2.0  # of measuring, for each backend and precision
Figures = Mapping[str, Mapping[str, float]]


def bundle_student(options: DistillOptions, bundle: Path, quiet: bool = False) -> dict[str, Any]:
    """Exports the checkpoint `options.out`, measures what its precisions reach on --val and how
    long a frame takes on each backend, and adds that to the checkpoint's report; returns it.

    Raises what `export_bundle` does; where a precision is refused, after the report is written.
    """
    refused: GateFailed | None = None
    try:
        export_bundle(_export(options, bundle), quiet)
    except GateFailed as error:
        if not bundle.is_dir():
            raise
        refused = error
    figures = _figures(options, bundle)
    rows = bench(bundle, backend="all", precision="all", seconds=SECONDS)
    content: dict[str, Any] = {
        "folder": str(bundle),
        "refused": str(refused or ""),
        "figures": figures,
        "ms": [
            {"backend": r.backend, "precision": r.precision, "p50": r.stages["total"].p50}
            for r in rows
            if not r.error
        ],
    }
    _append(options.out / REPORT, content, _markdown(bundle, content["refused"], figures, rows))
    if refused:
        raise refused
    return content


def _export(options: DistillOptions, bundle: Path) -> ExportOptions:
    return ExportOptions(
        checkpoint=str(options.out),
        bundle=bundle,
        labels=options.label_set,
        templates=options.templates or None,
        precisions=CalibrationOptions(calibrate=options.images),
        force=options.force,
    )


def _figures(options: DistillOptions, bundle: Path) -> dict[str, dict[str, float]]:
    """What each precision reaches on --val; nothing without it."""
    if options.val is None:
        return {}
    made = Bundle(bundle).manifest.precisions
    found: dict[str, dict[str, float]] = {}
    for name in (name for name, entry in made.items() if entry.status == "accepted"):
        subject = bundle_subject(bundle, "onnxruntime", name)
        templates = options.templates or None
        found[name] = measure(subject, options.val, templates, options.max_bad, quiet=True)[
            1
        ].figures
    return found


def _markdown(bundle: Path, refused: str, figures: Figures, rows: Sequence[Row]) -> Iterator[str]:
    yield from ("", "## The bundle", "", f"`{bundle}`, calibrated on the same pictures.", "")
    if refused:
        yield from (refused, "")
    if figures:
        names = list(figures["fp32"])
        cells = [(words(name), *(percent(own[name]) for own in figures.values())) for name in names]
        yield from table_of(("figure", *figures), cells)
    yield "A frame of 1920 x 1080 on this machine, from pixels to label; the median."
    yield ""
    ran = [row for row in rows if not row.error]
    cells = [(r.backend, r.precision, f"{r.stages['total'].p50:.2f}") for r in ran]
    yield from table_of(("backend", "precision", "ms"), cells)


def _append(report: Path, content: dict[str, Any], lines: Iterator[str]) -> None:
    """Adds to both files of the report; each is written beside and renamed."""
    known = json.loads((report / MARKER).read_text(encoding="utf-8"))
    text = json.dumps(known | {"bundle": content}, indent=2, ensure_ascii=False) + "\n"
    before = (report / "report.md").read_text(encoding="utf-8")
    for name, whole in ((MARKER, text), ("report.md", before + "\n".join(lines) + "\n")):
        beside = report / f".{name}"
        beside.write_text(whole, encoding="utf-8")
        beside.replace(report / name)
