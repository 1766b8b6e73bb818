"""One 1080p camera frame to a label: the runtime against what others do, in one run.

    python benchmarks/frame.py [BUNDLE] [--model ViT-B-32-quickgelu] [--rounds 15]

Without BUNDLE one is exported, in fp32, of the model with random weights: for speed alone. The
others get the same network and 100 labels: open_clip in PyTorch with its own transform, in float32
and bfloat16; ONNX Runtime as immich and fastembed use it, with that transform; ONNX Runtime and
OpenVINO with a hand-written OpenCV preprocessing, in float32 (OpenVINO: its own choice, bfloat16
where the CPU has it), and int8 by ONNX Runtime's quantize_dynamic and quantize_static. All take
turns, round by round, on the same threads. Prints medians, and ratios to the first.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
import openvino
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from PIL import Image
from rich.progress import track

import runtime
from export.bundle import ExportOptions, export_bundle
from runtime.classifier import Classifier
from runtime.errors import EdgeClipError
from runtime.preprocess import preprocess
from training.model import ClipModel, create

# isort: split
from open_clip.transform import PreprocessCfg, image_transform_v2

Contender = Callable[[NDArray[np.uint8]], object]
LINEAR = ["MatMul", "Gemm"]


def camera_frame() -> NDArray[np.uint8]:
    """A photo-like 1080p BGR frame: noise of low frequency."""
    noise = np.random.default_rng(0).integers(0, 256, (34, 60, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((1920, 1080), Image.Resampling.BICUBIC))


class Others:
    """The same network as others run it."""

    def __init__(self, clip: ClipModel, bank: NDArray[np.float32], folder: Path) -> None:
        self._clip, self._bank = clip, bank
        self._spec = clip.image
        size = self._spec.height, self._spec.width
        self._transform = image_transform_v2(PreprocessCfg(size=size), is_train=False)
        self._files = _files(clip, folder)
        self._mean = np.array(self._spec.mean, np.float32) * 255
        self._std = np.array(self._spec.std, np.float32) * 255

    def contenders(self) -> dict[str, Contender]:
        """What each does to a frame."""
        fp32, dynamic, static = self._files
        by_pil: Callable[[NDArray[np.uint8]], Any] = lambda frame: self._pil(frame).numpy()  # noqa: E731
        return {
            "open_clip, PyTorch float32, PIL": self._eager(torch.float32),
            "open_clip, PyTorch bfloat16, PIL": self._eager(torch.bfloat16),
            "ONNX Runtime fp32, PIL": self._head(by_pil, _in_onnxruntime(fp32)),
            "ONNX Runtime fp32, OpenCV": self._head(self._opencv, _in_onnxruntime(fp32)),
            "ONNX Runtime dynamic int8, OpenCV": self._head(self._opencv, _in_onnxruntime(dynamic)),
            "ONNX Runtime static int8, OpenCV": self._head(self._opencv, _in_onnxruntime(static)),
            "OpenVINO, OpenCV": self._head(self._opencv, _in_openvino(fp32)),
            "OpenVINO static int8, OpenCV": self._head(self._opencv, _in_openvino(static)),
        }

    def preprocessing(self) -> dict[str, Contender]:
        """The preprocessing alone."""
        return {"(the model's transform)": self._pil, "(OpenCV by hand)": self._opencv}

    def _pil(self, frame: NDArray[np.uint8]) -> torch.Tensor:
        image = Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
        tensor: torch.Tensor = self._transform(image)[None]
        return tensor

    def _opencv(self, frame: NDArray[np.uint8]) -> NDArray[np.float32]:
        side = min(frame.shape[:2])
        top, left = (frame.shape[0] - side) // 2, (frame.shape[1] - side) // 2
        square = frame[top : top + side, left : left + side]
        size = self._spec.width, self._spec.height
        small = cv2.cvtColor(cv2.resize(square, size, interpolation=cv2.INTER_AREA), 4)
        pixels = (small.astype(np.float32) - self._mean) / self._std
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))[None]

    def _eager(self, dtype: torch.dtype) -> Contender:
        text = torch.from_numpy(self._bank)

        @torch.inference_mode()
        def classify(frame: NDArray[np.uint8]) -> int:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                rows = self._clip.model.encode_image(self._pil(frame), normalize=True)
            return int((100 * rows.float() @ text.T).argmax())

        return classify

    def _head(
        self, pixels: Callable[[NDArray[np.uint8]], Any], encode: Callable[[Any], Any]
    ) -> Contender:
        return lambda frame: int((100 * encode(pixels(frame)) @ self._bank.T).argmax())


def _files(clip: ClipModel, folder: Path) -> tuple[Path, Path, Path]:
    """ONNX files of the image encoder, of normalised pixels: float32, dynamic and static int8."""

    class Encoder(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            rows: torch.Tensor = clip.model.encode_image(pixels, normalize=True)
            return rows

    fp32, dynamic, static = (folder / f"{name}.onnx" for name in ("fp32", "dynamic", "static"))
    shape = (1, 3, clip.image.height, clip.image.width)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    torch.onnx.export(
        Encoder().eval(),
        (torch.randn(shape),),
        str(fp32),
        dynamo=True,
        input_names=["pixels"],
        opset_version=18,
        external_data=False,
        dynamic_shapes={"pixels": batch},
        verbose=False,
    )
    quantize_dynamic(fp32, dynamic, per_channel=True, op_types_to_quantize=LINEAR)
    prepared = folder / "prepared.onnx"
    quant_pre_process(fp32, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        static,
        _Noise(shape),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=LINEAR,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )
    return fp32, dynamic, static


class _Noise(CalibrationDataReader):  # type: ignore[misc]
    """Eight frames to calibrate on: what they show does not matter to the speed."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        rng = np.random.default_rng(0)
        frames = (rng.standard_normal(shape).astype(np.float32) for _ in range(8))
        self._frames: Iterator[dict[str, Any]] = ({"pixels": frame} for frame in frames)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._frames, None)


