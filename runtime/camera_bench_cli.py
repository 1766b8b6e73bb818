"""`edgeclip bench --cameras`: how many cameras a machine carries, as a table or as JSON."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .camera_bench import CameraRow

_COLUMNS = ("cameras", "least\n/s", "mean\n/s", "dropped", "age p50\nms", "age p99\nms", "unfair",
            "a run\nms", "CPU", "carried")  # fmt: skip


def bench_cameras(
    bundle: Path,
    cameras: str,
    *,
    fps: float | None,
    frames: Any,
    source: str | None,
    seconds: float,
    backend: str,
    precision: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measures so many cameras ("most": as many as are carried) and prints what they came to."""
    from rich.console import Console

    from .api import load
    from .bench import give_labels
    from .camera_bench import measure, most_cameras
    from .conditions import conditions
    from .made_cameras import check_clip

    number, clip = _number(cameras), _clip(source)
    shape = frames[0][0].shape
    width, height, own = check_clip(clip) if clip else (shape[1], shape[0], 15.0)
    asked: dict[str, Any] = {"fps": fps or own, "frames": frames, "clip": clip, "seconds": seconds}
    before = conditions()
    with Console(stderr=True).status("Loading") as status:
        classifier = load(bundle, backend=backend, precision=precision, threads=threads)
        give_labels(classifier)
        if number:
            status.update(f"Measuring {number} cameras")
            rows = [measure(classifier, number, **asked)]
        else:
            rows = list(most_cameras(classifier, tell=lambda text: status.update(text), **asked))
    rows.sort(key=lambda row: row.cameras)
    kind = f"{fps or own:g} frames/s, {width}x{height}, " + ("decoded" if clip else "from memory")
    if as_json:
        report = {
            "bundle": str(bundle), "runs": repr(classifier), "fps": fps or own,
            "size": [width, height], "source": clip and clip.shown, "seconds": seconds,
            "before": before.as_dict(), "after": conditions().as_dict(), "verdict": verdict(rows),
            "rows": [{**asdict(row), "carried": not row.why} for row in rows],
        }  # fmt: skip
        print(json.dumps(report))
    else:
        _print(rows, f"{classifier!r}\nCameras of {kind}", f"before: {before}")


def _number(cameras: str) -> int:
    """How many are to be tried; 0 for "most". Raises DataError."""
    from .camera_bench import MOST
    from .errors import DataError

    if cameras == "most":
        return 0
    if not cameras.isdecimal() or not 1 <= int(cameras) <= MOST:
        raise DataError(f"--cameras {cameras} is neither a number from 1 to {MOST} nor most")
    return int(cameras)


def _clip(source: str | None) -> Any:
    from .errors import DataError
    from .source_uri import parse_source

    if source is None:
        return None
    spec = parse_source(source)
    if spec.kind != "video":
        raise DataError(f"--source {source} is no video: cameras play a file again and again")
    return spec


def verdict(rows: "list[CameraRow]") -> str:
    """What was found, in a sentence; `rows` by their number of cameras."""
    good = max((row for row in rows if not row.why), key=lambda row: row.cameras, default=None)
    bad = next((row for row in rows if row.why and (not good or row.cameras > good.cameras)), None)
    why = f"{bad.cameras}: {bad.why}" if bad else ""
    if good is None:
        return f"not carried ({why})"
    many = "1 camera is" if good.cameras == 1 else f"{good.cameras} cameras are"
    return f"{many} carried" + (f" ({why})" if why else "")


def _print(rows: "list[CameraRow]", title: str, conditions: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False, markup=False)
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row.cameras), f"{row.fps_min:.1f}", f"{row.fps_mean:.1f}", f"{row.dropped:.1%}",
            f"{row.p50_ms:.1f}", f"{row.p99_ms:.1f}", f"{row.unfair:.1%}",
            f"{row.inference_ms:.1f}", f"{row.cpu:.0%}", "no" if row.why else "yes",
        )  # fmt: skip
    console.print(table)
    console.print(f"{verdict(rows)}\n{conditions}")
