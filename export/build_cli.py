"""`edgeclip build`: TensorRT engines for the device that is here."""

from pathlib import Path
from typing import Annotated, Any

import typer

Bundle = Annotated[Path, typer.Argument(help="Bundle folder; engines go into its engines/.")]
Precision = Annotated[
    str,
    typer.Option(
        help="One of the bundle's; auto: the first of int8_fp16, int8, fp16, fp32 that the bundle "
        "accepts, builds here and holds the gate."
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Frames in one run, always as many.")]
MaxBatch = Annotated[
    int | None, typer.Option(min=1, help="Any number of frames up to this, instead of --batch.")
]
Text = Annotated[bool, typer.Option(help="Build the text encoder too, for labels set live.")]
Workspace = Annotated[
    int | None, typer.Option(min=1, help="Most MiB that a layer may use (default: half of free).")
]
Level = Annotated[
    int | None, typer.Option(min=0, max=5, help="Effort of the build: 5 builds longest.")
]
Dla = Annotated[int | None, typer.Option(min=0, help="Deep learning accelerator, for CNNs.")]
Versions = Annotated[
    bool,
    typer.Option(
        "--version-compatible",
        help="Also for later TensorRT releases of the same major version; slower. Loading it needs "
        "EDGECLIP_ENGINE_HOST_CODE=1.",
    ),
]
Hardware = Annotated[
    bool,
    typer.Option(
        "--hardware-compatible",
        help="Also for other GPUs from Ampere on, of the same kind of computer; slower. Not on a "
        "Jetson.",
    ),
]
Tactics = Annotated[
    bool, typer.Option(help="Let TensorRT 8 and 10 use cuBLAS and cuDNN where they are.")
]
Cosine = Annotated[float, typer.Option(help="With fp32, at the 1st percentile.")]
Agreement = Annotated[float, typer.Option(help="Share of golden frames that keep their label.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print what was built as JSON.")]


def build(
    bundle: Bundle,
    precision: Precision = "auto",
    batch: Batch = 1,
    max_batch: MaxBatch = None,
    text: Text = True,
    workspace: Workspace = None,
    level: Level = None,
    dla: Dla = None,
    version_compatible: Versions = False,
    hardware_compatible: Hardware = False,
    external_tactics: Tactics = True,
    min_cosine: Cosine = 0.99,
    min_agreement: Agreement = 0.99,
    as_json: AsJson = False,
) -> None:
    """Build TensorRT engines of a bundle on the device that will run them, and test them."""
    from .build import EngineOptions, build_engines
    from .engine import BuildOptions

    batches = (batch, batch, batch) if max_batch is None else (1, max(1, max_batch // 2), max_batch)
    options = EngineOptions(
        bundle=bundle,
        precision=precision,
        text=text,
        build=BuildOptions(
            batches=batches,
            workspace=workspace and workspace << 20,
            level=level,
            dla=dla,
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible,
            external_tactics=external_tactics,
        ),
        min_cosine=min_cosine,
        min_agreement=min_agreement,
    )
    with _progress(as_json) as tell:
        found = build_engines(options, tell)
    _show(found, as_json)


def _progress(quiet: bool) -> Any:
    """A bar for the phase that TensorRT is in."""
    import contextlib

    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    @contextlib.contextmanager
    def shown() -> Any:
        with Progress(console=Console(stderr=True, quiet=quiet), transient=True) as progress:
            task = progress.add_task("TensorRT", total=None)

            def tell(phase: str, step: int, of: int) -> None:
                progress.update(task, description=escape(phase), completed=step, total=of or None)

            yield tell

    return shown()


def _show(found: Any, as_json: bool) -> None:
    import json

    import msgspec

    from runtime.trt_plan import HOST_CODE

    if as_json:
        print(json.dumps([msgspec.to_builtins(info) for info in found], indent=2))
        return
    for info in found:
        for step in info.steps:
            print(f"{info.kind}: {step}")
        figures = info.figures
        print(
            f"{info.kind}: {info.precision}, {info.bytes / 2**20:.1f} MiB, "
            f"cosine {figures['cosine_p1']:.5f}, {figures['ms']:.2f} ms, "
            f"built in {info.seconds:.0f} s: {info.plan}"
        )
    if any(info.version_compatible for info in found):
        print(f"version compatible: set {HOST_CODE}=1 where they are loaded")
