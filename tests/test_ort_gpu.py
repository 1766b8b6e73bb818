"""ONNX Runtime on a GPU: what is asked of it, and that nothing less is taken for a success."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from conftest import COLORS, square

import runtime
from runtime import ort_gpu
from runtime.backends import ON_CPU
from runtime.errors import BackendUnavailable
from runtime.ort_gpu import CUDA, PROVIDERS, TENSORRT, tensorrt_options
from runtime.probes import Answer, ask

CPU = "CPUExecutionProvider"
Real = onnxruntime.InferenceSession


class Part:
    def __init__(self, ep_name: str, nodes: int) -> None:
        self.ep_name, self.nodes = ep_name, nodes

    def get_nodes(self) -> list[int]:
        return list(range(self.nodes))


class Fake:
    """ONNX Runtime with the GPU's providers, over the CPU: what it is asked for is in `asked`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[dict[str, Any]] = []
        self.loads = {TENSORRT, CUDA}
        self.fails = ""
        fake = self

        class Session:
            def __init__(self, path: str, options: Any, **asked: Any) -> None:
                fake.asked.append({"path": Path(path).name, **asked})
                if fake.fails == "creation":
                    raise RuntimeError("CUDA failure 999:\n unknown error")
                names = [p if isinstance(p, str) else p[0] for p in asked["providers"]]
                self.providers = [*(name for name in names if name in fake.loads), CPU]
                self.real = Real(path, options, providers=[CPU])

            def run(self, *arguments: Any) -> Any:
                if fake.fails == "run":
                    raise RuntimeError("no kernel image is available for execution on the device")
                return self.real.run(*arguments)

            def get_providers(self) -> list[str]:
                return self.providers

            def get_inputs(self) -> Any:
                return self.real.get_inputs()

            def get_outputs(self) -> Any:
                return self.real.get_outputs()

            def get_provider_graph_assignment_info(self) -> list[Part]:
                return [Part(self.providers[0], 200), Part(CPU, 4)]

        monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
        self.answer(Answer())
        self._patch = monkeypatch

    def answer(self, answer: Answer) -> None:
        """What the process says that tries the provider again."""
        self.said = answer

    def options(self) -> list[Any]:
        """The providers of each session."""
        return [asked["providers"] for asked in self.asked]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    found = Fake(monkeypatch)
    monkeypatch.setattr("runtime.probes.ask", lambda *_: found.said)
    return found


@pytest.mark.parametrize("backend", PROVIDERS)
def test_without_the_gpu_package(bundle: Path, backend: str) -> None:
    if PROVIDERS[backend] in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    with pytest.raises(BackendUnavailable) as raised:
        runtime.load(bundle, backend=backend)
    message = str(raised.value)
    assert f"has no {PROVIDERS[backend]}" in message and "onnxruntime-gpu[cuda,cudnn]" in message
    assert "CUDA 13 and cuDNN 9" in message and "uninstall --yes onnxruntime" in message
    assert ("tensorrt>=10,<11" in message) is (backend == "ort-tensorrt")


def test_on_cuda(bundle: Path, fake: Fake) -> None:
    classifier = runtime.load(bundle, backend="ort-cuda", precision="fp32")
    assert fake.options() == [[CUDA]] and fake.asked[0]["enable_fallback"] == 0
    assert "fp32 on onnxruntime" in repr(classifier) and "CUDA, 4 nodes elsewhere" in repr(
        classifier
    )
    frame = square(COLORS["red"], np.random.default_rng(0))[..., ::-1]
    prediction = classifier.classify(frame)
    assert prediction.backend == "ort-cuda" and prediction.label == "red"
    assert not (bundle / "engines").exists()


def test_on_tensorrt(bundle_copy: Path, fake: Fake) -> None:
    """Its engines are kept by the encoder's hash: its own names do not tell weights apart."""
    classifier = runtime.load(bundle_copy, backend="ort-tensorrt", precision="fp32")
    (((name, options), second),) = fake.options()
    assert (name, second) == (TENSORRT, CUDA) and "TensorRT" in repr(classifier)
    folder = Path(options["trt_engine_cache_path"])
    hash = classifier.bundle.manifest.files["image.fp32.onnx"].sha256
    assert folder.is_dir() and folder == (bundle_copy / "engines" / "ort" / hash[:16]).resolve()
    assert options["trt_engine_cache_enable"] is True
    assert options["trt_timing_cache_path"] == str(folder)
    classifier.set_labels(["red", "blue"])
    assert fake.asked[-1]["path"] == "text.fp32.onnx" and fake.options()[-1] == [CUDA]


