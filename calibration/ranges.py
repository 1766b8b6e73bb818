"""Chooses, for every tensor that feeds a layer, the range of its int8 and how to even it out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from .activations import Activation, session_of
from .histogram import LEVELS, Histogram, thresholds
from .layers import Layer, by_input_channel, consumers_of, initializers
from .metrics import Floats

ALPHAS = (0.25, 0.5, 0.75, 1.0)
WORTH = 0.5  # an extra multiplication in the graph must at least halve the error
HALF_BITS = 11  # significant, of a float16
EXACT_BITS = 3
_SMALLEST = 1e-5
_LOWEST = -24  # the exponent of the smallest float16


@dataclass(frozen=True, eq=False)
class Range:
    """How one tensor is quantised: clipped at `threshold`, after its channels were divided by
    `smooth` [C] (by SmoothQuant with `alpha`; None: as they are). `folded` says that the division
    costs nothing, for it is part of the LayerNormalization that makes the tensor. `error` is the
    relative squared error that this causes in the outputs of its layers, and `shifts` what it takes
    from them on average [C], by the layer's name, for their biases to give back.

    `exact` asks for steps of EXACT_BITS significant bits, of the weights too, and for biases in
    multiples of the two steps' product. Sums below 2^18 such products, as those of trained layers
    are, are then numbers that float32 holds, in whatever order they are added: the same int8 comes
    out of every engine.
    """

    threshold: float
    method: str
    error: float
    smooth: Floats | None = None
    alpha: float = 0.0
    folded: bool = False
    shifts: Mapping[str, Floats] = field(default_factory=dict)
    exact: bool = False

    @property
    def scale(self) -> float:
        """The step of the int8."""
        return float(steps(np.array(self.threshold, np.float32), self.exact))


def choose_ranges(
    model: ModelProto,
    layers: Sequence[Layer],
    seen: Mapping[str, Activation],
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Range]:
    """The best range of each layers' input, by trying all on what was kept of the calibration
    frames: min-max, percentiles, entropy and mean squared error, each with and without SmoothQuant
    (Xiao et al. 2023, arXiv:2211.10438); and the shift of the outputs that is left (Nagel et al.
    2019, arXiv:1906.04721, section 4.2), which is large where a channel has few weights.

    It is measured where it counts, at the outputs of the layers, their weights quantised as well.
    onnxruntime.quantization chooses one method for a whole model, from histograms alone.
    """
    constants, by_input = initializers(model), _by_input(layers)
    foldable = foldable_inputs(model, layers)
    found = {}
    for tensor, own in by_input.items():
        weights = [np.asarray(constants[layer.weight], np.float32) for layer in own]
        trial = _Trial(model, own, weights, seen[tensor])
        found[tensor] = trial.with_shifts(trial.best(tensor in foldable))
        advance()
    return found


def _by_input(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        found.setdefault(layer.input, []).append(layer)
    return found


def foldable_inputs(model: ModelProto, layers: Sequence[Layer]) -> set[str]:
    """The outputs of LayerNormalization that nothing but Linears takes."""
    linears = {layer.name for layer in layers if layer.operator != "Conv"}
    consumers = consumers_of(model)
    outputs = {o.name for o in model.graph.output}
    return {
        node.output[0]
        for node in model.graph.node
        if node.op_type == "LayerNormalization"
        and node.output[0] not in outputs
        and all(consumer.name in linears for consumer in consumers.get(node.output[0], []))
    }


def quantized(values: Floats, threshold: float) -> Floats:
    """The values as symmetric int8 represents them."""
    step = steps(np.array(threshold, np.float32))
    return np.asarray(np.clip(np.rint(values / step), -LEVELS, LEVELS) * step, np.float32)


def steps(thresholds: Floats, exact: bool = False) -> Floats:
    """The steps of int8 that reaches up to `thresholds`: the next numbers that float16 holds too,
    so that a file with scales in float16 has the very same int8; for `exact` see `Range`."""
    least = np.maximum(thresholds, _SMALLEST).astype(np.float32) / np.float32(LEVELS)
    exponents = np.frexp(least)[1] - (EXACT_BITS if exact else HALF_BITS)
    unit = np.ldexp(np.float32(1), np.maximum(exponents, _LOWEST))
    return np.asarray(np.ceil(least / unit) * unit, np.float32)


def weight_scales(weight: Floats, axis: int, exact: bool = False) -> Floats:
    """The step of each output channel's int8 [C]."""
    other = tuple(a for a in range(weight.ndim) if a != axis)
    largest = np.abs(weight).max(axis=other)
    return steps(np.where(largest > 0, largest, 1), exact)


def quantized_weight(
    weight: Floats, axis: int, exact: bool = False
) -> tuple[NDArray[np.int8], Floats]:
    """The weight as int8 and its scales [C], by output channel."""
    scales = weight_scales(weight, axis, exact)
    levels = np.clip(np.rint(weight / _along(scales, weight.ndim, axis)), -LEVELS, LEVELS)
    return levels.astype(np.int8), scales


