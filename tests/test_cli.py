"""The command as a user meets it: help, output for programs, and errors in one line."""

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest
from conftest import COLORS
from typer.testing import CliRunner

from export.bundle import ExportOptions
from export.cli import app, main
from runtime.errors import DataError, MissingFile, PrecisionRefused


@dataclass(frozen=True)
class Run:
    stdout: str
    stderr: str


class Edgeclip(Protocol):
    def __call__(self, *arguments: object, code: int = 0) -> Run: ...


@pytest.fixture
def edgeclip(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Edgeclip:
    """Runs the command in this process, and expects an exit code."""

    def run(*arguments: object, code: int = 0) -> Run:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["edgeclip", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        found = Run(*capsys.readouterr())
        assert (exit.value.code or 0) == code, found.stderr
        assert "Traceback" not in found.stderr
        return found

    return run


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "train",
        "distill",
        "eval",
        "export",
        "prompts",
        "build",
        "classify",
        "stream",
        "serve",
        "bench",
        "verify",
        "doctor",
    ],
)
def test_every_command_is_listed_and_has_an_example(edgeclip: Edgeclip, command: str) -> None:
    assert command in edgeclip("--help").stdout
    assert f"Example: edgeclip {command}" in edgeclip(command, "--help").stdout


def test_classify_prints_a_line_for_each_frame(
    edgeclip: Edgeclip, bundle: Path, squares: Path
) -> None:
    run = edgeclip("classify", bundle, squares / "red", squares / "blue/3.png", "--json")
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(lines) == 25
    expected = {"file", "label", "score", "cosine", "unknown", "path", "background", "top", "ms"}
    assert expected == set(lines[0])
    right = [line["label"] == Path(line["file"]).parent.name for line in lines]
    assert sum(right) >= 22


def test_classify_prints_a_table(edgeclip: Edgeclip, bundle: Path, squares: Path) -> None:
    run = edgeclip("classify", bundle, squares / "green/0.png", "--labels", "green,[b]odd[/b]",
                   "--precision", "fp32")  # fmt: skip
    assert "green" in run.stdout and "[b]odd[/b]" in run.stdout and "fp32" in run.stdout


