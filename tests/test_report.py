"""The report on an evaluation or a training, and the command that makes it."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import write_squares
from PIL import Image
from test_evaluation import HEAD, labelled, pictures, unit

from calibration import evaluation
from calibration.evaluation import Evaluation, evaluate
from calibration.pairs import Bad, Pairs
from calibration.report import write_report
from calibration.sections import Report, json_of
from export.cli import main

NAMES = ("a|b *c*", "$5 and $6", "空っぽ кошка " + "long " * 20)  # what markup would trip over


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("eval") / "val", each=10, seed=5)


# The report


def trial(folder: Path, count: int, names: Sequence[str]) -> Evaluation:
    """An evaluation with mistakes, of pictures that exist."""
    rng = np.random.default_rng(0)
    bank = unit(rng.normal(size=(len(names), 8)))
    targets = rng.integers(0, len(names), count).tolist()
    images = unit(bank[targets] + 0.5 * rng.normal(size=(count, 8)))
    pairs = labelled(pictures(folder, count), targets, names)
    return evaluate(pairs, images, lambda _: bank, HEAD, ["{}"])


def written(folder: Path, report: Report) -> str:
    """Writes the report; checks that what it links is there, and the rest of the files too."""
    folder.mkdir()
    write_report(folder, report)
    text = (folder / "report.md").read_text(encoding="utf-8")
    linked = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert {p.name for p in folder.iterdir()} == {"report.md", "report.json", *linked}
    for name in linked:
        with Image.open(folder / name) as image:
            image.load()
            assert min(image.size) > 150 and max(image.size) < 3000
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1
    content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert content == json.loads(json.dumps(json_of(report)))
    return text


def test_a_report_on_labels(tmp_path: Path) -> None:
    found = trial(tmp_path / "pictures", 60, NAMES)
    report = Report(title="a_b on <x>", about={"model": "a_b"}, evaluation=found)
    text = written(tmp_path / "report", report)
    for name in ("reliability", "confusion", "mistakes"):
        assert f"({name}.png)" in text
    assert "Training" not in text and "Left out" not in text and "retrievals" not in text
    assert r"# a\_b on \<x\>" in text and r"| a\|b \*c\* |" in text and r"\$5 and \$6" in text
    content = json_of(report)
    assert content["figures"] == found.figures
    assert [row["label"] for row in content["classes"]] == list(NAMES)
    assert sum(number for *_, number in content["confusion"]) == 60
    assert content["mistakes"][0]["taken_for"][0][0] == found.mistakes[0].prediction.label


@pytest.mark.parametrize("classes", [1, 25, 100])
def test_a_report_on_one_class_and_on_many(tmp_path: Path, classes: int) -> None:
    found = trial(tmp_path / "pictures", 120, [f"class {n}" for n in range(classes)])
    text = written(tmp_path / "report", Report(title="t", about={}, evaluation=found))
    assert ("worst of 100 classes" in text) == (classes == 100)
    assert ("No picture was taken for another class" in text) == (classes == 1)


def test_a_report_on_captions(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    files = pictures(tmp_path / "pictures", 20)
    texts = unit(rng.normal(size=(20, 8)))
    images = unit(texts + 0.4 * rng.normal(size=texts.shape))
    names = tuple(f"caption {n} " + "goes on " * 40 for n in range(20))
    pairs = Pairs(tuple(files), tuple((n,) for n in range(20)), names)
    found = evaluate(pairs, images, lambda _: texts, HEAD, [])
    assert any(r.place > evaluation.SHOWN for r in found.retrievals)
    text = written(tmp_path / "report", Report(title="t", about={}, evaluation=found))
    assert "(retrievals.png)" in text and "picture to caption, R@10" in text
    assert "Confusion" not in text and max(map(len, text.splitlines())) < 300


def test_a_report_on_training_alone(tmp_path: Path) -> None:
    history = [{"epoch": n, "loss": 2 / n, "top1": 0.5, "guard_top1": 0.4} for n in range(1, 131)]
    steps = [{"step": 10 * n, "loss": 3.0, "lr": 1e-4} for n in range(1000)]
    wise_ft = [{"alpha": a, "top1": a, "guard_top1": 1 - a} for a in (0.0, 0.5, 1.0)]
    bad = [Bad(f"x.csv, line {n} ('a|b')", "missing file") for n in range(40)]
    report = Report(title="t", about={}, history=history, steps=steps, wise_ft=wise_ft, bad=bad)
    text = written(tmp_path / "report", report)
    assert "(curves.png)" in text and "(wise_ft.png)" in text and "## Figures" not in text
    assert "| missing file | 40 |" in text and "10 more are in report.json" in text
    epochs = re.findall(r"^\| (\d+) \| [\d.]+ \| 0.5 \| 0.4 \|$", text, re.MULTILINE)
    assert epochs[-1] == "130" and len(epochs) <= 50
    assert json_of(report)["bad"]["counts"] == {"missing file": 40}
    assert len(json_of(report)["history"]) == 130


def test_names_that_are_no_utf_8_do_not_lose_the_report(tmp_path: Path) -> None:
    bad = [Bad("caf\udce9.jpg", "unreadable picture")]
    report = Report(title="t", about={}, history=[{"epoch": 1, "loss": 2.0}], steps=[], bad=bad)
    write_report(tmp_path, report)
    assert "caf?.jpg" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "report.json").read_text())["bad"]["items"][0][0] == "caf?.jpg"


def test_a_first_epoch_has_a_report(tmp_path: Path) -> None:
    history = [{"epoch": 1, "loss": 2.0}]
    steps = [{"step": 0, "loss": 2.0}]
    written(tmp_path / "report", Report(title="t", about={}, history=history, steps=steps))


# The command


def edgeclip(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["edgeclip", "eval", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        main()
    return int(exit.value.code or 0)


def test_the_command_writes_a_report(
    bundle: Path,
    val: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "report"
    assert edgeclip(monkeypatch, "--help") == 0
    assert "Example: edgeclip eval" in capsys.readouterr().out
    ort = "--backend", "onnxruntime"  # which is the fastest here is not for this test
    assert edgeclip(monkeypatch, bundle, "--data", val, "--out", out, *ort) == 0
    shown = capsys.readouterr().out
    assert "top-1 accuracy" in shown and "fp32 on onnxruntime" in shown and "wrote" in shown
    assert {"report.md", "report.json", "confusion.png"} <= {p.name for p in out.iterdir()}
    assert edgeclip(monkeypatch, bundle, "--data", val, "--out", out) == 2
    assert "--force" in capsys.readouterr().err
    again = bundle, "--data", val, "--out", out, "--force", "--json", "--template", "my {}"
    assert edgeclip(monkeypatch, *again) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert printed["templates"] == ["my {}"] and printed["pictures"] == 30


def test_bad_data_is_told_and_limited(
    checkpoint: Path,
    val: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = shutil.copytree(val, tmp_path / "data")
    (data / "red" / "bad.jpg").write_text("this is a text")
    assert edgeclip(monkeypatch, checkpoint, "--data", data) == 2
    error = capsys.readouterr().err
    assert "1 of 31 items cannot be used" in error and "bad.jpg" in error and "--max-bad" in error
    assert edgeclip(monkeypatch, checkpoint, "--data", data, "--max-bad", "0.1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["bad"]["counts"] == {"unreadable picture": 1}


def test_errors_are_one_line(
    bundle: Path,
    checkpoint: Path,
    val: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    for message, *arguments in (
        ("neither a bundle", tmp_path / "empty", "--data", val),
        ("there is no bundle and no checkpoint", tmp_path / "no", "--data", val),
        ("neither a folder", "no-such-model", "--data", val),
        ("--pretrained does not go with it", bundle, "--data", val, "--pretrained", "openai"),
        ("--tokenizer does not go with it", bundle, "--data", val, "--tokenizer", "x"),
        ("no precision 'int4'", bundle, "--data", val, "--precision", "int4"),
        ("no backend 'magic'", bundle, "--data", val, "--backend", "magic"),
        ("runs bundles only", checkpoint, "--data", val, "--backend", "onnxruntime"),
        ("--precision is fp32", checkpoint, "--data", val, "--precision", "int8"),
        ("no data file or folder", bundle, "--data", tmp_path / "no.csv"),
        ("holds something else", bundle, "--data", val, "--out", val, "--force"),
    ):
        assert edgeclip(monkeypatch, *arguments) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


WITHOUT = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None
from export.cli import main
main()
"""


def test_a_bundle_is_evaluated_without_torch_and_without_matplotlib(
    bundle: Path, val: Path, tmp_path: Path
) -> None:
    def run(without: str, *more: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", WITHOUT, without, "eval", bundle, "--data", val, *more]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True)

    lean = run("torch,open_clip,lightning,sklearn,matplotlib,onnx", "--json")
    assert json.loads(lean.stdout)["pictures"] == 30, lean.stderr
    told = run("matplotlib", "--out", tmp_path / "out")
    assert told.returncode == 2 and "pip install 'edgeclip[calibration]'" in told.stderr
    assert not (tmp_path / "out").exists()
