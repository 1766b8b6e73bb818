"""The import contract: data flows training -> export -> runtime, imports flow the other way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"runtime", "calibration", "training", "export"}
TORCH = {"torch", "torchvision", "open_clip", "lightning", "timm"}
MAY_IMPORT = {
    "runtime": {"runtime"},
    "calibration": {"calibration", "runtime", "onnx"},
    "training": {"training", "calibration", "runtime"} | TORCH,
    "export": OURS | TORCH | {"onnx"},
}


def imported(path: Path) -> set[str]:
    """Top-level names of every import in a file, lazy and relative ones included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            name = path.relative_to(ROOT).parts[0] if node.level else node.module or ""
            names.add(name.partition(".")[0])
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_only_what_it_may(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        extra = imported(path) & (OURS | TORCH | {"onnx"}) - MAY_IMPORT[package]
        assert not extra, f"{path.relative_to(ROOT)} must not import {sorted(extra)}"


@pytest.mark.parametrize("module", ["runtime", "export.cli"])
def test_import_is_lean(module: str) -> None:
    heavy = "torch onnx cv2 onnxruntime tensorrt openvino tokenizers lightning".split()
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_public_names_are_sorted_and_exist() -> None:
    import runtime

    assert runtime.__all__ == sorted(runtime.__all__)
    assert all(hasattr(runtime, name) for name in runtime.__all__)
