"""`edgeclip doctor`, on machines written after NVIDIA's documentation (not taken from devices; see
machines.py), on files that are not what they should be, and on this very machine.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import (
    AGX_ORIN,
    CPU,
    CUDA,
    DESKTOP,
    ORIN_JP5,
    ORIN_NANO,
    RASPBERRY,
    TENSORRT,
    THOR,
    XAVIER,
    Machine,
    onnxruntime,
    tegra,
)

from runtime import board, probes
from runtime.doctor import Report, examine
from runtime.findings import Item
from runtime.machine import Interpreter
from runtime.probes import Answer, ask
from runtime.verdicts import Verdict

BACKENDS = ("onnxruntime", "openvino", "tensorrt", "ort-cuda", "ort-tensorrt")
ALL = {
    "orin-nano": ORIN_NANO, "agx-orin": AGX_ORIN, "thor": THOR, "xavier": XAVIER,
    "orin-jp5": ORIN_JP5, "desktop": DESKTOP, "raspberry": RASPBERRY,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_library_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)


def look(machine: Machine, root: Path) -> Report:
    return examine(**machine.lay(root))


def item(report: Report, name: str) -> Item:
    (found,) = [item for item in report.items if item.name == name]
    return found


def backend(report: Report, name: str) -> Verdict:
    (found,) = [verdict for verdict in report.backends if verdict.backend == name]
    return found


def works(report: Report) -> set[str]:
    return {verdict.backend for verdict in report.backends if verdict.works}


def test_orin_nano_whose_venv_hides_tensorrt(tmp_path: Path) -> None:
    report = look(ORIN_NANO, tmp_path)
    assert report.kind == "jetson"
    assert item(report, "board").found.endswith("Developer Kit Super")
    assert item(report, "JetPack").found == "JetPack 6.2 (L4T 36.4.3)"
    assert "TensorRT 10.3, CUDA 12.6, Python 3.10" in item(report, "JetPack").means
    assert item(report, "power mode") == Item(
        "power mode", "warning", "15W",
        "it limits the clocks; MAXN_SUPER does not, if cooling and power supply allow",
        "sudo nvpmodel -m 2",
    )  # fmt: skip
    assert item(report, "CPU").found == "Cortex-A78AE, 6 logical cores, dotprod"
    assert item(report, "memory").found == "7.4 GiB, 5.1 available, swap 3.7"
    assert item(report, "GPU").found == "Orin (nvgpu), compute capability 8.7"
    assert item(report, "driver").found == "540.4.0 for CUDA up to 12.6"
    assert item(report, "CUDA toolkit").found == "12.6.68"
    tensorrt = item(report, "TensorRT")
    assert (tensorrt.status, tensorrt.found) == ("warning", "10.3.0 on the system")
    assert tensorrt.mend == "/usr/bin/python3 -m venv --system-site-packages /home/me/env"
    assert works(report) == {"onnxruntime"}
    assert backend(report, "tensorrt").mend == tensorrt.mend
    assert "jp6/cu126 onnxruntime-gpu" in backend(report, "ort-cuda").mend
    assert "uninstall --yes onnxruntime &&" in backend(report, "ort-cuda").mend
    camera = item(report, "OpenCV")
    assert camera.status == "warning" and "uninstall --yes opencv-python-headless" in camera.mend


def test_agx_orin_of_jetpack_6_0(tmp_path: Path) -> None:
    report = look(AGX_ORIN, tmp_path)
    assert item(report, "JetPack").found == "JetPack 6.0 (L4T 36.3.0)"
    assert item(report, "power mode").status == "ok"
    assert "not int8_fp16" in item(report, "TensorRT").means
    assert item(report, "OpenCV").found == "4.8.0 with GStreamer"
    assert works(report) == {"onnxruntime", "tensorrt"}
    assert backend(report, "tensorrt").because == "TensorRT 8.6.2 on Orin"


def test_thor_of_jetpack_7_2(tmp_path: Path) -> None:
    report = look(THOR, tmp_path)
    assert item(report, "JetPack").found == "JetPack 7.2 (L4T 39.2.0)"
    assert item(report, "CPU").found.endswith("dotprod, i8mm")
    assert item(report, "CUDA bindings").found == "cuda-bindings, ctypes"
    assert works(report) == {"onnxruntime", "tensorrt"}
    cuda = backend(report, "ort-cuda")
    assert "no kernel image" in cuda.because and cuda.mend == "use the backend tensorrt"


def test_jetpack_5_is_too_old_and_the_way_out_depends_on_the_board(tmp_path: Path) -> None:
    xavier, orin = look(XAVIER, tmp_path / "1"), look(ORIN_JP5, tmp_path / "2")
    for report in (xavier, orin):
        verdict = backend(report, "tensorrt")
        assert not verdict.works and "8.5.2 is too old, 8.6 is the oldest" in verdict.because
        assert item(report, "JetPack").found == "JetPack 5.1 (L4T 35.2.1)"
        assert item(report, "JetPack").status == item(report, "TensorRT").status == "warning"
    assert "flash JetPack 6.2" in backend(orin, "tensorrt").mend
    assert "no JetPack with TensorRT 8.6 supports" in backend(xavier, "tensorrt").mend
    assert item(xavier, "CPU").found == "Carmel, 8 logical cores"
    assert item(xavier, "Python").status == "ok"  # seeing the system's would not help
    assert item(xavier, "OpenCV").mend.endswith("pip install opencv-python-headless")
    assert backend(orin, "ort-cuda").mend == "use the backend onnxruntime"
    assert item(xavier, "power mode").mend == "sudo nvpmodel -m 0"
    assert "mkswap" in item(xavier, "memory").mend


def test_desktop_with_both_onnxruntimes(tmp_path: Path) -> None:
    report = look(DESKTOP, tmp_path)
    assert report.kind == "gpu"
    found = item(report, "GPU").found
    assert found == "NVIDIA GeForce RTX 4070, compute capability 8.9, 12282 MiB"
    assert item(report, "driver").found == "580.95.05 for CUDA up to 13.0"
    clash = item(report, "ONNX Runtime")
    assert clash.status == "warning" and "keep one" in clash.means
    assert "uninstall --yes onnxruntime onnxruntime-gpu && " in clash.mend
    assert works(report) == {"onnxruntime", "openvino", "tensorrt", "ort-cuda"}
    assert backend(report, "ort-tensorrt").mend.endswith("pip install 'tensorrt>=10,<11'")


def test_a_board_without_a_gpu(tmp_path: Path) -> None:
    report = look(RASPBERRY, tmp_path)
    assert report.kind == "cpu" and works(report) == {"onnxruntime"}
    assert item(report, "CPU").found == "Cortex-A72, 4 logical cores"
    assert "hardly time" in item(report, "CPU").means
    assert item(report, "GPU").status == item(report, "OpenCV").status == "missing"
    assert all("no NVIDIA GPU" in backend(report, name).because for name in BACKENDS[2:])


@pytest.mark.parametrize(
    ("release", "command"),
    [
        ("ID=ubuntu\n", "ubuntu-drivers install"),
        ('ID="debian"', "nvidia-driver"),
        ("", "nvidia.com/drivers"),
    ],
)
def test_a_gpu_without_a_driver(tmp_path: Path, release: str, command: str) -> None:
    files = {k: v for k, v in DESKTOP.files.items() if "driver" not in k}
    report = look(Machine({**files, "etc/os-release": release}), tmp_path)
    assert item(report, "GPU").status == "warning" and command in item(report, "GPU").mend
    assert command in backend(report, "tensorrt").mend


def test_a_container_without_the_host(tmp_path: Path) -> None:
    model = "proc/device-tree/model"
    files = {model: ORIN_NANO.files[model], ".dockerenv": ""}
    report = look(Machine(files), tmp_path)
    assert report.kind == "jetson"
    assert "-v /etc/nv_tegra_release" in item(report, "JetPack").mend
    assert item(report, "GPU").mend == "docker run --runtime nvidia ..."


def python_of(version: str, base: str, sees: bool) -> Interpreter:
    return Interpreter(version, "/home/me/env/bin/python", "/home/me/env", base, sees)


@pytest.mark.parametrize(
    ("python", "dropped", "command"),
    [
        (python_of("3.10", "/usr", False), "", "--system-site-packages /home/me/env"),
        (python_of("3.12", "/opt/python", False), "", "--system-site-packages ~/edgeclip-venv"),
        (python_of("3.10", "/usr", True), "", "--reinstall python3-libnvinfer"),
        (python_of("3.10", "/usr", True), "dist-packages", "install python3-libnvinfer"),
        (python_of("3.10", "/usr", True), "nvinfer", "install nvidia-jetpack"),
    ],
)
def test_the_command_that_brings_tensorrt(
    tmp_path: Path, python: Interpreter, dropped: str, command: str
) -> None:
    files = {k: v for k, v in ORIN_NANO.files.items() if not dropped or dropped not in k}
    report = look(replace(ORIN_NANO, files=files, python=python), tmp_path)
    assert command in backend(report, "tensorrt").mend
    assert command in item(report, "TensorRT").mend


@pytest.mark.parametrize(
    ("question", "answer", "because"),
    [
        (("tensorrt",), Answer({"version": "8.6.2", "builds": "TypeError: nullptr"}), "nullptr"),
        (("tensorrt",), Answer(error="its process crashed (signal 11)"), "signal 11"),
        (("gpu",), Answer(error="cuInit fails with CUDA error 999"), "999"),
        (("cuda", "pycuda"), Answer(error="pycuda cannot be used"), "no CUDA binding works"),
    ],
)
def test_why_tensorrt_will_not_work(
    tmp_path: Path, question: tuple[str, ...], answer: Answer, because: str
) -> None:
    report = look(replace(AGX_ORIN, answers={**AGX_ORIN.answers, question: answer}), tmp_path)
    assert because in backend(report, "tensorrt").because
    assert "tensorrt" not in works(report)


@pytest.mark.parametrize("name", ALL)
def test_every_warning_and_every_no_says_why(tmp_path: Path, name: str) -> None:
    report = look(ALL[name], tmp_path)
    assert [v.backend for v in report.backends] == list(BACKENDS)
    for row in report.items:
        assert row.found and (row.status == "ok" or row.means), row
    assert all(verdict.because for verdict in report.backends)


@pytest.mark.parametrize("garbage", ["", "\x00", "# R", "R36 (release)", "\x1b[2J" * 9, "9" * 5000])
@pytest.mark.parametrize("name", ["orin-nano", "desktop"])
def test_garbage_in_every_file(tmp_path: Path, name: str, garbage: str) -> None:
    machine = ALL[name]
    files: dict[str, str | bytes] = dict.fromkeys(machine.files, garbage)
    prints = dict.fromkeys(machine.prints, garbage)
    report = look(Machine(files, prints), tmp_path)
    assert "\x1b" not in str(report.as_dict()) and works(report) == set()


@pytest.mark.parametrize("name", ALL)
def test_truncated_files_and_bytes_that_are_not_utf8(tmp_path: Path, name: str) -> None:
    for parts in (2, 3, 7):
        files: dict[str, str | bytes] = {}
        for path, content in ALL[name].files.items():
            whole = content.encode() if isinstance(content, str) else content
            files[path] = whole[: len(whole) // parts] + b"\xff\xfe\xc3"
        assert look(replace(ALL[name], files=files), tmp_path / str(parts)).items


def test_folders_where_files_should_be(tmp_path: Path) -> None:
    for path in ORIN_NANO.files:
        (tmp_path / path).mkdir(parents=True)
    assert look(Machine({}), tmp_path).items


@given(st.text(max_size=300))
def test_no_text_makes_a_parser_raise(text: str) -> None:
    for parser in (
        board.l4t_release, board.release_of, board.device_tree_text, board.memory, board.cpu,
        board.driver_version, board.gpus, board.toolkit_version, board.library_version,
        board.system_id,
    ):  # fmt: skip
        parser(text)
    board.power_mode(text, text)
    board.packages(text, {"bash"})
    board.jetpack(board.release_of(text))


@pytest.mark.parametrize(
    ("release", "version"),
    [
        ("32.7.1", "4"), ("35.2.1", "5.1"), ("36.2.0", "6.0 DP"), ("36.3.0", "6.0"),
        ("36.4.0", "6.1"), ("36.4.3", "6.2"), ("36.4.7", "6.2.1"), ("36.5.0", "6.2.2"),
        ("38.2.1", "7.0"), ("38.4.0", "7.1"), ("39.2.0", "7.2"), ("39.2.1", "7.2.1"),
    ],
)  # fmt: skip
def test_the_jetpack_of_a_release(release: str, version: str) -> None:
    found = board.jetpack(board.l4t_release(tegra(release)))
    assert found is not None and found.version == version


def test_a_release_that_is_not_known_yet(tmp_path: Path) -> None:
    assert board.jetpack(()) is None and board.jetpack((41, 1)) is None
    files = {**ORIN_NANO.files, "etc/nv_tegra_release": tegra("41.1.0"), "var/lib/dpkg/status": ""}
    report = look(replace(ORIN_NANO, files=files), tmp_path)
    assert item(report, "JetPack").status == "warning"


def test_only_installed_packages_count() -> None:
    text = "Package: a\nStatus: deinstall ok config-files\nVersion: 1\n\n" \
        "Package: b\nStatus: install ok installed\nVersion: 2-1\n"  # fmt: skip
    assert board.packages(text, {"a", "b", "c"}) == {"b": "2-1"}


def fake(folder: Path, name: str, code: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(code)


ORT = """
import os, time
__version__ = "9.9"
SessionOptions = lambda: type("Options", (), {{"add_session_config_entry": lambda *_: None}})()
get_available_providers = lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
def InferenceSession(*_, providers):
    print("libraries print what they like")
    {does}
