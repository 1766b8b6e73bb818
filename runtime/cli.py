"""`edgeclip classify`: names what pictures and videos show."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .classifier import Classifier
    from .prediction import Prediction

# Options that several commands share.
Labels = Annotated[
    str | None, typer.Option(help="Labels: a,b,c or a file (.txt a label a line, .json).")
]
Templates = Annotated[
    list[str] | None, typer.Option("--template", help="Text with {}, or a file; repeatable.")
]
Backend = Annotated[
    str, typer.Option(help="onnxruntime, openvino, tensorrt, ort-cuda, ort-tensorrt, or auto.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]


def classify(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    files: Annotated[list[Path], typer.Argument(help="Pictures, videos, or folders of them.")],
    labels: Labels = None,
    templates: Templates = None,
    prompts: Annotated[str | None, typer.Option(help="Prompt bank of the bundle.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Labels to show for each frame.")] = 3,
    every: Annotated[int, typer.Option(min=1, help="Take each n-th frame of a video.")] = 1,
    precision: Annotated[str, typer.Option(help="fp32, ... or auto.")] = "auto",
    backend: Backend = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="A JSON line for each frame.")] = False,
) -> None:
    """Name what pictures and videos show, by labels given as text."""
    from .sources import find_files

    found = find_files(files)
    classifier = loaded(bundle, labels, templates, prompts, backend, precision)
    if as_json:
        print(f"edgeclip: {classifier!r}", file=sys.stderr)
    results = _classify_all(classifier, found, every)
    failed = _print_json(results, top) if as_json else _print_table(results, top, repr(classifier))
    if failed:
        raise typer.Exit(2)


def loaded(
    bundle: Path,
    labels: str | None,
    templates: list[str] | None,
    prompts: str | None,
    backend: str,
    precision: str,
) -> "Classifier":
    """The classifier that the options ask for; says on the terminal that it is being loaded."""
    from rich.console import Console

    from .api import load
    from .label_sets import read_labels, read_templates

    with Console(stderr=True).status("Loading (once, what is fastest here is measured)"):
        return load(
            bundle,
            None if labels is None else read_labels(labels),
            prompts=prompts,
            templates=read_templates(templates) if templates else None,
            backend=backend,
            precision=precision,
        )


Result = tuple[str, "Prediction | str"]


def _classify_all(classifier: "Classifier", files: list[Path], every: int) -> Iterator[Result]:
    """Yields (name, prediction), or (file, what is wrong with it)."""
    from .errors import FrameError
    from .sources import frames_of

    for path in files:
        try:
            for name, frame, color in frames_of(path, every):
                yield name, classifier.classify(frame, color)
        except FrameError as error:
            yield str(path), str(error)


def _print_json(results: Iterator[Result], top: int) -> int:
    failed = 0
    for name, result in results:
        if isinstance(result, str):
            failed += 1
            print(json.dumps({"file": name, "error": result}), flush=True)
            continue
        line = {
            "file": name,
            "label": result.label,
            "score": round(result.score, 6),
            "cosine": round(result.cosine, 6),
            "unknown": result.unknown,
            "path": list(result.path),
            "background": result.background,
            "top": [[label, round(score, 6)] for label, score in result.top(top)],
            "ms": {stage: round(ms, 3) for stage, ms in result.timings.items()},
        }
        print(json.dumps(line, ensure_ascii=False), flush=True)
    return failed


def _print_table(results: Iterator[Result], top: int, title: str) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    for column in ("frame", "label", "score", "cosine", "next"):
        table.add_column(column, overflow="fold")
    failed = 0
    with Console(stderr=True).status("Classifying"):
        for name, result in results:
            if isinstance(result, str):
                failed += 1
                print(f"edgeclip: {result}", file=sys.stderr)
                continue
            others = ", ".join(f"{label} {score:.2f}" for label, score in result.top(top)[1:])
            table.add_row(
                escape(name),
                _named(result),
                f"{result.score:.3f}",
                f"{result.cosine:.3f}",
                escape(others),
            )
    if table.row_count:
        Console().print(table)
    return failed


def _named(result: "Prediction") -> str:
    """The label, with its groups; of a frame that is of none of the labels what it is instead."""
    from rich.markup import escape

    if not result.unknown:
        return escape(" / ".join(result.path))
    instead = result.background or " / ".join(result.path)
    return f"[dim]unknown{escape(f' ({instead})') if instead else ''}[/]"
