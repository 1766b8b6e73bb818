"""`edgeclip presets`: the towers there are, how large, how fast here, and how INT8 suits them."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

if TYPE_CHECKING:
    from rich.table import Table

    from .tower_facts import Facts
    from .tower_speed import Speed


_SHORT = {"onnxruntime": "ORT", "openvino": "OV"}  # OpenVINO


def presets(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Presets, open_clip models, configs (default: all presets, and some)."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure what was not measured here yet.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List image towers: size, multiply-adds, INT8, milliseconds here and on a Jetson."""
    from rich.console import Console

    from .tower_facts import JETSON, facts, listed
    from .tower_speed import measured, recalled

    rows: list[tuple[Facts, Speed | None]] = []
    with Console(stderr=True).status("Counting") as status:
        for name in listed(names or ()):
            status.update(f"Counting {name}")
            found = facts(name)
            speed = measured(name, status.update) if measure else recalled(name)
            rows.append((found, speed))
    if as_json:
        described = [
            {**msgspec.to_builtins(found), "ms": speed.ms if speed else {},
             "jetson": JETSON.get(found.name)}
            for found, speed in rows
        ]  # fmt: skip
        print(json.dumps({"towers": described}))
    else:
        _print(rows)


def _print(rows: "list[tuple[Facts, Speed | None]]") -> None:
    from rich.console import Console

    from .tower_facts import JETSON, JETSON_SOURCES

    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(_table(rows))
    if not all(speed for _, speed in rows):
        console.print("-: not measured on this machine yet (--measure does)")
    kinds = dict.fromkeys(found.int8 for found, _ in rows)
    console.print("INT8:")
    for kind in kinds:
        console.print(f"  {kind}:", ", ".join(f.name for f, _ in rows if f.int8 == kind))
    names = {found.name for found, _ in rows}
    known = [f"{name}: {text}" for name, text in JETSON.items() if name in names]
    if known:
        console.print("On a Jetson, as others have measured:", *known, *JETSON_SOURCES, sep="\n  ")


def _table(rows: "list[tuple[Facts, Speed | None]]") -> "Table":
    """Parameters and multiply-adds in millions, milliseconds by backend and precision."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from .tower_speed import BACKENDS, PRECISIONS

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("tower", no_wrap=True)
    pairs = [(backend, precision) for backend in BACKENDS for precision in PRECISIONS]
    times = [f"{_SHORT[backend]}\n{precision}\nms" for backend, precision in pairs]
    for column in ("input\npx", "image\nM", "mult-adds\nM", "text\nM", *times):
        table.add_column(column, justify="right", no_wrap=True)
    for found, speed in rows:
        ms = speed.ms if speed else {}
        table.add_row(
            found.name,
            str(found.side),
            f"{found.image_parameters / 1e6:.1f}",
            f"{found.multiply_adds / 1e6:,.0f}",
            f"{found.text_parameters / 1e6:.1f}",
            *(_ms(ms.get(f"{backend} {precision}")) for backend, precision in pairs),
        )
    return table


def _ms(value: Any) -> str:
    return "-" if value is None else f"{value:.2f}"
