"""What `auto` takes on a CPU: measured once, remembered, and said."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COLORS, square

import runtime
from export.cli import main
from runtime import choice as module
from runtime.backends import Encoder
from runtime.bundle import Bundle
from runtime.choice import KIND, Candidate, Choice, choose
from runtime.conditions import free_memory
from runtime.errors import BackendUnavailable, BundleError, UnsupportedFormat
from runtime.manifest import FileEntry
from runtime.on_cpu import open_image_on_cpu
from runtime.ort import OrtEncoder

FAST, SLOW, OTHER = (
    Candidate("openvino", "int8"),
    Candidate("openvino", "fp32"),
    Candidate("a", "b"),
)
FRAME = np.zeros((1, 4, 4, 3), np.uint8)


@dataclass
class Stage:
    """Encoders that take their time on a clock of their own, seconds by candidate."""

    seconds: Mapping[Candidate, float]
    fails: dict[Candidate, Exception] = field(default_factory=dict)
    now: float = 0.0
    runs: dict[Candidate, int] = field(default_factory=dict)
    alive: int = 0
    most_alive: int = 0

    def open(self, candidate: Candidate) -> Encoder:
        if candidate in self.fails:
            raise self.fails[candidate]
        return Actor(self, candidate)

    def choose(self, threads: int | None = None, bytes: int = 10) -> tuple[Choice, str]:
        entries = {
            each: FileEntry(bytes=bytes * (n + 1), sha256=f"{n}" * 64)
            for n, each in enumerate(self.seconds)
        }
        return choose(entries, FRAME, threads, lambda: None, self.open)


class Actor:
    name = "actor"

    def __init__(self, stage: Stage, candidate: Candidate) -> None:
        self.stage, self.candidate = stage, candidate
        stage.alive += 1
        stage.most_alive = max(stage.most_alive, stage.alive)

    def __call__(self, batch: Any) -> Any:
        self.stage.runs[self.candidate] = self.stage.runs.get(self.candidate, 0) + 1
        self.stage.now += self.stage.seconds[self.candidate]

    def __del__(self) -> None:
        self.stage.alive -= 1


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stage]:
    def made(*arguments: Any) -> Stage:
        stage = Stage(*arguments)
        monkeypatch.setattr("runtime.choice.time.perf_counter", lambda: stage.now)
        return stage

    return made


def kept(kind: str = KIND) -> list[Path]:
    return sorted((Path(os.environ["EDGECLIP_CACHE"]) / kind).glob("*"))


def test_the_fastest_first_and_one_open_at_a_time(stage: Callable[..., Stage]) -> None:
    shown = stage({SLOW: 0.03, FAST: 0.01, OTHER: 0.02})
    choice, how = shown.choose()
    assert [one.candidate for one in choice.timed] == [FAST, OTHER, SLOW]
    assert [one.ms for one in choice.timed] == pytest.approx([10, 20, 30])
    assert shown.most_alive == 1 and shown.alive == 0
    assert how.startswith("measured now; remembered in ") and str(kept()[0]) in how
    assert shown.now <= module.SECONDS * 1.2


def test_what_is_remembered_is_not_measured(stage: Callable[..., Stage]) -> None:
    shown = stage({SLOW: 0.03, FAST: 0.01})
    first, _ = shown.choose()
    shown.runs.clear()
    again, how = shown.choose()
    assert again == first and not shown.runs and len(kept()) == 1
    assert how == f"measured before; remembered in {kept()[0]}"


def test_another_bundle_machine_or_number_of_threads_is_measured(
    stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = stage({SLOW: 0.03, FAST: 0.01})
    shown.choose()
    shown.choose(threads=1)
    stage({FAST: 0.01, SLOW: 0.03}).choose()  # the hashes change places
    monkeypatch.setattr("runtime.remembered.usable_cores", lambda: 99)
    shown.choose()
    monkeypatch.setattr("runtime.remembered._version", lambda name: "99.9")
    shown.choose()
    assert len(kept()) == 5


def test_hopeless_ones_end_early_and_slow_ones_run_once(stage: Callable[..., Stage]) -> None:
    shown = stage({FAST: 0.001, SLOW: 0.01})
    shown.choose()
    assert shown.runs == {FAST: module.RUNS, SLOW: 2}
    shown = stage({FAST: 2.0, SLOW: 3.0}, {}, 0.0)
    choice, _ = shown.choose(threads=7)
    assert shown.runs == {FAST: 1, SLOW: 1} and choice.timed[0].candidate == FAST


def test_what_cannot_be_opened_is_named(stage: Callable[..., Stage]) -> None:
    shown = stage({SLOW: 0.03, FAST: 0.01}, {FAST: BackendUnavailable("it crashed")})
    choice, _ = shown.choose()
    assert [one.candidate for one in choice.timed] == [SLOW]
    assert choice.left_out == ("int8 on openvino was left out: it crashed",)
    shown.fails |= {SLOW: UnsupportedFormat("no such operator")}
    with pytest.raises(UnsupportedFormat, match="no such operator"):  # of the first one
        shown.choose(threads=2)


def test_what_failed_is_tried_again_the_next_time(stage: Callable[..., Stage]) -> None:
    shown = stage({SLOW: 0.03, FAST: 0.01}, {FAST: BackendUnavailable("failed on a batch")})
    assert "not remembered: what failed may work" in shown.choose()[1] and not kept()
    shown.fails = {FAST: UnsupportedFormat("no such operator")}  # it never will
    shown.choose()
    assert len(kept()) == 1 and shown.choose()[1].startswith("measured before")


def test_what_did_not_fit_is_tried_when_there_is_room(
    stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = stage({SLOW: 0.03, FAST: 0.01})
    for free, how, taken in ((350, "now", SLOW), (340, "before", SLOW), (999, "now", FAST)):
        monkeypatch.setattr(module, "free_memory", lambda free=free: free << 20)
        choice, said = shown.choose(bytes=100 << 20)
        assert said.startswith(f"measured {how}") and choice.timed[0].candidate == taken
    monkeypatch.setattr(module, "free_memory", lambda: 350 << 20)
    assert shown.choose(bytes=100 << 20)[1].startswith("measured before")


def test_what_may_not_fit_into_memory_is_not_tried(
    stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "free_memory", lambda: 350 << 20)
    shown = stage({SLOW: 0.03, FAST: 0.01})
    choice, _ = shown.choose(bytes=100 << 20)
    assert [one.candidate for one in choice.timed] == [SLOW]
    assert choice.left_out == (
        "int8 on openvino was left out: it may take 600 MiB, and 350 are free",
    )
    monkeypatch.setattr(module, "free_memory", lambda: 0)
    assert shown.choose(threads=2, bytes=100 << 20)[0].timed[0].candidate == SLOW


def test_free_memory_of_a_machine_and_of_a_container(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None
    for name, text in (
        ("proc/meminfo", "MemTotal: 4194304 kB\nMemAvailable: 2097152 kB\n"),
        ("proc/self/status", "VmHWM: 204800 kB\nVmRSS: 102400 kB\n"),
        ("sys/fs/cgroup/memory.max", "max\n"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_memory(tmp_path) == 2048 << 20
    (tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{512 << 20}\n")
    assert free_memory(tmp_path) == 412 << 20


def test_a_cache_that_cannot_be_written(
    stage: Callable[..., Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGECLIP_CACHE", str(tmp_path / "file"))
    shown = stage({SLOW: 0.03, FAST: 0.01})
    for _ in range(2):
        choice, how = shown.choose()
        assert choice.timed[0].candidate == FAST
        assert "not remembered: " in how and "EDGECLIP_CACHE" in how


def test_without_a_home_folder(
    stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("runtime.remembered.cache_folder", homeless)
    assert "not remembered: Could not" in stage({SLOW: 0.03, FAST: 0.01}).choose()[1]


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"\xff", b'{"key": 1, "found": {}}', b'{"found": {"timed": []}}'],
)
def test_a_damaged_memory_is_measured_anew(stage: Callable[..., Stage], content: bytes) -> None:
    shown = stage({SLOW: 0.03, FAST: 0.01})
    first, _ = shown.choose()
    kept()[0].write_bytes(content)
    assert shown.choose() == (first, f"measured now; remembered in {kept()[0]}")


@pytest.mark.parametrize("change", [{"timed": []}, {"timed": [{"backend": "x"}]}, {"timed": 3}])
def test_a_changed_memory_is_measured_anew(stage: Callable[..., Stage], change: Any) -> None:
    shown = stage({SLOW: 0.03, FAST: 0.01})
    first, _ = shown.choose()
    content = json.loads(kept()[0].read_text())
    kept()[0].write_text(json.dumps(content | {"found": change}))
    assert shown.choose()[0] == first


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def found(name: str) -> ModuleSpec | None:
        return None if name in names else find_spec(name)

    monkeypatch.setattr("runtime.on_cpu.find_spec", found)


def change_status(bundle: Path, status: str, *precisions: str) -> None:
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    for name in precisions:
        content["precisions"][name]["status"] = status
    path.write_text(json.dumps(content))


def test_auto_measures_and_says_so(every_precision: Path) -> None:
    classifier = runtime.load(every_precision)
    measured, *others = classifier.notes
    assert measured.startswith(f"auto took {classifier.precision} on {classifier.backend} ")
    assert measured.count(" ms") >= 3 and "measured now; remembered in " in measured
    assert others[-3:] == [
        "fp16 on onnxruntime was left out: it is for GPUs",
        "int8_fp16 on openvino was left out: it is for GPUs",
        "int8_fp16 on onnxruntime was left out: it is for GPUs",
    ]
    assert " here), 3 labels)" in repr(classifier) and "(the fastest of " in repr(classifier)
    again = runtime.load(every_precision)
    assert (again.backend, again.precision) == (classifier.backend, classifier.precision)
    assert "measured before; remembered in " in again.notes[0] and len(kept()) == 1
    assert again.classify(square(COLORS["red"], np.random.default_rng(0))[..., ::-1]).label == "red"


def test_a_named_half_is_kept(every_precision: Path) -> None:
    by_precision = runtime.load(every_precision, precision="fp32")
    assert by_precision.precision == "fp32"
    by_backend = runtime.load(every_precision, backend="onnxruntime")
    assert by_backend.backend == "onnxruntime" and "openvino" not in by_backend.notes[0]
    assert "fp32 on onnxruntime" in by_backend.notes[0]
    assert "int8 on onnxruntime" in by_backend.notes[0]


def test_where_both_are_named_nothing_is_measured(every_precision: Path) -> None:
    for precision in ("fp32", "int8_fp16"):
        classifier = runtime.load(every_precision, backend="onnxruntime", precision=precision)
        assert classifier.notes == () and "fastest" not in repr(classifier)
    assert not kept()


def test_rejected_precisions_are_never_tried(bundle_copy: Path) -> None:
    change_status(bundle_copy, "rejected", "fp16")
    classifier = runtime.load(bundle_copy)
    assert classifier.precision == "fp32" and "fp16" not in " ".join(classifier.notes)
    change_status(bundle_copy, "rejected", "fp32")
    with pytest.raises(BundleError, match="no accepted precision"):
        runtime.load(bundle_copy)


def test_int8_fp16_is_taken_where_it_is_all_there_is(
    every_precision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Bundle(every_precision)
    only = {name: e for name, e in opened.manifest.precisions.items() if name == "int8_fp16"}
    monkeypatch.setattr("runtime.on_cpu.precisions", lambda *_: list(only))
    assert open_image_on_cpu(opened, "onnxruntime", "auto", None).precision == "int8_fp16"


def test_what_is_for_gpus_is_the_last_resort(
    every_precision: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    assert runtime.load(every_precision, precision="fp16").backend == "openvino"
    monkeypatch.setitem(sys.modules, "runtime.vino_bf16", None)
    classifier = runtime.load(every_precision, precision="fp16")
    assert (classifier.backend, classifier.precision) == ("onnxruntime", "fp16")
    assert "fp16 on openvino was left out: OpenVINO is installed, but" in classifier.notes[0]
    with pytest.raises(BackendUnavailable):
        runtime.load(every_precision, backend="openvino", precision="fp16")


def test_a_text_encoder_that_openvino_does_not_load(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vino = pytest.importorskip("runtime.vino")
    check = vino.VinoEncoder._check

    def refuse(self: Any, model: Any) -> None:
        if self._border.name == "tokens":
            raise UnsupportedFormat("text.fp32.onnx does not load in OpenVINO: no such operator")
        check(self, model)

    monkeypatch.setattr(vino.VinoEncoder, "_check", refuse)
    monkeypatch.setattr("runtime.on_cpu._BACKENDS", ("openvino",))
    classifier = runtime.load(bundle, labels=["red", "blue"])
    assert classifier.backend == "openvino" and classifier.labels == ("red", "blue")
    assert "text encoder runs on onnxruntime: text.fp32.onnx does not load" in classifier.notes[-1]
    with pytest.raises(UnsupportedFormat, match="no such operator"):
        runtime.load(bundle, backend="openvino").embed_text(["a new text"])


def test_without_openvino(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "openvino")
    classifier = runtime.load(bundle)
    assert classifier.backend == "onnxruntime" and "openvino" not in " ".join(classifier.notes)
    with pytest.raises(BackendUnavailable, match=r"pip install 'edgeclip\[openvino\]'"):
        runtime.load(bundle, backend="openvino")


def test_without_any_backend(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "openvino", "onnxruntime")
    with pytest.raises(BackendUnavailable, match=r"pip install 'edgeclip\[cpu\]'.*doctor"):
        runtime.load(bundle)


def test_a_library_that_does_not_load(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is noted by auto, and an error where it is named."""
    pytest.importorskip("openvino")
    monkeypatch.setitem(sys.modules, "runtime.vino_bf16", None)
    classifier = runtime.load(bundle)
    assert classifier.backend == "onnxruntime"
    left_out = [note for note in classifier.notes if "on openvino was left out" in note]
    assert left_out and all("installed, but does not load" in note for note in left_out)
    with pytest.raises(BackendUnavailable, match="OpenVINO is installed, but does not load"):
        runtime.load(bundle, backend="openvino", precision="fp32")


def test_what_was_remembered_and_does_not_open_any_more(
    every_precision: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = runtime.load(every_precision, backend="onnxruntime")
    real = OrtEncoder.__init__

    def broken(self: OrtEncoder, path: Path, *rest: Any) -> None:
        if f".{first.precision}." in path.name:
            raise BackendUnavailable("the file is of another release")
        real(self, path, *rest)

    monkeypatch.setattr(OrtEncoder, "__init__", broken)
    second = runtime.load(every_precision, backend="onnxruntime")
    assert second.precision != first.precision
    assert f"{first.precision} on onnxruntime does not open any more" in second.notes[1]


def test_the_command_says_what_auto_took(
    bundle: Path,
    squares: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("openvino")  # or there is nothing to choose from
    picture = str(squares / "red" / "0.png")
    monkeypatch.setattr(sys, "argv", ["edgeclip", "classify", str(bundle), picture, "--json"])
    with pytest.raises(SystemExit):
        main()
    shown, said = capsys.readouterr()
    assert json.loads(shown)["label"] == "red"
    assert said.startswith("edgeclip: Classifier(") and "(the fastest of " in said
