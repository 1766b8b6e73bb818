"""`edgeclip export`: a bundle from a checkpoint, and a Triton repository from a bundle."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runtime.cli import Force, Labels, Templates

if TYPE_CHECKING:
    from .bundle import ExportOptions


def _cost(text: str, *names: str, **more: Any) -> Any:
    panel = "Precisions, and what they may cost"
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


Checkpoint = Annotated[
    str,
    typer.Argument(
        help="Checkpoint folder, or open_clip model name (for --to-triton alone: a bundle)."
    ),
]
Target = Annotated[Path | None, typer.Argument(help="Bundle folder to write.")]
Pretrained = Annotated[str | None, typer.Option(help="open_clip weights tag, with a model name.")]
TokenizerFile = Annotated[
    Path | None, typer.Option(help="tokenizer.json, for models that need their own.")
]
Calibrate = Annotated[
    list[Path] | None, _cost("Frames for int8: a picture, folder, table or video; repeatable.")
]
Judging = Annotated[
    list[Path] | None,
    _cost("Frames to judge precisions on (default: some of --calibrate, set apart)."),
]
MaxBad = Annotated[float, _cost("Share of the frames that may be unreadable.", min=0, max=1)]
Frames = Annotated[int, _cost("Most frames of each.", min=1)]
Precisions = Annotated[str, _cost("To make beside fp32, separated by commas.")]
Cosine = Annotated[float, _cost("With fp32, at the 1st percentile of frames.")]
Agreement = Annotated[float, _cost("Share of frames that keep their label.")]
Drop = Annotated[float, _cost("Points of top-1 that may be lost.")]
TextInt8 = Annotated[bool, _cost("An int8 text encoder, too.", "--text-int8")]
Allow = Annotated[bool, _cost("Keep what costs too much, marked.", "--allow-rejected")]
Triton = Annotated[
    Path | None,
    typer.Option("--to-triton", help="Write a Triton model repository of the bundle, too."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]


def export(
    checkpoint: Checkpoint,
    bundle: Target = None,
    pretrained: Pretrained = None,
    labels: Labels = None,
    templates: Templates = None,
    tokenizer: TokenizerFile = None,
    calibrate: Calibrate = None,
    judge: Judging = None,
    frames: Frames = 512,
    max_bad: MaxBad = 0.01,
    precisions: Precisions = "fp16,int8,int8_fp16",
    min_cosine: Cosine = 0.99,
    min_agreement: Agreement = 0.99,
    max_drop: Drop = 0.5,
    allow_rejected: Allow = False,
    text_int8: TextInt8 = False,
    triton: Triton = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write a bundle: ONNX encoders, tokenizer, prompts; proven against the model."""
    if bundle is None:
        others = (pretrained, labels, templates, tokenizer, calibrate, judge)
        _triton_alone(checkpoint, triton, force, others)
        return
    from calibration.gate import Limits
    from runtime.label_sets import read_labels, read_templates

    from .bundle import ExportOptions
    from .precisions import CalibrationOptions

    options = ExportOptions(
        checkpoint=checkpoint,
        bundle=bundle,
        pretrained=pretrained,
        tokenizer=tokenizer,
        labels=None if labels is None else read_labels(labels),
        templates=read_templates(templates) if templates else None,
        precisions=CalibrationOptions(
            calibrate=tuple(calibrate or ()),
            judge=tuple(judge or ()),
            frames=frames,
            max_bad=max_bad,
            precisions=tuple(name.strip() for name in precisions.split(",") if name.strip()),
            limits=Limits(min_cosine=min_cosine, min_agreement=min_agreement, max_drop=max_drop),
            allow_rejected=allow_rejected,
            text_int8=text_int8,
        ),
        force=force,
    )
    _export(options, triton, as_json)


def _export(options: "ExportOptions", triton: Path | None, as_json: bool) -> None:
    """Writes the bundle, shows its report, and writes the repository for Triton, if asked to; where
    a precision is refused too, and then raises what says so."""
    from runtime.errors import PrecisionRefused
    from runtime.folders import check_target

    from .bundle import export_bundle
    from .to_triton import MARKER

    bundle, force, refused = options.bundle, options.force, None
    if triton:
        check_target(triton, MARKER, force)
    try:
        export_bundle(options, quiet=as_json)
    except PrecisionRefused as error:  # the bundle is there
        refused = error
    _show(bundle, bundle / "report", as_json)
    if triton:
        _write_triton(bundle, triton, force, as_json)
    if refused:
        raise refused


def _show(bundle: Path, report: Path, as_json: bool) -> None:
    if as_json:
        print((report / "report.json").read_text(encoding="utf-8"), end="")
    else:
        print((report / "report.md").read_text(encoding="utf-8"))
        print(f"wrote {bundle}")


def _triton_alone(bundle: str, triton: Path | None, force: bool, others: Sequence[object]) -> None:
    from runtime.errors import DataError

    if triton is None or any(others):
        raise DataError("name the bundle folder to write: edgeclip export CHECKPOINT BUNDLE")
    _write_triton(Path(bundle), triton, force)


def _write_triton(bundle: Path, triton: Path, force: bool, quiet: bool = False) -> None:
    from .to_triton import to_triton

    to_triton(bundle, triton, force=force)
    if not quiet:
        print(f"wrote {triton}")
