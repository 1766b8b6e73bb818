"""`edgeclip bench`: what is measured, what cannot be, and the machine's state beside it."""

import json
import sys
from pathlib import Path
from typing import Any

import fake_cuda
import numpy as np
import onnxruntime
import pytest
from fake_machine import NEW, Machine, built

from export.cli import main
from runtime import bench as module
from runtime.bench import bench, camera_frame, read_frames
from runtime.conditions import conditions, process_memory
from runtime.errors import BackendUnavailable, BundleError, DataError, FrameError
from runtime.ort import OrtEncoder

FAST: dict[str, Any] = {"seconds": 0.05, "frames": [(camera_frame(64, 48), "bgr")]}
STAGES = {"preprocess", "encode", "head", "total"}


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that has one, too."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setitem(sys.modules, "tensorrt", None)


def test_every_accepted_precision_takes_its_turns(bundle: Path) -> None:
    told: list[str] = []
    rows = bench(bundle, backend="onnxruntime", precision="all", tell=told.append, **FAST)
    assert [row.precision for row in rows] == ["fp32", "fp16"]
    for row in rows:
        assert not row.error and row.backend == "onnxruntime" and row.precision in row.runs
        assert set(row.stages) == STAGES and row.frames >= module.TURNS
        assert all(0 <= ms.p50 <= ms.p90 <= ms.p99 for ms in row.stages.values())
        assert row.stages["total"].p50 >= row.stages["encode"].p50
        assert row.load_ms > 0 and row.first_ms > 0 and row.gpu_growth_mib is None
        mean = 1e3 / row.frames_per_second
        assert row.stages["total"].p50 / 20 < mean < row.stages["total"].p99 * 20
    assert told[:2] == ["Loading onnxruntime, fp32", "Loading onnxruntime, fp16"]
    assert len(told) == 2 + module.TURNS


def test_of_all_what_cannot_run_is_a_row(bundle: Path, no_gpu: None) -> None:
    rows = bench(bundle, backend="all", precision="fp32", **FAST)
    errors = {row.backend: row.error for row in rows}
    assert list(errors) == ["onnxruntime", "openvino", "tensorrt", "ort-cuda", "ort-tensorrt"]
    assert errors.pop("onnxruntime") == errors.pop("openvino") == "" and all(errors.values())
    assert "onnxruntime-gpu" in errors["ort-cuda"]


@pytest.mark.parametrize("precision", ["auto", "all", "fp32"])
def test_what_was_named_raises(bundle: Path, no_gpu: None, precision: str) -> None:
    with pytest.raises(BackendUnavailable, match="has no CUDAExecutionProvider"):
        bench(bundle, backend="ort-cuda", precision=precision, **FAST)


def test_names_that_do_not_exist(bundle: Path) -> None:
    with pytest.raises(BundleError, match="no precision 'int3'; it has: fp32"):
        bench(bundle, backend="all", precision="int3", **FAST)
    with pytest.raises(BackendUnavailable, match="no backend 'tpu'"):
        bench(bundle, backend="tpu", **FAST)