def test_classify_goes_on_after_a_bad_file(
    edgeclip: Edgeclip, bundle: Path, squares: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.jpg").write_text("this is a text")
    files = tmp_path / "bad.jpg", squares / "red/0.png"
    run = edgeclip("classify", bundle, *files, "--json", code=2)
    first, second = [json.loads(line) for line in run.stdout.splitlines()]
    assert "not a picture" in first["error"] and second["label"] in COLORS
    run = edgeclip("classify", bundle, *files, code=2)
    assert run.stderr.count("not a picture") == 1 and second["label"] in run.stdout


def test_labels_and_templates_from_files(
    edgeclip: Edgeclip, bundle: Path, squares: Path, tmp_path: Path
) -> None:
    (tmp_path / "labels.txt").write_text("red\n\nblue\n")
    (tmp_path / "labels.json").write_text('{"warm": ["red"], "cold": ["blue", "green"]}')
    (tmp_path / "templates.txt").write_text("a {} square\n{}\n")
    for name, expected in (("labels.txt", {"red", "blue"}), ("labels.json", {"warm", "cold"})):
        run = edgeclip("classify", bundle, squares / "red/0.png", "--labels", tmp_path / name,
                       "--template", tmp_path / "templates.txt", "--json")  # fmt: skip
        assert {label for label, _ in json.loads(run.stdout)["top"]} == expected


def test_export_verify_and_classify(
    edgeclip: Edgeclip, checkpoint: Path, squares: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    run = edgeclip("export", checkpoint, out, "--labels", "red,blue", "--json")
    assert len(json.loads(run.stdout)["parity"]) == 6
    assert json.loads(edgeclip("verify", out, "--json").stdout)["faults"] == []
    edgeclip("classify", out, squares / "red/1.png", "--json")
    (out / "text.fp32.onnx").write_bytes(b"")
    assert "text.fp32.onnx" in edgeclip("verify", out, code=3).stdout


def one_line(run: Run) -> str:
    assert run.stdout == ""
    (line,) = run.stderr.strip().splitlines()
    return line


def test_errors_are_one_line(
    edgeclip: Edgeclip, bundle: Path, checkpoint: Path, squares: Path, tmp_path: Path
) -> None:
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
        ("at least one label", "classify", bundle, squares, "--labels", ""),
        ("templates go with labels", "classify", bundle, squares, "--template", "a {}"),
        ("neither a template", "classify", bundle, squares, "--labels", "a", "--template", "b"),
        ("no bundle folder", "classify", "a" * 5000, squares),
        ("no bundle folder", "verify", tmp_path / "no"),
    ):
        assert message in one_line(edgeclip(*arguments, code=2))
    for message, *arguments in (
        ("no data file or folder", "train", tmp_path / "no.csv", out),
        ("expected file,caption", "train", tmp_path / "bad.csv", out),
        ("neither a folder", "export", "no-such-model", out),
        ("is not a checkpoint folder", "export", tmp_path / "empty", out),
        ("File exists", "export", checkpoint, tmp_path / "bad.csv" / "out"),
        ("File name too long", "export", checkpoint, tmp_path / ("a" * 300)),
    ):
        assert message in one_line(edgeclip(*arguments, code=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.csv", "empty"]


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["edgeclip", "verify", str(tmp_path), "--debug"])
    with pytest.raises(MissingFile):
        main()


def test_help_is_instant_and_the_script_is_installed() -> None:
    """Help loads neither torch nor a backend (the import test says so); here the real process."""
    script = Path(sys.executable).parent / "edgeclip"
    run = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    assert "edgeclip demo" in run.stdout


def test_an_extra_that_is_not_installed_is_named(
    edgeclip: Edgeclip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "training.trainer", None)
    monkeypatch.setattr("export.cli.EXTRAS", {"training": "train"})
    run = edgeclip("train", tmp_path, tmp_path / "out", code=2)
    assert "pip install 'edgeclip[train]'" in run.stderr


STOPPED = """
import os, signal, time
from export import bundle, cli

def stopped(*_):
    os.kill(os.getpid(), signal.{name})
    time.sleep(30)

bundle.compare = stopped
cli.main()
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stopped_export_leaves_nothing(
    checkpoint: Path, tmp_path: Path, name: str, code: int
) -> None:
    run = subprocess.run(
        [sys.executable, "-c", STOPPED.format(name=name), "export", checkpoint, tmp_path / "out"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == code
    assert "interrupted; nothing half-written" in run.stderr and "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == []


STUCK = """
import os, signal, time
from export import bundle, cli

def stopped(*_):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)  # timeout's second
        print("unwinds", flush=True)
        time.sleep(cli.TWICE + 0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        print("is stuck", flush=True)

bundle.compare = stopped
cli.main()
"""


def test_a_sigterm_that_is_repeated_ends_at_once(checkpoint: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", STUCK, "export", checkpoint, tmp_path / "out"],
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout.split("\n")) == (-signal.SIGTERM, ["unwinds", ""])


def test_a_triton_repository_of_a_bundle(edgeclip: Edgeclip, bundle: Path, tmp_path: Path) -> None:
    assert "wrote" in edgeclip("export", bundle, "--to-triton", tmp_path / "models").stdout
    assert len(list((tmp_path / "models").glob("*/1/model.onnx"))) == 2
    error = edgeclip("export", bundle, code=2).stderr
    assert "name the bundle folder to write" in error


def test_a_refused_precision_does_not_take_the_report_with_it(
    bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(options: ExportOptions, quiet: bool) -> None:
        raise PrecisionRefused("int8 is too far from fp32")

    monkeypatch.setattr("export.bundle.export_bundle", refuses)
    command = ["export", "ViT-B-32", bundle_copy, "--force", "--to-triton", tmp_path / "triton"]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert isinstance(result.exception, PrecisionRefused)
    assert f"wrote {bundle_copy}" in result.stdout and (tmp_path / "triton").is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bundle", "--to-triton", "models", "--labels", "a"], "name the bundle folder to write"),
        (["nano", "out", "--labels", "LABELS", "--template", "a {}"], "templates of its own"),
    ],
)
def test_export_ignores_no_option(arguments: list[str], message: str, tmp_path: Path) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text('{"labels": ["a"], "templates": ["b {}"]}')
    chosen = [str(labels) if word == "LABELS" else word for word in arguments]
    result = CliRunner().invoke(app, ["export", *chosen])
    assert isinstance(result.exception, DataError) and message in str(result.exception)


def test_the_demo_keeps_what_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "demo.png").write_bytes(b"mine")
    (tmp_path / "b" / "data").mkdir(parents=True)
    (tmp_path / "b" / "data" / "train.csv").write_text("mine")
    for folder, more in (("a", []), ("b", ["--force"])):
        result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / folder), *more])
        assert isinstance(result.exception, DataError)
    assert (tmp_path / "b" / "data" / "train.csv").read_text() == "mine"
