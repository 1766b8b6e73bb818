"""The command as a user meets it: help, output for programs, and errors in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import COLORS


def edgeclip(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from export.cli import main; main()", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == code, run.stderr
    assert "Traceback" not in run.stderr
    return run


@pytest.mark.parametrize("command", ["demo", "train", "export", "classify", "verify"])
def test_every_command_is_listed_and_has_an_example(command: str) -> None:
    assert command in edgeclip("--help").stdout
    assert f"Example: edgeclip {command}" in edgeclip(command, "--help").stdout


def test_classify_prints_a_line_for_each_frame(bundle: Path, squares: Path) -> None:
    run = edgeclip("classify", bundle, squares / "red", squares / "blue/3.png", "--json")
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(lines) == 25
    assert {"file", "label", "score", "cosine", "unknown", "top", "ms"} == set(lines[0])
    right = [line["label"] == Path(line["file"]).parent.name for line in lines]
    assert sum(right) >= 22


def test_classify_prints_a_table(bundle: Path, squares: Path) -> None:
    run = edgeclip("classify", bundle, squares / "green/0.png", "--labels", "green,[b]odd[/b]")
    assert "green" in run.stdout and "[b]odd[/b]" in run.stdout and "fp32" in run.stdout


def test_classify_goes_on_after_a_bad_file(bundle: Path, squares: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_text("this is a text")
    files = tmp_path / "bad.jpg", squares / "red/0.png"
    run = edgeclip("classify", bundle, *files, "--json", code=2)
    first, second = [json.loads(line) for line in run.stdout.splitlines()]
    assert "not a picture" in first["error"] and second["label"] in COLORS
    run = edgeclip("classify", bundle, *files, code=2)
    assert run.stderr.count("not a picture") == 1 and "0.png" in run.stdout


def test_labels_and_templates_from_files(bundle: Path, squares: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("red\n\nblue\n")
    (tmp_path / "labels.json").write_text('{"warm": ["red"], "cold": ["blue", "green"]}')
    (tmp_path / "templates.txt").write_text("a {} square\n{}\n")
    for name, expected in (("labels.txt", {"red", "blue"}), ("labels.json", {"warm", "cold"})):
        run = edgeclip("classify", bundle, squares / "red/0.png", "--labels", tmp_path / name,
                       "--template", tmp_path / "templates.txt", "--json")  # fmt: skip
        assert {label for label, _ in json.loads(run.stdout)["top"]} == expected


def test_export_verify_and_classify(checkpoint: Path, squares: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    run = edgeclip("export", checkpoint, out, "--labels", "red,blue", "--json")
    assert len(json.loads(run.stdout)["parity"]) == 6
    assert json.loads(edgeclip("verify", out, "--json").stdout)["faults"] == []
    edgeclip("classify", out, squares / "red/1.png", "--json")
    (out / "text.fp32.onnx").write_bytes(b"")
    assert "text.fp32.onnx" in edgeclip("verify", out, code=3).stdout


def one_line(run: subprocess.CompletedProcess[str]) -> str:
    assert run.stdout == ""
    (line,) = run.stderr.strip().splitlines()
    return line


def test_errors_are_one_line(bundle: Path, squares: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("image,text\n")
    out = tmp_path / "out"
    for message, *arguments in (
        ("no bundle folder", "classify", tmp_path / "no", squares),
        ("no manifest.json", "classify", tmp_path / "empty", squares),
        ("no pictures and no videos", "classify", bundle, tmp_path / "empty"),
        ("no file or folder", "classify", bundle, tmp_path / "no.png"),
        ("more than once", "classify", bundle, squares, "--labels", "a,a"),
        ("cannot be read as a text file", "classify", bundle, squares, "--labels", "no.txt"),
        ("no bundle folder", "verify", tmp_path / "no"),
    ):
        assert message in one_line(edgeclip(*arguments, code=2))
    for message, *arguments in (
        ("no data file or folder", "train", tmp_path / "no.csv", out),
        ("expected file,caption", "train", tmp_path / "bad.csv", out),
        ("neither a folder", "export", "no-such-model", out),
        ("is not a checkpoint folder", "export", tmp_path / "empty", out),
    ):
        assert message in one_line(edgeclip(*arguments, code=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.csv", "empty"]


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command = "import sys; sys.argv[0] = 'edgeclip'; from export.cli import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", command, "verify", str(tmp_path), "--debug"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and "MissingFile" in run.stderr and "Traceback" in run.stderr
