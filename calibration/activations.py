"""What flows into the layers of an encoder over the calibration frames, in constant memory."""

import json
import secrets
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto

from runtime.errors import DataError, GateFailed
from runtime.ort import DISABLED

from .histogram import Histogram
from .layers import Layer
from .metrics import Floats

KEPT_FRAMES, KEPT_ROWS = 4, 512  # of a tensor are kept, to measure errors on
SAVE_EVERY = 32  # batches


@dataclass
class Activation:
    """What was seen of one tensor: magnitudes, the largest by channel [C], and some of it whole."""

    histogram: Histogram = field(default_factory=Histogram)
    channels: Floats = field(default_factory=lambda: np.zeros(1, np.float32))
    kept: list[Floats] = field(default_factory=list)

    def add(self, values: Floats, axis: int) -> None:
        """Takes in a batch's values; `axis` is that of the channels."""
        self.histogram.add(values)
        other = tuple(a for a in range(values.ndim) if a != axis % values.ndim)
        self.channels = np.maximum(self.channels, np.abs(values).max(axis=other))
        if len(self.kept) < KEPT_FRAMES:
            self.kept.append(_some(values, axis))

    @property
    def sample(self) -> Floats:
        """What was kept, as one array."""
        return np.concatenate(self.kept)


def _some(values: Floats, axis: int) -> Floats:
    """One frame of a convolution's input; evenly chosen rows [n, K] of a Linear's."""
    if axis == 1 and values.ndim > 2:
        return values[:1].copy()
    rows = values.reshape(-1, values.shape[-1])
    most = KEPT_ROWS // KEPT_FRAMES
    return rows[:: -(-len(rows) // most)].copy()


def observe(
    model: ModelProto,
    layers: Sequence[Layer],
    batches: Iterable[NDArray[np.generic]],
    cache: Path | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Activation]:
    """Runs the float encoder on the frames; returns what was seen of each layer's input.

    With `cache`, a file, the run is kept there every few batches, and goes on from there when it
    was cut off; the caller names it after the model and the frames. Raises GateFailed where a
    value is not finite.
    """
    axes = {layer.input: layer.channel_axis for layer in layers}
    session = with_outputs(model, tuple(axes))
    name = session.get_inputs()[0].name
    done, found = _resumed(cache, tuple(axes))
    for number, batch in enumerate(batches):
        if number >= done:
            for tensor, values in zip(axes, session.run(list(axes), {name: batch}), strict=True):
                if not np.isfinite(values).all():
                    raise GateFailed(f"the float encoder gives no finite numbers at {tensor}")
                found[tensor].add(values, axes[tensor])
            if cache and (number + 1) % SAVE_EVERY == 0:
                _save(cache, number + 1, found)
        advance(len(batch))
    if cache:
        _save(cache, number + 1, found)
    return found


def with_outputs(model: ModelProto, tensors: Sequence[str]) -> onnxruntime.InferenceSession:
    """A session that also gives these inner tensors."""
    observed = ModelProto()
    observed.CopyFrom(model)
    del observed.graph.output[:]
    observed.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors
    )
    return session_of(observed)


def session_of(model: ModelProto, optimise: bool = True) -> onnxruntime.InferenceSession:
    """A quiet session on the CPU; without `optimise` it runs the nodes as they are written."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        model.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=DISABLED,
    )


def _save(cache: Path, done: int, found: dict[str, Activation]) -> None:
    arrays: dict[str, Any] = {"done": np.array(done)}
    for number, own in enumerate(found.values()):
        arrays[f"{number}.counts"] = own.histogram.counts
        arrays[f"{number}.range"] = np.array([own.histogram.range, own.histogram.largest])
        arrays[f"{number}.channels"] = own.channels
        for place, kept in enumerate(own.kept):
            arrays[f"{number}.kept.{place}"] = kept
    arrays["names"] = np.frombuffer(json.dumps(list(found)).encode(), np.uint8)
    beside = cache.with_name(f".{secrets.token_hex(4)}-{cache.name}")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as stream:
            np.savez(stream, **arrays)
        beside.replace(cache)
    except OSError as error:
        raise DataError(f"the ranges cannot be kept in {cache}: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def _resumed(cache: Path | None, names: tuple[str, ...]) -> tuple[int, dict[str, Activation]]:
    """How many batches were done, and what they gave; nothing where there is no sound file."""
    found = {name: Activation() for name in names}
    if cache is None or not cache.is_file():
        return 0, found
    try:
        with cache.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            if tuple(json.loads(arrays["names"].tobytes())) != names:
                return 0, found
            read = {name: _read(arrays, number) for number, name in enumerate(names)}
            return int(arrays["done"]), read
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return 0, found


def _read(arrays: Any, number: int) -> Activation:
    histogram = Histogram()
    histogram.counts = arrays[f"{number}.counts"]
    histogram.range, histogram.largest = arrays[f"{number}.range"].tolist()
    kept = [
        arrays[f"{number}.kept.{p}"] for p in range(KEPT_FRAMES) if f"{number}.kept.{p}" in arrays
    ]
    return Activation(histogram, arrays[f"{number}.channels"], kept)
