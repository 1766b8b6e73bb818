"""The wheel: what is in it, and that it works in an environment without torch."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("calibration", "export", "runtime", "training")

CLASSIFY = """
import sys
import numpy as np
import runtime

clf = runtime.load(sys.argv[1], labels=["red", "green", "blue"])
frame = np.zeros((48, 64, 3), dtype=np.uint8)
frame[..., 2] = 220
print(runtime.classify(frame).label, clf.backend, "torch" in sys.modules)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    listed = subprocess.run(
        ["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout: no list of the project's files")
    missing = {n for n in listed.stdout.split() if (ROOT / n).exists()} - inside
    assert not missing
    assert {n.split("/")[0] for n in inside} == set(PACKAGES)
    assert {Path(n).suffix for n in inside} == {".py", ".json", ".html", ".css", ".js", ".svg"}


def bare_python(python: str, folder: Path, *packages: str) -> Path:
    """The interpreter of a new environment with these packages. Skips without a package index."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    made = folder / "bin" / "python"
    install = [str(made), "-m", "pip", "install", "--quiet", *packages]
    installed = subprocess.run(install, capture_output=True, text=True)
    if "No matching distribution" in installed.stderr or "Retrying" in installed.stderr:
        pytest.skip("no package index can be reached")
    assert installed.returncode == 0, installed.stderr
    return made


def test_wheel_classifies_without_torch(wheel: Path, bundle: Path, tmp_path: Path) -> None:
    python = bare_python(sys.executable, tmp_path / "bare", f"{wheel}[cpu]")
    script = tmp_path / "classify.py"
    script.write_text(CLASSIFY)
    run = subprocess.run(
        [str(python), str(script), str(bundle)], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.stdout.split() == ["red", "onnxruntime", "False"], run.stderr
    command = [str(python.parent / "edgeclip"), "train", "x.csv", "out"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2
    assert "pip install 'edgeclip[train]'" in run.stderr
    assert "Traceback" not in run.stderr


RUNTIME_TESTS = [
    "bundle", "choice", "cuda", "doctor", "frames", "fuzz", "ort_gpu", "preprocess",
    "prompts", "runtime",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12"])
def test_the_runtime_passes_its_tests_without_torch(
    version: str, wheel: Path, bundle: Path, tmp_path: Path
) -> None:
    found = shutil.which(f"python{version}")
    if found is None or subprocess.run([found, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"there is no python{version} on the PATH")
    tools = ["pytest", "pytest-rerunfailures", "pytest-timeout", "hypothesis"]
    python = bare_python(found, tmp_path / "bare", f"{wheel}[cpu]", *tools)
    tests = tmp_path / "tests"  # away from the packages, so that the wheel's are imported
    shutil.copytree(ROOT / "tests", tests)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    files = [str(tests / f"test_{name}.py") for name in RUNTIME_TESTS]
    run = subprocess.run(
        [str(python), "-m", "pytest", "-q", "-m", "not slow", *files],
        env={**os.environ, "EDGECLIP_TEST_BUNDLE": str(bundle)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
