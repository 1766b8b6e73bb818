"""The command `edgeclip`. It names every package, so it lives in the one that may import them all;
each command imports what it needs when it runs, so that help is instant.
"""

import errno
import json
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from runtime.cli import Force, Labels, Templates, classify
from runtime.errors import EdgeClipError
from training.cli import train
from training.eval_cli import evaluate

COST = "Precisions, and what they may cost"
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="CLIP from training to the edge. Try it: edgeclip demo",
    epilog="--debug, anywhere, shows the traceback of an error.",
)
EXTRAS = {
    "torch": "train", "torchvision": "train", "open_clip": "train", "lightning_fabric": "train",
    "timm": "train", "sklearn": "train", "onnx": "export", "onnxscript": "export",
    "lmdb": "train", "webdataset": "train", "braceexpand": "train", "tensorboard": "train",
    "onnxruntime": "cpu", "cv2": "cpu", "matplotlib": "calibration",
}  # fmt: skip


@app.command(epilog="Example: edgeclip demo --seed 1 --out demo/")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the data, model, bundle, picture.")] = Path(
        "demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the data and the weights.")] = 0,
    force: Force = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """The whole road in three minutes: train a small CLIP, export it, classify with it."""
    from .demo import run

    run(out, seed, force, as_json)


app.command(
    epilog="Example: edgeclip train pairs.csv checkpoint/ --val val.csv --epochs 20",
)(train)

app.command("eval", epilog="Example: edgeclip eval bundle/ --data val.csv --out report/")(evaluate)


@app.command(
    epilog="Example: edgeclip export ViT-B-32 bundle/ --pretrained openai --labels 'a cat,a dog'"
)
def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Checkpoint folder, or open_clip model name (for --to-triton alone: a bundle)."
        ),
    ],
    bundle: Annotated[Path | None, typer.Argument(help="Bundle folder to write.")] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="open_clip weights tag, with a model name.")
    ] = None,
    labels: Labels = None,
    templates: Templates = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json, for models that need their own.")
    ] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            help="Frames for int8: a picture, folder, table or video; repeatable.",
            rich_help_panel=COST,
        ),
    ] = None,
    judge: Annotated[
        list[Path] | None,
        typer.Option(
            help="Frames to judge precisions on (default: some of --calibrate, set apart).",
            rich_help_panel=COST,
        ),
    ] = None,
    frames: Annotated[
        int, typer.Option(min=1, help="Most frames of each.", rich_help_panel=COST)
    ] = 512,
    min_cosine: Annotated[
        float,
        typer.Option(help="With fp32, at the 1st percentile of frames.", rich_help_panel=COST),
    ] = 0.99,
    min_agreement: Annotated[
        float, typer.Option(help="Share of frames that keep their label.", rich_help_panel=COST)
    ] = 0.99,
    max_drop: Annotated[
        float, typer.Option(help="Points of top-1 that may be lost.", rich_help_panel=COST)
    ] = 0.5,
    allow_rejected: Annotated[
        bool,
        typer.Option(
            "--allow-rejected", help="Keep what costs too much, marked.", rich_help_panel=COST
        ),
    ] = False,
    triton: Annotated[
        Path | None,
        typer.Option("--to-triton", help="Write a Triton model repository of the bundle, too."),
    ] = None,
    force: Force = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write a bundle: ONNX encoders, tokenizer, prompts; proven against the model."""
    if bundle is None:
        _triton_alone(checkpoint, triton, force)
        return
    from calibration.gate import Limits
    from runtime.prompts import read_labels, read_templates

    from .bundle import ExportOptions, export_bundle
    from .precisions import CalibrationOptions

    limits = Limits(min_cosine=min_cosine, min_agreement=min_agreement, max_drop=max_drop)

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
            limits=limits,
            allow_rejected=allow_rejected,
        ),
        force=force,
    )
    export_bundle(options, quiet=as_json)
    report = options.bundle / "report"
    if as_json:
        print((report / "report.json").read_text(encoding="utf-8"), end="")
    else:
        print((report / "report.md").read_text(encoding="utf-8"))
        print(f"wrote {bundle}")
    if triton:
        _write_triton(bundle, triton, force, as_json)


def _triton_alone(bundle: str, triton: Path | None, force: bool) -> None:
    from runtime.errors import DataError

    if triton is None:
        raise DataError("name the bundle folder to write: edgeclip export CHECKPOINT BUNDLE")
    _write_triton(Path(bundle), triton, force)


def _write_triton(bundle: Path, triton: Path, force: bool, quiet: bool = False) -> None:
    from .to_triton import to_triton

    to_triton(bundle, triton, force=force)
    if not quiet:
        print(f"wrote {triton}")


app.command(
    epilog="Example: edgeclip classify bundle/ photos/ clip.mp4 --labels 'a cat,a dog' --json"
)(classify)


@app.command(epilog="Example: edgeclip verify bundle/")
def verify(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the faults as JSON.")] = False,
) -> None:
    """Hold a bundle against the rules of its format."""
    from .verify import verify as faults_of

    faults = faults_of(bundle)
    if as_json:
        print(json.dumps({"bundle": str(bundle), "faults": faults}))
    else:
        print("\n".join(faults) or f"{bundle} is sound")
    if faults:
        raise typer.Exit(3)


def main() -> None:
    """Runs the command; a user's mistake ends in one line and exit code 2, without a traceback."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    warnings.filterwarnings("ignore", module="PIL")  # notes on odd pictures that it does read
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that nothing is left
    try:
        app()
    except SystemExit as end:
        if end.code in (130, 143):
            print("edgeclip: interrupted; nothing half-written is left", file=sys.stderr)
        raise
    except Exception as error:
        if debug:
            raise
        sys.exit(_explain(error))


def _explain(error: Exception) -> int:
    """Prints what went wrong; returns the exit code."""
    if isinstance(error, EdgeClipError):
        message, code = str(error), error.exit_code
    elif isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in EXTRAS:
        extra = EXTRAS[(error.name or "").split(".")[0]]
        message, code = f"this command needs more: pip install 'edgeclip[{extra}]'", 2
    elif isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC):
        message, code = f"{error.filename or 'the disk'}: {error.strerror}", 2
    elif type(error).__name__ == "OutOfMemoryError":
        message, code = f"{error}. Try --micro-batch, --grad-checkpointing or --precision bf16", 2
    else:
        message, code = f"internal error: {type(error).__name__}: {error} (--debug shows more)", 1
    print(f"edgeclip: {' '.join(message.split())}", file=sys.stderr)
    return code
