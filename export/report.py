"""The bundle's report: what was measured when it was made, to read and for programs."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnxruntime
import torch

from calibration.parity import Parity
from runtime.manifest import Manifest


def write_report(folder: Path, made: Manifest, rows: Sequence[Parity]) -> None:
    """Writes `folder/report/report.json` and `report.md`."""
    versions = {
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
    content = {
        "model": made.model.name,
        "source": made.model.source,
        "parity": [dataclasses.asdict(row) for row in rows],
        "versions": versions,
    }
    (folder / "report").mkdir()
    text = json.dumps(content, indent=2) + "\n"
    (folder / "report/report.json").write_text(text, encoding="utf-8")
    (folder / "report/report.md").write_text(_markdown(folder, made, rows), encoding="utf-8")


def _markdown(folder: Path, made: Manifest, rows: Sequence[Parity]) -> str:
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
    return "\n".join(lines) + "\n"
