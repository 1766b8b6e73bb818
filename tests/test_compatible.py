"""Engines that run in more places than where they were built: how far, and who lets them in."""

import json
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
from conftest import COLORS
from fake_machine import Machine, built, copied, frames
from typer.testing import CliRunner

import runtime
from export.cli import app
from export.engine import BuildOptions
from runtime import trt
from runtime.errors import BackendUnavailable
from runtime.trt_plan import HOST_CODE

pytestmark = pytest.mark.skipif(
    fake_cuda.COMPILER is None, reason="no C compiler (cc or gcc) to build the stub of CUDA with"
)
VERSIONS = BuildOptions(version_compatible=True)
HARDWARE = BuildOptions(hardware_compatible=True)
BOTH = BuildOptions(version_compatible=True, hardware_compatible=True)


@pytest.fixture
def bundle(every_precision: Path, tmp_path: Path) -> Path:
    return copied(every_precision, tmp_path)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_cuda.compile_stub(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, library: Path, tmp_path: Path) -> Machine:
    monkeypatch.delenv(HOST_CODE, raising=False)
    return Machine(monkeypatch, library, tmp_path / "package")


def load(bundle: Path) -> runtime.Classifier:
    return runtime.load(bundle, backend="tensorrt", precision="fp16")


def labels(classifier: runtime.Classifier) -> list[str]:
    return [classifier.classify(frame).label for frame in frames()]


def sidecar(bundle: Path) -> Path:
    (path,) = (bundle / "engines").glob("*.json")
    return path


