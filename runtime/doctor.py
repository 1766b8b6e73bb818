"""`edgeclip doctor`: what will work on this machine, and how to mend what will not.

import runtime.doctor

report = runtime.doctor.examine()
print([v.backend for v in report.backends if v.works])
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from .findings import Item
    from .verdicts import Verdict

Kind = Literal["jetson", "gpu", "cpu"]
_TITLES = {
    "jetson": "This is a Jetson",
    "gpu": "This machine has an NVIDIA GPU",
    "cpu": "This machine has no NVIDIA GPU",
}
_COLORS = {"ok": "green", "missing": "dim", "warning": "yellow", "yes": "green", "no": "red"}


@dataclass(frozen=True)
class Report:
    """What a machine is, what was found on it, and which backends work."""

    kind: Kind
    items: tuple["Item", ...]
    backends: tuple["Verdict", ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(bundle: Path | None = None, root: Path = Path("/"), **sources: Any) -> Report:
    """Examines the machine whose files lie under `root`, and a bundle, if one is given.

    Never raises for what it finds. `sources` replace what else `machine.gather` asks.
    """
    from .findings import of_machine
    from .machine import gather
    from .software import of_bundle, of_software
    from .verdicts import verdicts

    facts = gather(root, bundle or Path("."), **sources)
    items = [*of_machine(facts), *of_software(facts)]
    if bundle is not None:
        items.append(of_bundle(bundle))
    kind: Kind = "jetson" if facts.jetson else "gpu" if facts.gpu else "cpu"
    return Report(kind, tuple(items), tuple(verdicts(facts)))


def doctor(
    bundle: Annotated[Path | None, typer.Argument(help="Bundle folder to check as well.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell what will work on this machine, and how to mend what will not."""
    from rich.console import Console

    with Console(stderr=True).status("Trying what is installed"):
        report = examine(bundle)
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        _print(report)


def _print(report: Report) -> None:
    """Rows that no width breaks: commands can be copied, and lines searched."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    console.print(Text(f"{_TITLES[report.kind]}\n", "bold"))
    for item in report.items:
        _print_row(console, item.status, item.name, item.found, item.means, item.mend)
    console.print(Text("\nWhich backends will work here", "bold"))
    for verdict in report.backends:
        status = "yes" if verdict.works else "no"
        _print_row(console, status, verdict.backend, verdict.because, "", verdict.mend)


def _print_row(
    console: "Console", status: str, name: str, found: str, means: str, mend: str
) -> None:
    from rich.text import Text

    console.print(Text.assemble((f"{status:<8} ", _COLORS[status]), (name, "bold"), f": {found}"))
    if means:
        console.print(Text(f"{'':9}{means}"))
    if mend:
        console.print(Text.assemble(f"{'':9}", ("to mend: ", "dim"), (mend, "cyan")))
