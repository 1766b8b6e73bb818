"""One 1080p camera frame to a label: the runtime against open_clip in PyTorch, in one run.

    python benchmarks/frame.py [--model ViT-B-32-quickgelu] [--rounds 15]

Both are given the same frame and 100 labels, in turn, round by round, on the same threads; the
weights are random, for speed alone. Prints the median of each stage and the ratio.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import runtime
from export.bundle import ExportOptions, export_bundle
from training.model import create

# isort: split
from open_clip.transform import PreprocessCfg, image_transform_v2


def camera_frame() -> np.ndarray:
    """A photo-like 1080p BGR frame: noise of low frequency."""
    noise = np.random.default_rng(0).integers(0, 256, (34, 60, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((1920, 1080), Image.Resampling.BICUBIC))


def eager(model: str, bank: np.ndarray) -> Callable[[np.ndarray], int]:
    """open_clip's own way: its transform on a PIL image, then the model in PyTorch."""
    clip = create(model)
    size = clip.image.height, clip.image.width
    transform = image_transform_v2(PreprocessCfg(size=size), is_train=False)
    text = torch.from_numpy(bank)

    @torch.inference_mode()
    def classify(frame: np.ndarray) -> int:
        image = Image.fromarray(np.ascontiguousarray(frame[..., ::-1]))
        embedding = clip.model.encode_image(transform(image)[None], normalize=True)
        return int((100 * embedding @ text.T).argmax())

    return classify


def milliseconds(call: Callable[[], object]) -> float:
    call()  # caches were emptied by the other contestant
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ViT-B-32-quickgelu")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    frame, labels = camera_frame(), [f"label {n}" for n in range(100)]
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        export_bundle(ExportOptions(checkpoint=options.model, bundle=bundle, labels=labels), True)
        ours = runtime.load(bundle)
        assert ours.bank is not None
        theirs = eager(options.model, ours.bank.embeddings)
        assert ours.labels[theirs(frame)] == ours.classify(frame).label
        times: dict[str, list[float]] = {"runtime.classify": [], "open_clip, PyTorch": []}
        stages: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            times["runtime.classify"].append(milliseconds(lambda: ours.classify(frame)))
            times["open_clip, PyTorch"].append(milliseconds(lambda: theirs(frame)))
            for stage, ms in ours.classify(frame).timings.items():
                stages.setdefault(stage, []).append(ms)
    print(f"{options.model}, {os.cpu_count()} cores, {ours!r}")
    base = np.median(times["open_clip, PyTorch"])
    for name, found in times.items():
        print(f"{name:20s} {np.median(found):8.2f} ms  {base / np.median(found):5.2f}x")
    for stage, found in stages.items():
        print(f"  {stage:18s} {np.median(found):8.2f} ms")


if __name__ == "__main__":
    main()
