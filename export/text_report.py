"""The report on the text encoder's precisions: what each costs, as a table and for programs."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.manifest import Manifest

from .precision_report import markdown_table
from .text_precisions import MadeTexts

COLUMNS = (
    "precision", "", "MiB", "in float", "weights int8", "cosine p1", "p50", "same label", "top-1",
)  # fmt: skip
_FORMATS = {
    "int8_share": ".1%", "cosine_p1": ".5f", "cosine_p50": ".5f", "agreement": ".1%", "top1": ".1%",
}  # fmt: skip


def text_rows(folder: Path, made: Manifest, texts: MadeTexts) -> Iterator[dict[str, Any]]:
    """A row of figures for each precision, those that were refused included."""
    size = (folder / made.text_encoder).stat().st_size
    yield {"precision": "fp32", "status": "accepted", "bytes": size}
    for candidate in texts.candidates:
        yield {
            "precision": candidate.name,
            "status": "accepted" if candidate.accepted else "rejected",
            "bytes": candidate.model.ByteSize(),
            "figures": candidate.figures(),
            "float_layers": list(candidate.float_layers),
            "faults": list(candidate.faults),
        }


def text_markdown(table: Sequence[Mapping[str, Any]], texts: MadeTexts) -> Iterator[str]:
    """The lines of the table, and of what is wrong."""
    yield from ("", "## The text encoder by precision", "")
    used = texts.used
    judged = f"{len(used.judged)} other ones" if used.apart else "the same"
    yield from (f"Calibrated on {len(used.calibration)} texts, judged on {judged}.", "")
    yield from markdown_table(COLUMNS, [_cells(row) for row in table])
    yield "Cosine is that of the texts' embeddings with fp32's; the labels are those of the judged"
    yield "frames, as the fp32 image encoder embeds them and this text encoder names them."
    faults = [f"text {c.name}: {fault}" for c in texts.candidates for fault in c.faults]
    for line in (*faults, *texts.notes):
        yield from ("", f"- {line}")


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    figures = row.get("figures", {})
    return (
        row["precision"],
        row["status"],
        f"{row['bytes'] / 2**20:.1f}",
        str(len(row.get("float_layers", ()))),
        *(format(figures[name], how) if name in figures else "" for name, how in _FORMATS.items()),
    )
