"""A student's bundle, calibrated on the pictures that it learned from, and how fast it is here:
the last part of a distillation's report."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from calibration.report import MARKER
from calibration.sections import percent, table_of, words
from calibration.subject import bundle_subject
from runtime.bench import Row, bench
from runtime.bundle import Bundle
from runtime.errors import PrecisionRefused
from training.distill import settled
from training.distill_options import DistillOptions
from training.distill_prepare import reopen_rivals
from training.results import REPORT

from .bundle import ExportOptions, export_bundle
from .precisions import CalibrationOptions

_TITLE = "## The bundle"
SECONDS = 2.0  # of measuring, for each backend and precision
Figures = Mapping[str, Mapping[str, float]]


def bundle_student(options: DistillOptions, bundle: Path, quiet: bool = False) -> dict[str, Any]:
    """Exports the checkpoint `options.out`, holds each of its precisions against the teacher, on
    the pictures that the student was, measures how long a frame takes on each backend, and adds
    that to the checkpoint's report; returns it.

    Raises what `export_bundle` does; where a precision is refused, after the report is written.
    """
    refused: PrecisionRefused | None = None
    try:
        export_bundle(_export(options, bundle), quiet)
    except PrecisionRefused as error:
        refused = error
    teachers, figures = _figures(options, bundle)
    rows = bench(bundle, backend="all", precision="all", seconds=SECONDS)
    content: dict[str, Any] = {
        "folder": str(bundle),
        "refused": str(refused or ""),
        "mib": {file.name: file.stat().st_size / 2**20 for file in sorted(bundle.glob("*.onnx"))},
        "teacher": teachers,
        "figures": figures,
        "ms": [
            {"backend": r.backend, "precision": r.precision, "p50": r.stages["total"].p50}
            for r in rows
            if not r.error
        ],
    }
    _append(options.out / REPORT, content, _markdown(content, rows))
    if refused:
        raise refused
    return content


def _export(options: DistillOptions, bundle: Path) -> ExportOptions:
    return ExportOptions(
        checkpoint=str(options.out),
        bundle=bundle,
        labels=options.label_set,
        templates=options.templates or None,
        precisions=CalibrationOptions(calibrate=options.images, max_bad=options.max_bad),
        force=options.force,
    )


def _figures(
    options: DistillOptions, bundle: Path
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The teacher's figures, and what each precision reaches beside it; empty where there is
    nothing to compare on."""
    rivals = reopen_rivals(settled(options))
    found: dict[str, dict[str, float]] = {}
    if rivals is None:
        return {}, found
    made = Bundle(bundle).manifest.precisions
    for name in (name for name, entry in made.items() if entry.status == "accepted"):
        subject = bundle_subject(bundle, "onnxruntime", name)
        found[name] = rivals.measure_as(subject.encode, subject.embed_text)
    return rivals.teachers, found


def _markdown(content: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    bundle, figures = content["folder"], content["figures"]
    yield from ("", _TITLE, "", f"`{bundle}`, calibrated on the same pictures.", "")
    if content["refused"]:
        yield from (content["refused"], "")
    if figures:
        yield "What each precision reaches on the pictures above, in ONNX Runtime."
        yield ""
        yield from table_of(("figure", "teacher", *figures), _cells(content["teacher"], figures))
    sizes = [(name, f"{size:.1f}") for name, size in content["mib"].items()]
    yield from table_of(("file", "MiB"), sizes)
    yield "A frame of 1920 x 1080 on this machine, from pixels to label; the median."
    yield ""
    ran = [row for row in rows if not row.error]
    cells = [(r.backend, r.precision, f"{r.stages['total'].p50:.2f}") for r in ran]
    yield from table_of(("backend", "precision", "ms"), cells)


def _cells(teacher: Mapping[str, float], figures: Figures) -> Iterator[tuple[str, ...]]:
    for name in next(iter(figures.values())):
        other = _figure(name, teacher[name]) if name in teacher else ""
        yield words(name), other, *(_figure(name, own[name]) for own in figures.values())


def _figure(name: str, value: float) -> str:
    return f"{value:.3f}" if name.endswith("_cosine") else percent(value)


def _append(report: Path, content: dict[str, Any], lines: Iterator[str]) -> None:
    """Adds to both files of the report; each is written beside and renamed."""
    known = json.loads((report / MARKER).read_text(encoding="utf-8"))
    text = json.dumps(known | {"bundle": content}, indent=2, ensure_ascii=False) + "\n"
    before = (report / "report.md").read_text(encoding="utf-8").partition(f"\n{_TITLE}\n")[0]
    for name, whole in ((MARKER, text), ("report.md", before + "\n".join(lines) + "\n")):
        beside = report / f".{name}"
        beside.write_text(whole, encoding="utf-8")
        beside.replace(report / name)
