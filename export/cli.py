"""The command `edgeclip`. It names every package, so it lives in the one that may import them all;
each command imports what it needs when it runs, so that help is instant.
"""

import errno
import io
import json
import signal
import sys
import time
import warnings
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from calibration.prompts_cli import prompts
from runtime.bench_cli import bench
from runtime.cli import Force, classify
from runtime.doctor import doctor
from runtime.errors import EdgeClipError
from runtime.serve.cli import serve
from runtime.stream_cli import stream
from training.cli import train
from training.eval_cli import evaluate
from training.interrupts import TWICE

from .build_cli import build
from .distill_cli import distill
from .export_cli import export
from .presets_cli import presets

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
    "onnxruntime": "cpu", "cv2": "cpu", "matplotlib": "calibration", "paho": "mqtt",
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

app.command(
    epilog="Example: edgeclip distill student/ --teacher ViT-B-32:openai --student mobilenetv2 "
    "--images recording.mp4 --labels 'a cat,a dog'"
)(distill)

app.command(epilog="Example: edgeclip presets --measure")(presets)

app.command("eval", epilog="Example: edgeclip eval bundle/ --data val.csv --out report/")(evaluate)


app.command(
    epilog="Example: edgeclip export ViT-B-32 bundle/ --pretrained openai --labels 'a cat,a dog'"
)(export)
app.command(epilog="Example: edgeclip build bundle/ --precision int8 --max-batch 4")(build)


app.command(
    epilog="Example: edgeclip classify bundle/ photos/ clip.mp4 --labels 'a cat,a dog' --json"
)(classify)
app.command(
    epilog="Example: edgeclip stream bundle/ --source 0 --labels 'a cat,a dog' --save out.mp4"
)(stream)
app.command(epilog="Example: edgeclip serve bundle/ --source 0 --labels 'a person,nobody'")(serve)
app.command(epilog="Example: edgeclip prompts bundle/ --labels birds.json --name birds")(prompts)
app.command(epilog="Example: edgeclip bench bundle/ --backend all --precision all")(bench)


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


app.command(epilog="Example: edgeclip doctor bundle/")(doctor)


def main() -> None:
    """Runs the command; a user's mistake ends in one line and exit code 2, without a traceback."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    for output in (sys.stdout, sys.stderr):  # a terminal that lacks a character shows "?" for it
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="replace")
    warnings.filterwarnings("ignore", module="PIL")  # notes on odd pictures that it does read
    signal.signal(signal.SIGTERM, _end)
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


def _end(number: int, _: FrameType | None) -> None:
    """Unwinds, so that nothing is left. `timeout` says it twice at once; who says it again later
    does not want to wait for that."""
    since = time.monotonic()

    def again(number: int, _: FrameType | None) -> None:
        if time.monotonic() - since > TWICE:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    signal.signal(number, again)
    sys.exit(143)


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
