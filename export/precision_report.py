"""The report on precisions: what each costs, layer by layer, and the frames that it flips."""

import io
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image

from calibration import plots
from calibration.confidence import Confidence
from calibration.contact_sheet import Query, query_sheet
from calibration.gate import LayerRow
from calibration.precisions import Candidate
from runtime.backends import image_border
from runtime.manifest import Manifest
from runtime.ort import OrtEncoder

from .precisions import Made

RUNS = 15  # of each precision, in turns
COLUMNS = (
    "precision", "", "MiB", "nodes", "in float", "cosine p1", "p50", "same label", "top-1",
    "ECE before", "after", "ms here",
)  # fmt: skip
LAYER_COLUMNS = (
    "layer", "", "weights", "range by", "SmoothQuant", "cosine p1", "labels changed", "",
)  # fmt: skip


def rows(folder: Path, made: Manifest, others: Made) -> Iterator[dict[str, Any]]:
    """A row of figures for each precision, those that were refused included."""
    ms = latencies(folder, made)
    model = onnx.load(folder / made.precisions["fp32"].image)
    scores = {name: _scores(found) for name, found in others.confidence.items()}
    yield {
        "precision": "fp32",
        "status": "accepted",
        **_size(model),
        "ms": ms["fp32"],
        "scores": scores.get("fp32", {}),
    }
    for candidate in others.candidates:
        yield {
            "precision": candidate.name,
            "status": "accepted" if candidate.accepted else "rejected",
            **_size(candidate.model),
            "ms": ms.get(candidate.name),
            "figures": candidate.figures(),
            "float_layers": list(candidate.float_layers),
            "faults": list(candidate.faults),
            "scores": scores.get(candidate.name, {}),
        }


def _scores(found: Confidence) -> dict[str, Any]:
    return {
        "how": found.how,
        "logit_scale": found.head.logit_scale,
        "logit_bias": found.head.logit_bias,
        "unknown_measure": found.limit.measure,
        "unknown_threshold": found.limit.threshold,
        "unknown_auroc": found.limit.auroc,
        "false_alarms": found.limit.false_alarms,
        "ece_before": found.ece_before,
        "ece_after": found.ece_after,
    }


def _size(model: onnx.ModelProto) -> dict[str, int]:
    return {"bytes": model.ByteSize(), "nodes": len(model.graph.node)}


def latencies(folder: Path, made: Manifest) -> dict[str, float]:
    """Milliseconds of one frame for each image encoder in ONNX Runtime on this CPU: the median of
    runs in turns, so that they can be compared."""
    border = image_border(made)
    frame = np.zeros((1, *border.shape), np.uint8)
    encoders = {n: OrtEncoder(folder / p.image, border) for n, p in made.precisions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(RUNS):
        for name, encoder in encoders.items():
            begin = time.perf_counter()
            encoder(frame)
            seconds[name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(found[2:]) for name, found in seconds.items()}


def markdown(table: Sequence[Mapping[str, Any]], others: Made) -> Iterator[str]:
    """The lines of the table, and of the layers."""
    yield from ("", "## The image encoder by precision", "")
    if others.calibration and others.judged:
        yield f"Calibrated on {len(others.calibration)} frames, judged on {len(others.judged)}"
        yield from (f"other ones, told apart by {len(others.labels) or 'no'} labels.", "")
    yield from markdown_table(COLUMNS, [_cells(row) for row in table])
    yield "Cosine is that of the embeddings with fp32's, at the 1st and 50th percentile of the"
    yield "frames; ECE is that of the scores before and after they were fitted to held-out frames;"
    yield "ms is one frame in ONNX Runtime on the CPU that made this bundle."
    faults = [f"{row['precision']}: {fault}" for row in table for fault in row.get("faults", ())]
    for line in (*faults, *others.notes):
        yield from ("", f"- {line}")
    for candidate in others.candidates:
        if candidate.layers:
            yield from _layers(candidate)
    if others.flips:
        yield from ("", "## Frames whose label int8 changes", "", "![Frames](flips.png)", "")
        flips = [(name, before, after) for name, _, before, after in others.flips]
        yield from markdown_table(("frame", "fp32", "int8"), flips)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    figures = row.get("figures", {})
    formats = (
        ("cosine_p1", ".5f"), ("cosine_p50", ".5f"), ("agreement", ".1%"), ("top1", ".1%"),
    )  # fmt: skip
    return (
        row["precision"],
        row["status"],
        f"{row['bytes'] / 2**20:.1f}",
        str(row["nodes"]),
        str(len(row.get("float_layers", ()))),
        *(format(figures[name], how) if name in figures else "" for name, how in formats),
        *(_percent(row["scores"].get(name)) for name in ("ece_before", "ece_after")),
        "" if row["ms"] is None else f"{row['ms']:.2f}",
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _layers(candidate: Candidate) -> Iterator[str]:
    yield from ("", f"## {candidate.name}, layer by layer", "", "![Drift](drift.png)", "")
    yield f"{candidate.int8_share:.1%} of the layers' weights are int8. Each layer is judged with"
    yield "int8 in it alone: the cosine that is left, and how many frames change their label."
    yield ""
    ranked = sorted(candidate.layers, key=lambda row: row.cosine)
    yield from markdown_table(LAYER_COLUMNS, [_layer_cells(row) for row in ranked])


def _layer_cells(row: LayerRow) -> tuple[str, ...]:
    return (
        row.title,
        row.operator,
        f"{row.weights:,}",
        row.method,
        f"{row.smoothed:g}" if row.smoothed else "",
        f"{row.cosine:.5f}",
        str(row.flips),
        "in float" if row.in_float else "",
    )


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table."""
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    for cells in lines:
        yield "| " + " | ".join(" ".join(c.split()).replace("|", "\\|") for c in cells) + " |"
    yield ""


def pictures(others: Made) -> Iterator[tuple[str, Image.Image]]:
    """The report's pictures by their files' names."""
    for candidate in others.candidates:
        if candidate.layers:
            content = io.BytesIO()
            with warnings.catch_warnings():  # a name in a script that the font lacks
                warnings.filterwarnings("ignore", message="Glyph .* missing from")
                plots.drift(candidate.layers).savefig(content)
            yield "drift.png", Image.open(content)
    if others.flips:
        title = "Frames whose label int8 changes"
        queries = [Query(f"{a} -> {b}", [(frame, False, n)]) for n, frame, a, b in others.flips]
        yield "flips.png", query_sheet(queries, title, columns=3)