class _Trial:
    """One tensor, the layers that take it, and what was kept of it."""

    def __init__(
        self, model: ModelProto, layers: Sequence[Layer], weights: list[Floats], seen: Activation
    ) -> None:
        self._layers, self._weights, self._seen = layers, weights, seen
        nodes = {node.name: node for node in model.graph.node}
        self._run = [_alone(nodes[layer.name]) for layer in layers]
        self._sample = seen.sample
        pairs = zip(self._run, weights, strict=True)
        self._expected = [run(self._sample, weight) for run, weight in pairs]

    def best(self, foldable: bool) -> Range:
        """The range with the smallest error, smoothed only where that is free or worth it."""
        plain = self._thresholds(None, 0.0, False)
        if any(layer.in_axis is None for layer in self._layers):
            return plain  # grouped: its weights are of each channel by itself
        smooth = min(
            (self._thresholds(self._factors(a), a, foldable) for a in ALPHAS),
            key=lambda found: found.error,
        )
        return smooth if smooth.error < plain.error * (1 if foldable else WORTH) else plain

    def _factors(self, alpha: float) -> Floats:
        """SmoothQuant's equation 4: max|X_j|^alpha / max|W_j|^(1 - alpha), scaled to a mean (of the
        logarithm) of 1."""
        rows = [_largest_rows(w, x) for w, x in zip(self._weights, self._layers, strict=True)]
        weights = np.maximum(np.max(rows, axis=0), _SMALLEST)
        factors = np.maximum(self._seen.channels, _SMALLEST) ** alpha / weights ** (1 - alpha)
        factors = factors / np.exp(np.log(factors).mean())
        return np.asarray(np.clip(factors, 1e-4, 1e4), np.float32)

    def with_shifts(self, chosen: Range) -> Range:
        """The range with what it takes from each output channel on average."""
        sample, weights = self._smoothed(chosen.smooth)
        rounded = quantized(sample, chosen.threshold)
        shifts = {}
        for layer, run, weight, right in zip(
            self._layers, self._run, weights, self._expected, strict=True
        ):
            lost = right - run(rounded, _dequantized(weight, layer.out_axis))
            other = tuple(a for a in range(lost.ndim) if a != layer.channel_axis % lost.ndim)
            shifts[layer.name] = np.asarray(lost.mean(axis=other), np.float32)
        return replace(chosen, shifts=shifts)

    def _smoothed(self, smooth: Floats | None) -> tuple[Floats, list[Floats]]:
        """The sample and the weights after smoothing."""
        if smooth is None:
            return self._sample, self._weights
        sample = self._sample / _along(smooth, self._sample.ndim, self._layers[0].channel_axis)
        pairs = zip(self._weights, self._layers, strict=True)
        return sample, [w * by_input_channel(smooth, layer) for w, layer in pairs]

    def _thresholds(self, smooth: Floats | None, alpha: float, foldable: bool) -> Range:
        sample, weights = self._smoothed(smooth)
        histogram = self._seen.histogram
        if smooth is not None:
            histogram = Histogram()
            histogram.add(sample)
            histogram.largest = float((self._seen.channels / smooth).max())
        rounded = [
            _dequantized(w, layer.out_axis) for w, layer in zip(weights, self._layers, strict=True)
        ]
        errors = {
            name: (self._error(quantized(sample, value), rounded), value)
            for name, value in thresholds(histogram).items()
        }
        method = min(errors, key=lambda name: errors[name][0])
        error, threshold = errors[method]
        folded = foldable and smooth is not None
        return Range(threshold, method, error, smooth, alpha, folded)

    def _error(self, sample: Floats, weights: Sequence[Floats]) -> float:
        """Mean over the layers of |wrong - right|^2 / |right|^2."""
        shares = []
        for run, weight, right in zip(self._run, weights, self._expected, strict=True):
            wrong = run(sample, weight)
            shares.append(((wrong - right) ** 2).sum() / max((right**2).sum(), 1e-20))
        return float(np.mean(shares))


def _alone(node: Any) -> Callable[[Floats, Floats], Floats]:
    """A layer as a function of its input and its weight, without its bias."""
    own = onnx.NodeProto()
    own.CopyFrom(node)
    del own.input[:]
    own.input.extend(["x", "w"])
    del own.output[:]
    own.output.append("y")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [own],
        "layer",
        [value("x", onnx.TensorProto.FLOAT, None), value("w", onnx.TensorProto.FLOAT, None)],
        [value("y", onnx.TensorProto.FLOAT, None)],
    )
    opset = onnx.helper.make_opsetid("", 17)
    session = session_of(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8))
    return lambda x, w: np.asarray(session.run(None, {"x": x, "w": w})[0])


def _largest_rows(weight: Floats, layer: Layer) -> Floats:
    """The largest magnitude of the weights of each input channel [K]."""
    other = tuple(a for a in range(weight.ndim) if a != layer.in_axis)
    return np.asarray(np.abs(weight).max(axis=other))


def _along(values: Floats, rank: int, axis: int) -> Floats:
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def _dequantized(weight: Floats, axis: int) -> Floats:
    levels, scales = quantized_weight(weight, axis)
    return np.asarray(levels * _along(scales, weight.ndim, axis), np.float32)