"""


@pytest.mark.parametrize(
    ("does", "error"),
    [
        ("os.kill(os.getpid(), 11)", "crashed (signal 11)"),
        ("os._exit(3)", "crashed (exit code 3)"),
        ("time.sleep(60)", "did not answer within 3 seconds"),
        ("raise ValueError('no GPU')", "ValueError: no GPU"),
        ("return type('S', (), {'get_providers': lambda _: ['CPU']})()", "runs on ['CPU'] instead"),
    ],
)
def test_a_provider_that_fails_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, error: str
) -> None:
    fake(tmp_path / "fake", "onnxruntime", ORT.format(does=does))
    monkeypatch.syspath_prepend(tmp_path / "fake")
    answer = ask("provider", CUDA, seconds=3 if "sleep" in does else 60)
    assert error in answer.error and not answer.ok


def test_the_library_that_is_missing_says_more_than_the_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "Failed to load libcublasLt.so.13: cannot open shared object file: No such file"
    code = f"import sys; print({said!r}, file=sys.stderr); raise RuntimeError('fallback is off')"
    fake(tmp_path / "fake", "onnxruntime", ORT.format(does=code))
    monkeypatch.syspath_prepend(tmp_path / "fake")
    assert ask("provider", CUDA).error.startswith("libcublasLt.so.13: cannot open")


def test_onnxruntime_really_runs_here() -> None:
    answer = ask("onnxruntime")
    assert CPU in answer.value["providers"] and "onnxruntime" in answer.value["packages"]
    assert ask("provider", CPU) == Answer()
    assert not ask("provider", TENSORRT).ok


def test_the_tiny_model_is_sound() -> None:
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(onnx.load_from_string(probes.RELU))


def test_without_any_optional_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cv2", "onnxruntime", "tensorrt", "openvino", "torch", "onnx", "pycuda", "cuda"):
        code = f"raise ModuleNotFoundError('No module named {name}', name={name!r})"
        fake(tmp_path / "blocked", name, code)
    monkeypatch.syspath_prepend(tmp_path / "blocked")
    report = examine()
    assert works(report) == set()
    for name in ("TensorRT", "ONNX Runtime", "OpenVINO", "OpenCV"):
        assert (item(report, name).status, item(report, name).found) == ("missing", "not installed")
    assert backend(report, "onnxruntime").mend.endswith("pip install 'edgeclip[cpu]'")


def test_a_bundle_and_a_damaged_one(tmp_path: Path, bundle_copy: Path) -> None:
    arguments: dict[str, Any] = RASPBERRY.lay(tmp_path / "root")
    found = item(examine(bundle_copy, **arguments), "bundle")
    assert found.status == "ok" and "fp32 (accepted)" in found.means
    (bundle_copy / "image.fp32.onnx").write_bytes(b"")
    damaged = item(examine(bundle_copy, **arguments), "bundle")
    assert damaged.status == "warning" and "copy the bundle again" in damaged.means
    gone = item(examine(tmp_path / "no", **arguments), "bundle")
    assert gone.status == "missing" and "no bundle folder" in gone.means


def edgeclip(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "edgeclip"), *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == code, run.stderr
    return run


def test_the_command(tmp_path: Path) -> None:
    found = json.loads(edgeclip("doctor", tmp_path / "no", "--json").stdout)
    assert set(found) == {"kind", "items", "backends"}
    assert {"name", "status", "found", "means", "mend"} == set(found["items"][0])
    assert [row["backend"] for row in found["backends"]] == list(BACKENDS)
    assert found["backends"][0]["works"] and found["items"][-1]["name"] == "bundle"
    run = edgeclip("doctor")
    assert "yes      onnxruntime: ONNX Runtime" in run.stdout
    assert f"{os.cpu_count()} logical cores" in run.stdout and run.stderr == ""
    assert max(map(len, run.stdout.splitlines())) < 1000


def test_help_and_wrong_arguments() -> None:
    assert "Example: edgeclip doctor" in edgeclip("doctor", "--help").stdout
    edgeclip("doctor", "--no-such-option", code=2)
    edgeclip("doctor", "one", "two", code=2)


def test_a_long_command_is_one_line_when_piped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = look(DESKTOP, tmp_path)
    monkeypatch.setattr("runtime.doctor.examine", lambda _: report)
    from runtime.doctor import doctor

    doctor(None, False)
    assert item(report, "ONNX Runtime").mend in capsys.readouterr().out


def test_one_onnxruntime_is_no_clash(tmp_path: Path) -> None:
    answers = {**DESKTOP.answers, ("onnxruntime",): onnxruntime(CPU, onnxruntime="1.31.1")}
    report = look(replace(DESKTOP, answers=answers), tmp_path)
    assert item(report, "ONNX Runtime").status == "ok"
    assert "has no CUDAExecutionProvider" in backend(report, "ort-cuda").because
    assert "uninstall --yes onnxruntime &&" in backend(report, "ort-cuda").mend
