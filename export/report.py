"""The bundle's report: what was measured when it was made, to read and for programs."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

from calibration.parity import Parity
from runtime.manifest import Manifest

from . import precision_report
from .precisions import Made
from .text_precisions import MadeTexts
from .text_report import text_markdown, text_rows


def write_report(
    folder: Path, made: Manifest, rows: Sequence[Parity], others: Made, texts: MadeTexts
) -> None:
    """Writes `folder/report`: report.json, report.md and its pictures."""
    versions = {
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
    table = [*precision_report.rows(folder, made, others)]
    text_table = [*text_rows(folder, made, texts)]
    content = {
        "model": made.model.name,
        "source": made.model.source,
        "parity": [dataclasses.asdict(row) for row in rows],
        "precisions": table,
        "text_precisions": text_table,
        "layers": [row._asdict() for c in others.candidates for row in c.layers],
        "frames": _frames(others),
        "notes": [*others.notes, *texts.notes],
        "versions": versions,
    }
    report = folder / "report"
    report.mkdir()
    text = json.dumps(content, indent=2) + "\n"
    (report / "report.json").write_text(text, encoding="utf-8", errors="replace")
    lines = [
        *_head(folder, made, rows),
        *precision_report.markdown(table, others),
        *text_markdown(text_table, texts),
    ]
    (report / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, picture in precision_report.pictures(others):
        picture.save(report / name)


def _frames(others: Made) -> dict[str, Any]:
    sets = {"calibration": others.calibration, "judged": others.judged}
    return {name: found.manifest() for name, found in sets.items() if found}


def _head(folder: Path, made: Manifest, rows: Sequence[Parity]) -> list[str]:
    lines = [
        f"# {made.model.name}",
        "",
        f"Weights: {made.model.source} (SHA-256 `{made.model.weights_sha256[:16]}…`).",
        "",
        "## The exported encoders against the PyTorch model",
        "",
        "| encoder | batch | smallest cosine | mean cosine | largest difference |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.encoder} | {r.batch} | {r.cosine_min:.7f} | {r.cosine_mean:.7f} "
        f"| {r.largest_difference:.1e} |"
        for r in rows
    ]
    lines += ["", "## Files", "", "| file | MiB |", "|---|---|"]
    lines += [
        f"| {path.name} | {path.stat().st_size / 2**20:.1f} |"
        for path in sorted(folder.glob("*.onnx"))
    ]
    return lines
