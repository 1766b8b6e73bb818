"""`edgeclip bench`: how fast a bundle is on this machine, as tables, as JSON, as a chart."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from .bench import Row

_SUMMARY = ("backend", "precision", "load\nms", "first\nms", "p50\nms", "frames\n/s",
            "RSS\ngrowth\nMiB", "GPU\ngrowth\nMiB")  # fmt: skip
_STAGES = ("backend", "precision", "stage", "p50\nms", "p90\nms", "p99\nms")

Out = Annotated[Path | None, typer.Option(help="New folder for bench.json and bench.png.")]


def bench(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    backend: Annotated[
        str,
        typer.Option(help="onnxruntime, openvino, tensorrt, ort-cuda, ort-tensorrt, auto or all."),
    ] = "auto",
    precision: Annotated[
        str, typer.Option(help="fp32, ...; auto; or all that the bundle accepts.")
    ] = "auto",
    frames: Annotated[
        list[Path] | None,
        typer.Option(help="Pictures, videos or folders of them, instead of a made frame."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Of the made frame (default: 1920x1080; of cameras 1280x720)."),
    ] = None,
    cameras: Annotated[
        str | None, typer.Option(help="Measure so many cameras at once, or most: what is carried.")
    ] = None,
    fps: Annotated[
        float | None, typer.Option(min=0.1, max=1000, help="Of a camera (default: 15; a video's).")
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="Video that each camera plays: with decoding.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="For each backend and precision, or number of cameras.")
    ] = 5.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Of ONNX Runtime or OpenVINO.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    out: Out = None,
) -> None:
    """Measure how fast a bundle is on this machine: backends and precisions in turns, or with
    --cameras how many cameras it carries."""
    _check_for_cameras(cameras, {"--fps": fps, "--source": source}, {"--out": out})
    _check_out(out)
    shown = _frames(frames, size or ("1280x720" if cameras and not frames else None))
    asked: dict[str, Any] = {"frames": shown, "seconds": seconds, "backend": backend,
                             "precision": precision, "threads": threads}  # fmt: skip
    if cameras is not None:
        from .camera_bench_cli import bench_cameras

        bench_cameras(bundle, cameras, fps=fps, source=source, as_json=as_json, **asked)
    else:
        _bench_backends(bundle, frames, as_json, out, asked)


def _bench_backends(
    bundle: Path, frames: list[Path] | None, as_json: bool, out: Path | None, asked: dict[str, Any]
) -> None:
    """Measures what is `asked`, shows and writes it."""
    from rich.console import Console

    from .bench import bench as measured
    from .conditions import conditions, process_memory

    before = conditions()
    with Console(stderr=True).status("Loading") as status:
        rows = measured(bundle, tell=lambda text: status.update(text), **asked)
    after, memory = conditions(), process_memory()
    report = {
        "bundle": str(bundle),
        "frames": _described(frames, asked["frames"]),
        "seconds": asked["seconds"],
        "threads": asked["threads"],
        "peak_rss_mib": memory and memory[1],
        "before": before.as_dict(),
        "after": after.as_dict(),
        "rows": [asdict(row) for row in rows],
    }
    if out is not None:
        _write(out, report, rows)
    if as_json:
        print(json.dumps(report))
    else:
        _print(rows, f"before: {before}\nafter: {after}")
    if all(row.error for row in rows):
        raise typer.Exit(2)


def _check_for_cameras(cameras: str | None, theirs: dict[str, Any], others: dict[str, Any]) -> None:
    """Raises DataError for an option of the other kind of measurement."""
    from .errors import DataError

    for name, value in (others if cameras else theirs).items():
        if value is not None:
            raise DataError(f"{name} does not go {'with' if cameras else 'without'} --cameras")


def _described(paths: list[Path] | None, shown: Any) -> dict[str, Any]:
    return {
        "from": [str(path) for path in paths] if paths else ["made"],
        "number": len(shown),
        "first_shape": shown[0][0].shape,
    }


def _frames(paths: list[Path] | None, size: str | None) -> Any:
    from .bench import camera_frame, read_frames
    from .errors import DataError

    if not paths:
        found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", size or "1920x1080")
        if found is None:
            raise DataError(f"--size {size} is no size; give width and height, as in 1920x1080")
        return [(camera_frame(int(found[1]), int(found[2])), "bgr")]
    if size is not None:
        raise DataError("--size is that of the made frame: give it, or --frames, not both")
    return read_frames(paths)


def _check_out(out: Path | None) -> None:
    """What would fail after the measurement fails before it."""
    if out is None:
        return
    from importlib.util import find_spec

    from .errors import BackendUnavailable
    from .folders import check_target

    check_target(out, "bench.json", overwrite=False)
    if find_spec("matplotlib") is None:
        raise BackendUnavailable(
            "--out draws a chart, which needs matplotlib: pip install 'edgeclip[calibration]'; "
            "--json alone does not need it"
        )


def _write(out: Path, report: dict[str, Any], rows: "list[Row]") -> None:
    from .bench_chart import chart
    from .folders import new_folder

    with new_folder(out, "bench.json") as folder:
        text = json.dumps(report, indent=2, ensure_ascii=False)
        (folder / "bench.json").write_text(text + "\n", encoding="utf-8")
        chart(rows).savefig(folder / "bench.png")


def _print(rows: "list[Row]", conditions: str) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    ran, failed = [row for row in rows if not row.error], _failed(rows)
    console.print(_summary(ran, failed))
    if ran:
        console.print(_stages(ran))
    for backend, precisions, error in failed:
        console.print(f"{backend}, {precisions}: {error}")
    for note in dict.fromkeys(note for row in ran for note in row.notes):
        console.print(f"note: {note}")
    console.print(conditions)


def _failed(rows: "list[Row]") -> list[tuple[str, str, str]]:
    """Backend, precisions and error, those of the same error in one."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.error:
            groups.setdefault((row.backend, row.error), []).append(row.precision)
    return [(backend, ", ".join(names), error) for (backend, error), names in groups.items()]


def _table(columns: tuple[str, ...], title: str, words: int) -> "Table":
    """A table whose columns after the first `words` hold numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < words else "right", no_wrap=True)
    return table


def _summary(ran: "list[Row]", failed: list[tuple[str, str, str]]) -> "Table":
    table = _table(_SUMMARY, "From a frame to its label, one frame after the other", 2)
    for row in ran:
        figures = [f"{row.load_ms:.0f}", f"{row.first_ms:.1f}", f"{row.stages['total'].p50:.2f}"]
        figures += [f"{row.frames_per_second:.1f}"]
        growth = (row.rss_growth_mib, row.gpu_growth_mib)
        figures += ["-" if mib is None else f"{mib:.0f}" for mib in growth]
        table.add_row(row.backend, row.precision, *figures)
    for backend, precisions, _ in failed:
        table.add_row(backend, precisions.replace(", ", "\n"), *["-"] * (len(_SUMMARY) - 2))
    return table


def _stages(ran: "list[Row]") -> "Table":
    table = _table(_STAGES, "Its stages", 3)
    for row in ran:
        for number, (stage, ms) in enumerate(row.stages.items()):
            names = ("", "") if number else (row.backend, row.precision)
            cells = (f"{value:.2f}" for value in (ms.p50, ms.p90, ms.p99))
            table.add_row(*names, stage, *cells, end_section=number == len(row.stages) - 1)
    return table