def _in_onnxruntime(path: Path) -> Callable[[Any], Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixels": pixels})[0]


def _in_openvino(path: Path) -> Callable[[Any], Any]:
    model = openvino.Core().compile_model(str(path), "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    request = model.create_infer_request()
    return lambda pixels: next(iter(request.infer({0: pixels}).values()))


def ours(bundle: Path) -> dict[str, Classifier]:
    """The runtime on each CPU backend, in each precision that it runs."""
    found: dict[str, Classifier] = {}
    for precision in runtime.load(bundle, backend="onnxruntime").bundle.manifest.precisions:
        for backend in ("onnxruntime", "openvino"):
            try:
                classifier = runtime.load(bundle, backend=backend, precision=precision)
            except EdgeClipError as error:
                print(f"edgeclip, {backend} {precision} does not run: {error}")
                continue
            found[f"edgeclip, {backend} {precision}"] = classifier
    return found


def milliseconds(call: Contender, frame: NDArray[np.uint8]) -> float:
    """Of the second of two calls: the caches were emptied by the other contestants."""
    call(frame)
    start = time.perf_counter()
    call(frame)
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--model", default="ViT-B-32-quickgelu")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    frame, labels = camera_frame(), [f"label {n}" for n in range(100)]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        bundle = options.bundle or Path(folder) / "bundle"
        if options.bundle is None:
            made = ExportOptions(checkpoint=options.model, bundle=bundle, labels=labels)
            export_bundle(made, True)
        own = ours(bundle)
        bank = next(iter(own.values())).require_bank().embeddings
        others = Others(create(options.model), bank, Path(folder))
        contenders = others.contenders()
        contenders |= {name: classifier.classify for name, classifier in own.items()}
        alone = others.preprocessing()
        spec = next(iter(own.values())).bundle.manifest.image
        alone["(edgeclip's preprocessing)"] = lambda f: preprocess(f, spec)
        times: dict[str, list[float]] = {}
        for _ in track(range(options.rounds), "Classifying", transient=True):
            for name, call in (contenders | alone).items():
                times.setdefault(name, []).append(milliseconds(call, frame))
    print(f"{options.model}, 1080p frame, {os.cpu_count()} cores, {options.rounds} rounds")
    base = np.median(times["open_clip, PyTorch float32, PIL"])
    for name, found in times.items():
        print(f"{name:36s} {np.median(found):8.2f} ms  {base / np.median(found):5.2f}x")


if __name__ == "__main__":
    main()