def forge(bundle: Path, **changes: Any) -> None:
    path = sidecar(bundle)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_version_compatible_engine_runs_under_later_releases(
    bundle: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same major version: what NVIDIA's support matrix promises."""
    machine.has("10.3.0")
    (info,) = built(bundle, precision="fp16", build=VERSIONS)
    assert info.version_compatible and "VERSION_COMPATIBLE" in info.flags
    monkeypatch.setenv(HOST_CODE, "1")
    for version in ("10.3.0", "10.9.0", "10.16.1"):
        machine.has(version)
        classifier = load(bundle)
        assert labels(classifier) == list(COLORS)
        assert f"tensorrt {version}, Orin (stub), fp16, version compatible" in repr(classifier)
        assert runtime.load(bundle).backend == "tensorrt"
    machine.has("10.0.1")
    with pytest.raises(BackendUnavailable, match=r"by TensorRT 10\.3\.0, here is 10\.0\.1"):
        load(bundle)
    machine.has("11.4.0")
    with pytest.raises(BackendUnavailable, match="has no TensorRT engine of its fp16"):
        load(bundle)
    machine.has("10.9.0")
    machine.has_card("8.7")
    with pytest.raises(BackendUnavailable, match="has no TensorRT engine of its fp16"):
        load(bundle)


@pytest.mark.parametrize("value", [None, "", "0", "true"])
def test_code_in_a_plan_is_let_in_by_the_user_alone(
    bundle: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    machine.has("11.4.0")
    built(bundle, precision="fp16", build=VERSIONS)
    if value is not None:
        monkeypatch.setenv(HOST_CODE, value)
    with pytest.raises(BackendUnavailable, match=f"set {HOST_CODE}=1; .*`edgeclip build") as said:
        load(bundle)
    assert str(bundle) in str(said.value)
    classifier = runtime.load(bundle)
    assert classifier.backend != "tensorrt" and HOST_CODE in classifier.notes[0]
    built(bundle, precision="fp16")
    assert labels(load(bundle)) == list(COLORS)


def test_a_sidecar_that_hides_the_code_does_not_let_it_in(
    bundle: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.has("11.4.0")
    built(bundle, precision="fp16", build=VERSIONS)
    forge(bundle, version_compatible=False)
    monkeypatch.setenv(HOST_CODE, "1")
    with pytest.raises(BackendUnavailable, match="holds host code, which is not allowed"):
        load(bundle)


@pytest.mark.parametrize("version", ["8.6.0", "10.3.0", "11.4.0"])
def test_a_hardware_compatible_engine_runs_on_other_cards(
    bundle: Path, machine: Machine, version: str
) -> None:
    machine.has(version)
    machine.has_card("8.6")
    (info,) = built(bundle, precision="fp16", build=HARDWARE)
    assert info.hardware_compatible and "AMPERE_PLUS" in info.flags
    for capability in ("8.0", "8.9", "12.0"):
        machine.has_card(capability)
        assert labels(load(bundle)) == list(COLORS)
        assert runtime.load(bundle).backend == "tensorrt"


@pytest.mark.parametrize(
    ("capability", "said"),
    [
        ("7.5", r"is older than Ampere \(compute capability 7\.5, not 8\.0\)"),
        ("8.7", r"has no hardware compatible engines for Jetson"),
        ("11.0", r"has no hardware compatible engines for Jetson"),
    ],
)
def test_where_no_hardware_compatible_engine_runs(
    bundle: Path, machine: Machine, capability: str, said: str
) -> None:
    machine.has("10.9.0")
    machine.has_card("8.6")
    built(bundle, precision="fp16", build=HARDWARE)
    machine.has_card(capability)
    with pytest.raises(BackendUnavailable, match=said):
        load(bundle)
    with pytest.raises(BackendUnavailable, match=f"{said}.*without --hardware-compatible"):
        built(bundle, precision="fp16", build=HARDWARE)
    built(bundle, precision="fp16")
    assert labels(load(bundle)) == list(COLORS)


def test_a_hardware_compatible_engine_keeps_to_its_release_and_computer(
    bundle: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.has("10.3.0")
    machine.has_card("8.6")
    built(bundle, precision="fp16", build=HARDWARE)
    for version in ("10.0.1", "10.9.0"):
        machine.has(version)
        with pytest.raises(BackendUnavailable, match="has no TensorRT engine of its fp16"):
            load(bundle)
    machine.has("10.3.0")
    load(bundle)
    forge(bundle, system="linux-sparc")
    with pytest.raises(BackendUnavailable, match="was built on linux-sparc, here is "):
        load(bundle)
    monkeypatch.setattr(trt, "machine", lambda: "sparc")
    with pytest.raises(BackendUnavailable, match="has no TensorRT engine of its fp16"):
        load(bundle)


def test_both(bundle: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.has("10.3.0")
    machine.has_card("8.6")
    built(bundle, precision="fp16", build=BOTH)
    machine.has("10.16.1")
    machine.has_card("9.0")
    with pytest.raises(BackendUnavailable, match=f"set {HOST_CODE}=1"):
        load(bundle)
    monkeypatch.setenv(HOST_CODE, "1")
    assert labels(load(bundle)) == list(COLORS)


def test_version_compatible_needs_volta(bundle: Path, machine: Machine) -> None:
    machine.has("8.6.0")
    machine.has_card("6.1")
    with pytest.raises(BackendUnavailable, match="from Volta on, .*without --version-compatible"):
        built(bundle, precision="fp16", build=VERSIONS)


def test_an_engine_of_its_own_comes_first(bundle: Path, machine: Machine) -> None:
    machine.has("10.3.0")
    machine.has_card("8.6")
    built(bundle, precision="fp16", build=HARDWARE)
    (own,) = built(bundle, precision="fp16")
    assert "hardware compatible" not in repr(load(bundle))
    (bundle / "engines" / own.plan).write_bytes(b"damaged")
    assert ", fp16, hardware compatible, " in repr(load(bundle))


def test_all_that_was_tried_is_said(bundle: Path, machine: Machine) -> None:
    machine.has("10.3.0")
    machine.has_card("8.6")
    for options in (BuildOptions(), HARDWARE):
        (info,) = built(bundle, precision="fp16", build=options)
        (bundle / "engines" / info.plan).unlink()
    with pytest.raises(BackendUnavailable, match="cannot be read.*ampere-plus.*cannot be read"):
        load(bundle)


def test_the_command_says_what_loading_needs(bundle: Path, machine: Machine) -> None:
    machine.has("10.3.0")
    command = ["build", str(bundle), "--precision", "fp16", "--no-text", "--version-compatible"]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0, run.output
    assert f"version compatible: set {HOST_CODE}=1" in run.output
    run = CliRunner().invoke(app, [*command, "--hardware-compatible"])
    assert run.exit_code != 0 and "for Jetson" in str(run.exception)