@pytest.mark.parametrize(
    ("precision", "flags"),
    [
        ("fp32", set()),
        ("fp16", {"trt_fp16_enable"}),
        ("int8", {"trt_int8_enable"}),
        ("int8_fp16", {"trt_int8_enable", "trt_fp16_enable"}),
    ],
)
def test_flags_are_those_of_the_file(tmp_path: Path, precision: str, flags: set[str]) -> None:
    options = tensorrt_options(tmp_path, precision)
    types = {name for name in options if name.startswith(("trt_fp", "trt_int", "trt_bf"))}
    assert types == flags and all(options[name] is True for name in flags)


def test_auto_takes_fp16_where_it_was_accepted(bundle_copy: Path, fake: Fake) -> None:
    classifier = runtime.load(bundle_copy, backend="ort-cuda")
    assert classifier.bundle.manifest.precisions["fp16"].status == "accepted"
    assert classifier.precision == "fp16"
    manifest = bundle_copy / "manifest.json"
    before, fp16, after = manifest.read_text().partition('"fp16": {')
    manifest.write_text(before + fp16 + after.replace('"accepted"', '"rejected"', 1))
    assert runtime.load(bundle_copy, backend="ort-cuda").precision == "fp32"


def test_auto_does_not_take_these_backends(bundle: Path, fake: Fake) -> None:
    assert runtime.load(bundle).backend in ON_CPU


@pytest.mark.parametrize(
    ("backend", "loads", "answer", "said"),
    [
        ("ort-cuda", set(), Answer(error="libcudnn.so.9: cannot open"), "load: libcudnn.so.9: can"),
        ("ort-cuda", set(), Answer(), f"{CUDA} does not load: ONNX Runtime took {CPU} instead"),
        ("ort-tensorrt", {CUDA}, Answer(), f"does not load: ONNX Runtime took {CUDA} instead"),
    ],
)
def test_a_provider_that_is_not_taken(
    bundle_copy: Path, fake: Fake, backend: str, loads: set[str], answer: Answer, said: str
) -> None:
    fake.loads = loads
    fake.answer(answer)
    with pytest.raises(BackendUnavailable, match=said) as raised:
        runtime.load(bundle_copy, backend=backend)
    assert "uninstall" not in str(raised.value)  # the right package is there


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ("creation", f"{CUDA} fails: CUDA failure 999: unknown error; pip install"),
        ("run", "failed on a batch: no kernel image is available .* pip install"),
    ],
)
def test_what_fails_fails_when_it_is_loaded(
    bundle: Path, fake: Fake, fails: str, said: str
) -> None:
    fake.fails = fails
    with pytest.raises(BackendUnavailable, match=said):
        runtime.load(bundle, backend="ort-cuda")


def test_a_failure_later_does_not_move_to_the_cpu(bundle: Path, fake: Fake) -> None:
    classifier = runtime.load(bundle, backend="ort-cuda")
    fake.fails = "run"
    with pytest.raises(BackendUnavailable, match="ONNX Runtime failed on a batch"):
        classifier.classify(np.zeros((40, 50, 3), np.uint8))


def test_a_jetson_is_shown_to_tensorrt(
    bundle: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_gpu, "TEGRA", bundle / "manifest.json")
    fake.fails = "run"
    with pytest.raises(BackendUnavailable, match="on a Jetson use the backend tensorrt"):
        runtime.load(bundle, backend="ort-cuda")


def test_a_bundle_that_cannot_be_written(bundle_copy: Path, fake: Fake) -> None:
    (bundle_copy / "engines").write_text("a file")
    with pytest.raises(BackendUnavailable, match="cannot be made.*or use the backend ort-cuda"):
        runtime.load(bundle_copy, backend="ort-tensorrt")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", PROVIDERS)
def test_on_a_real_gpu(bundle_copy: Path, backend: str) -> None:
    tried = ask("provider", PROVIDERS[backend])
    if not tried.ok:
        pytest.skip(f"{PROVIDERS[backend]}: {tried.why()}")
    exact = runtime.load(bundle_copy, backend="onnxruntime", precision="fp32")
    rng = np.random.default_rng(5)
    frames = [square(color, rng)[..., ::-1] for color in COLORS.values()]
    for precision in ("fp32", "fp16"):
        classifier = runtime.load(bundle_copy, backend=backend, precision=precision)
        assert [p.label for p in classifier.classify_batch(frames)] == list(COLORS)
        for frame in frames:
            assert classifier.embed(frame) @ exact.embed(frame) > 0.999
        classifier.set_labels(["red", "blue"])
        assert classifier.classify(frames[list(COLORS).index("red")]).label == "red"
