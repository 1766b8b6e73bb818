"""`edgeclip presets` counts towers, measures them once, and knows which fit a budget."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from export import tower_speed
from export.cli import app
from export.tower_facts import JETSON, KNOWN, Facts, facts, presets
from export.tower_speed import Speed, fitting, measured, recalled
from runtime.errors import DataError
from training.model import PRESETS

TINY = str(Path(__file__).parent / "tiny.json")


def test_a_tower_is_counted_by_hand() -> None:
    found = facts(TINY)
    tokens, width = 17, 48  # 4 x 4 patches of 8 pixels, and the class token
    block = tokens * 12 * width * width + 2 * tokens * tokens * width
    multiply_adds = 16 * 3 * 64 * width + 2 * block + width * 32
    assert found.multiply_adds == multiply_adds
    assert found.side == 32 and found.int8 == "good: Linears"


def test_presets_differ_in_how_int8_suits_them() -> None:
    assert {"nano", "mobilenetv2", "mobilenetv4", "resnet18"} <= set(presets())
    assert facts("nano").int8.startswith("good: convolutions")
    assert facts("repvit").int8.startswith("check it")


def test_figures_of_a_jetson_are_of_towers_that_are_listed() -> None:
    assert set(JETSON) <= {*presets(), *KNOWN}


def test_a_tower_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower_speed, "SECONDS", 0.01)
    assert recalled("nano") is None
    first = measured("nano")
    assert {"onnxruntime fp32", "onnxruntime int8"} <= set(first.ms)
    assert all(ms > 0 for ms in first.ms.values())
    with monkeypatch.context() as patch:
        patch.setattr(tower_speed, "create", None)  # would fail
        assert measured("nano") == recalled("nano") == first
    file = tmp_path / "own.json"  # may be another network tomorrow
    file.write_bytes((PRESETS / "nano.json").read_bytes())
    assert measured(str(file)).ms and recalled(str(file)) is None


def test_of_those_that_fit_the_largest_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    ms = {"nano": (0.2, 0.1), "resnet18": (20.0, 4.0), "mobilenetv4": (4.0, 6.0)}
    sizes = {"nano": 4, "mobilenetv4": 185, "resnet18": 1814}

    def told(name: str, tell: object = None) -> Speed:
        return Speed(name, {"openvino fp32": ms[name][0], "openvino int8": ms[name][1]})

    monkeypatch.setattr(tower_speed, "measured", told)
    monkeypatch.setattr(tower_speed, "require", lambda backend: None)
    monkeypatch.setattr(
        tower_speed, "facts", lambda name: Facts(name, 0, 0, sizes[name], 0, "good")
    )
    assert fitting(5.0, "openvino", list(ms)) == ["resnet18", "mobilenetv4", "nano"]
    assert fitting(1.0, "openvino", list(ms)) == ["nano"]
    with pytest.raises(DataError, match="the fastest is nano, 0.10 ms"):
        fitting(0.05, "openvino", list(ms))


def test_a_backend_that_is_not_there_is_an_error() -> None:
    with pytest.raises(DataError, match="onnxruntime or openvino, not 'abacus'"):
        fitting(5.0, "abacus", ["nano"])


def test_edgeclip_presets_prints_a_table_and_json() -> None:
    shown = CliRunner().invoke(app, ["presets", "nano", "resnet18"])
    assert shown.exit_code == 0 and "--measure" in shown.stdout and "Orin Nano" in shown.stdout
    told = CliRunner().invoke(app, ["presets", "nano", "--json"])
    (tower,) = json.loads(told.stdout)["towers"]
    assert tower["name"] == "nano" and tower["multiply_adds"] > 1e6 and tower["ms"] == {}
    wrong = CliRunner().invoke(app, ["presets", "nanoo"])
    assert isinstance(wrong.exception, DataError)


def test_the_command_works_in_a_process_of_its_own() -> None:
    """Where nothing has been imported before that mends torchvision beside a CPU-only torch."""
    script = Path(sys.executable).parent / "edgeclip"
    run = subprocess.run([script, "presets", "nano", "--json"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["towers"][0]["name"] == "nano"
