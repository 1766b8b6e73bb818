"""How fast an image tower is on this machine, before anybody has trained it: with random weights,
which take as long as any others."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec
import numpy as np
import onnx
import torch
from onnx import ModelProto

from calibration.activations import Activation, observe
from calibration.layers import find_layers
from calibration.quantize import quantize
from calibration.ranges import Range
from runtime.backends import Border, Encoder
from runtime.choice import noise
from runtime.errors import BackendUnavailable, DataError
from runtime.on_cpu import require
from runtime.remembered import recall, remember, this_machine
from training.model import ClipModel, create

from .to_onnx import write_onnx
from .tower_facts import digest, facts
from .towers import ImageEncoder

BACKENDS = ("onnxruntime", "openvino")
PRECISIONS = ("fp32", "int8")
SECONDS, LEAST = 1.0, 5  # for each encoder; runs


class Speed(msgspec.Struct, frozen=True):
    """Milliseconds a frame of the image encoder alone, one frame at a time: the median, by backend
    and precision ("openvino int8")."""

    name: str
    ms: dict[str, float]


def recalled(name: str) -> Speed | None:
    """What was measured here before; None where nothing was."""
    key = _key(name)
    return recall("speed", key, Speed) if key["tower"] else None


def measured(name: str, tell: Callable[[str], None] = lambda _: None) -> Speed:
    """Measures a preset or open_clip model in each backend that is installed, in turns; once for
    each machine and version. Raises DataError for a name that is none."""
    found = recalled(name)
    if found is None:
        tell(f"Exporting {name}")
        with tempfile.TemporaryDirectory() as folder, _encoders(name, Path(folder)) as encoders:
            tell(f"Measuring {name}")
            found = Speed(name, _in_turns(encoders, create(name)))
        if (key := _key(name))["tower"]:
            remember("speed", key, found)
    return found


def fitting(
    budget_ms: float, backend: str, names: list[str], tell: Callable[[str], None] = lambda _: None
) -> list[str]:
    """Those of the names whose image encoder takes at most `budget_ms` a frame here in its faster
    precision; the one with the most multiply-adds first. Raises DataError where none does, and
    BackendUnavailable where the backend is not installed."""
    if backend not in BACKENDS:
        raise DataError(f"a budget is for {' or '.join(BACKENDS)}, not {backend!r}")
    require(backend)
    found, best = [], {}
    for name in names:
        ms = measured(name, tell).ms
        best[name] = min(ms[f"{backend} {precision}"] for precision in PRECISIONS)
        if best[name] <= budget_ms:
            found.append(name)
    if not found:
        fastest = min(best, key=lambda name: best[name])
        raise DataError(
            f"no preset takes {budget_ms:g} ms or less with {backend} here; the fastest is "
            f"{fastest}, {best[fastest]:.2f} ms"
        )
    return sorted(found, key=lambda name: -facts(name).multiply_adds)


def _key(name: str) -> Mapping[str, object]:
    return {"tower": digest(name), "torch": torch.__version__, **this_machine()}


@contextlib.contextmanager
def _encoders(name: str, folder: Path) -> Iterator[dict[str, Encoder]]:
    clip = create(name)
    path = folder / "fp32.onnx"
    frames = torch.from_numpy(np.concatenate([noise(clip.image.height, clip.image.width)] * 2))
    write_onnx(ImageEncoder(clip), frames, "frames", path)
    onnx.save(_int8(onnx.load(path), clip), folder / "int8.onnx")
    border = Border("frames", (clip.image.height, clip.image.width, 3), clip.config["embed_dim"])
    yield {
        f"{backend} {precision}": opened(folder / f"{precision}.onnx", border)
        for backend, opened in _backends().items()
        for precision in PRECISIONS
    }


def _backends() -> dict[str, Callable[[Path, Border], Encoder]]:
    found: dict[str, Callable[[Path, Border], Encoder]] = {}
    for backend in BACKENDS:
        with contextlib.suppress(BackendUnavailable):
            require(backend)
            found[backend] = _opener(backend)
    return found


def _opener(backend: str) -> Callable[[Path, Border], Encoder]:
    if backend == "openvino":
        from runtime.vino import VinoEncoder

        return VinoEncoder
    from runtime.ort import OrtEncoder

    return OrtEncoder


def _int8(model: ModelProto, clip: ClipModel) -> ModelProto:
    """All layers in int8, by the largest values that noise causes: fast, and good for nothing but
    to be timed."""
    layers = find_layers(model)
    seen = observe(model, layers, [noise(clip.image.height, clip.image.width)])
    return quantize(model, layers, {name: _min_max(one) for name, one in seen.items()})


def _min_max(seen: Activation) -> Range:
    return Range(max(float(seen.channels.max()), 1e-5), "min-max", 0.0)


def _in_turns(encoders: Mapping[str, Encoder], clip: ClipModel) -> dict[str, float]:
    frame = noise(clip.image.height, clip.image.width)
    times: dict[str, list[float]] = {name: [] for name in encoders}
    for encoder in encoders.values():
        encoder(frame)
    end = time.perf_counter() + SECONDS * len(encoders)
    while time.perf_counter() < end or min(map(len, times.values())) < LEAST:
        for name, encoder in encoders.items():
            encoder(frame)  # the others have emptied the caches
            start = time.perf_counter()
            encoder(frame)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(float(np.median(ms)), 3) for name, ms in times.items()}
