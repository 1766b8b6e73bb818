"""`edgeclip eval`: figures and a report of a checkpoint or a bundle on labelled or captioned data.

A bundle is evaluated without torch, so that the command also works on a device.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from runtime.cli import Force, Templates

if TYPE_CHECKING:
    from calibration.sections import Report
    from calibration.subject import Subject

PYTORCH = "pytorch"


def evaluate(
    model: Annotated[
        str, typer.Argument(help="Bundle folder, checkpoint folder, or open_clip model name.")
    ],
    data: Annotated[
        Path,
        typer.Option(help="CSV (file,caption or file,label), or a folder <class>/<picture>."),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for the report to write.")] = None,
    templates: Templates = None,
    backend: Annotated[str, typer.Option(help="onnxruntime, ... for a bundle, or auto.")] = "auto",
    precision: Annotated[
        str, typer.Option(help="fp32, ... of a bundle; fp32, bf16 or fp16 of a model; or auto.")
    ] = "auto",
    pretrained: Annotated[
        str | None, typer.Option(help="open_clip weights tag, with a model name.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json, for models that need their own.")
    ] = None,
    max_bad: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the data that may be unusable.")
    ] = 0.01,
    force: Force = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Evaluate a model: accuracy by labels or retrieval by captions, as figures and a report."""
    from calibration.sections import Report, json_of
    from calibration.subject import measure
    from runtime.folders import check_target, new_folder
    from runtime.label_sets import read_templates

    if out:
        from calibration.report import MARKER, write_report  # what it needs is missed here at once

        check_target(out, MARKER, force)
    subject = _subject(model, backend, precision, pretrained, tokenizer)
    if subject.about["weights"] == "random weights":
        print("edgeclip: random weights: these figures are those of chance", file=sys.stderr)
    chosen = read_templates(templates) if templates else None
    pairs, evaluation = measure(subject, data, chosen, max_bad, quiet=as_json)
    report = Report(
        title=f"{subject.about['model']} on {data.name}",
        about={**subject.about, "data": str(data)},
        evaluation=evaluation,
        bad=pairs.bad,
    )
    if out:
        with new_folder(out, MARKER, force) as folder:
            write_report(folder, report)
    if as_json:
        print(json.dumps(json_of(report), ensure_ascii=False))
    else:
        _show(report)
        print(f"wrote {out}" if out else "--out FOLDER writes a report with pictures")


def _subject(
    model: str, backend: str, precision: str, pretrained: str | None, tokenizer: Path | None
) -> "Subject":
    """Opens the model. Raises EdgeClipError where it is none, or an option does not go with it."""
    from runtime.errors import DataError
    from runtime.manifest import NAME

    folder = Path(model).expanduser()
    if os.path.isfile(folder / NAME):
        if pretrained or tokenizer:
            flag = "--pretrained" if pretrained else "--tokenizer"
            raise DataError(f"{model} is a bundle and has its own, so {flag} does not go with it")
        from calibration.subject import bundle_subject

        return bundle_subject(folder, backend, precision)
    if os.sep in model and not os.path.exists(folder):
        raise DataError(f"there is no bundle and no checkpoint {model}")
    if os.path.isdir(folder) and not any(folder.glob("*.safetensors")):
        raise DataError(f"{model} is neither a bundle (no {NAME}) nor a checkpoint (no weights)")
    if backend not in ("auto", PYTORCH):
        raise DataError(
            f"{model} is not a bundle (it has no {NAME}), and {backend} runs bundles only: "
            "make one with edgeclip export, or leave --backend out"
        )
    from .evaluate import checkpoint_subject

    return checkpoint_subject(model, pretrained, tokenizer, precision)


def _show(report: "Report") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from calibration.pairs import describe
    from calibration.sections import words

    assert report.evaluation
    table = Table(title=escape(report.title), title_justify="left", show_header=False)
    for name, value in report.evaluation.figures.items():
        table.add_row(words(name), f"{value:.1%}")
    table.add_row("pictures", f"{report.evaluation.pictures:,}")
    table.add_row("runs on", escape(report.about["runs on"]))
    if report.bad:
        table.add_row("left out", escape(describe(report.bad)))
    Console().print(table)