@pytest.mark.skipif(fake_cuda.COMPILER is None, reason="no C compiler for the stub of CUDA")
def test_an_engine_tells_the_times_on_the_gpu(
    bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = fake_cuda.compile_stub(tmp_path)
    Machine(monkeypatch, library, tmp_path / "package").has(NEW)
    built(bundle_copy, precision="fp16")
    missing, row = bench(bundle_copy, backend="tensorrt", precision="all", **FAST)
    assert missing.precision == "fp32" and "edgeclip build" in missing.error
    assert row.backend == "tensorrt" and "CUDA graph" in row.runs
    assert set(row.stages) == STAGES | {"GPU upload", "GPU engine", "GPU download"}
    assert row.stages["GPU engine"].p99 >= 0 and row.gpu_growth_mib is not None
    (auto,) = bench(bundle_copy, **FAST)
    assert (auto.backend, auto.precision, auto.notes) == ("tensorrt", "fp16", ())


def test_a_backend_that_fails_in_mid_run(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = OrtEncoder.__call__, []

    def failing(self: OrtEncoder, batch: Any) -> Any:
        calls.append(self)
        if len(calls) > 8 and self is calls[0]:
            raise BackendUnavailable("the GPU is lost")
        return real(self, batch)

    monkeypatch.setattr(OrtEncoder, "__call__", failing)
    lost, other = bench(bundle, backend="onnxruntime", precision="all", **FAST)
    assert lost.error == "the GPU is lost" and lost.load_ms > 0
    assert not other.error and other.frames >= module.TURNS
    calls.clear()
    with pytest.raises(BackendUnavailable, match="the GPU is lost"):
        bench(bundle, backend="onnxruntime", precision="fp32", **FAST)


def test_a_bundle_without_prompts(bundle_copy: Path) -> None:
    manifest = bundle_copy / "manifest.json"
    text = manifest.read_text().replace('"default": "prompts/default.safetensors"', "")
    manifest.write_text(text)
    (row,) = bench(bundle_copy, precision="fp32", **FAST)
    assert f"{module.LABELS} labels" in row.runs


def test_the_made_frame() -> None:
    frame = camera_frame()
    assert frame.shape == (1080, 1920, 3) and frame.dtype == np.uint8
    np.testing.assert_array_equal(frame, camera_frame())
    assert frame.std() > 20 and (camera_frame(seed=1) != frame).any()
    assert camera_frame(1, 1).shape == (1, 1, 3)
    for size in ((0, 5), (20_000, 20_000)):
        with pytest.raises(DataError, match="at most 100,000,000"):
            camera_frame(*size)


def test_frames_of_the_user(squares: Path) -> None:
    frames = read_frames([squares])
    assert len(frames) == module.MOST_FRAMES and frames[0][1] == "rgb"
    with pytest.raises(FrameError, match="no file or folder"):
        read_frames([squares / "no.png"])


def lay(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def test_conditions_of_a_jetson(tmp_path: Path) -> None:
    """Files after NVIDIA's documentation, not taken from a device."""
    root = lay(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 7800000 kB\nMemAvailable: 5242880 kB\nSwapTotal: 0 kB\n",
            "proc/loadavg": "1.50 1.20 0.90 2/345 6789\n",
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
            "sys/class/thermal/thermal_zone0/temp": "48500\n",
            "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
            "sys/class/thermal/thermal_zone1/temp": "-256000\n",
            "sys/class/devfreq/17000000.gpu/cur_freq": "624750000\n",
            "sys/class/devfreq/15340000.vic/cur_freq": "729600000\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "729600\n",
            "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "1510400\n",
        },
    )
    prints = {"nvpmodel": "NV Power Mode: 15W\n0\n", "nvidia-smi": "[N/A], [N/A]\n"}
    found = conditions(root, lambda *command: prints[command[0]])
    assert found.power_mode == "15W" and found.governor == "schedutil"
    assert (found.cpu_mhz, found.gpu_mhz) == (1510, 624)
    assert found.celsius == {"cpu-thermal": 48.5} and found.available_mib == 5120
    assert found.busy == 1.5 and "power mode 15W" in str(found) and "48 °C" in str(found)


def test_conditions_of_a_pc_with_a_gpu_and_of_nothing(tmp_path: Path) -> None:
    found = conditions(tmp_path, lambda *command: "1980, 41\n" if "smi" in command[0] else "")
    assert found.gpu_mhz == 1980 and found.celsius == {"GPU": 41.0}
    for said in ("", "no devices were found\n", "1, 2, 3\n", "x, y\n"):
        empty = conditions(tmp_path, lambda *command, said=said: said)
        assert (empty.gpu_mhz, empty.celsius, empty.power_mode) == (None, {}, "")
        assert str(empty).endswith("cores")
    assert process_memory(tmp_path) is None


def test_memory_of_this_process() -> None:
    memory = process_memory()
    if memory is None:
        pytest.skip("this system has no /proc")
    assert 10 < memory[0] <= memory[1]


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `edgeclip bench`."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["edgeclip", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        main()
    return int(exit.value.code or 0), *capsys.readouterr()


def test_the_command(
    bundle: Path,
    squares: Path,
    tmp_path: Path,
    no_gpu: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, fast = tmp_path / "out", ("--seconds", 0.1, "--size", "64x48")
    every = (bundle, "--backend", "all", "--precision", "all")
    code, shown, said = run(capsys, monkeypatch, *every, *fast, "--out", out)
    assert code == 0, said
    assert "preprocess" in shown and "ort-cuda, fp32, fp16: the ONNX Runtime here" in shown
    assert "before: " in shown and "after: " in shown
    assert max(map(len, shown.partition("Its stages")[0].splitlines())) <= 80
    kept = json.loads((out / "bench.json").read_text())
    assert len(kept["rows"]) == 10 and kept["frames"]["first_shape"] == [48, 64, 3]
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    code, shown, _ = run(
        capsys, monkeypatch, bundle, "--seconds", 0.1, "--frames", squares, "--json"
    )
    report = json.loads(shown)
    assert code == 0 and report["frames"]["number"] == module.MOST_FRAMES
    assert report["rows"][0]["stages"]["total"]["p50"] > 0 and "celsius" in report["before"]
    code, shown, said = run(capsys, monkeypatch, bundle, "--out", out)
    assert code == 2 and shown == "" and "exists already" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--backend", "ort-cuda"), "onnxruntime-gpu"),
        (("--backend", "tpu"), "no backend 'tpu'"),
        (("--precision", "int3"), "no precision 'int3'"),
        (("--size", "big"), "--size big is no size"),
        (("--size", "0x5"), "a frame of 0 x 5 pixels"),
        (("--size", "64x48", "--frames", "."), "not both"),
        (("--frames", "no-such.png"), "no file or folder no-such.png"),
    ],
)
def test_errors_are_one_line(
    bundle: Path,
    no_gpu: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    code, shown, errors = run(capsys, monkeypatch, bundle, *arguments)
    assert code == 2 and shown == "" and said in errors
    assert len([line for line in errors.splitlines() if line.startswith("edgeclip: ")]) == 1


def test_without_matplotlib(
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, said = run(capsys, monkeypatch, bundle, "--out", tmp_path / "out")
    assert code == 2 and "pip install 'edgeclip[calibration]'" in said
    assert not (tmp_path / "out").exists()


def test_help_has_an_example(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Example: edgeclip bench" in run(capsys, monkeypatch, "--help")[1]
