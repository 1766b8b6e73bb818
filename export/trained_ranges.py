"""INT8 by the ranges of a quantisation-aware training: no calibration, and the trained function."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.numpy_helper
import torch
from onnx import ModelProto

from calibration.gate import Encode
from calibration.histogram import LEVELS
from calibration.layers import Layer, find_layers, initializers
from calibration.metrics import Floats
from calibration.ranges import Range
from runtime.errors import DataError
from training.evaluate import image_encoder
from training.fake_quant import BITS, FakeLayer, fake_layers
from training.model import WEIGHTS, ClipModel, create
from training.qat import fake_quantize, set_steps
from training.quantization import NAME, Quantization, read_quantization

_SAME = 1e-4  # of a layer's largest weight: two ways to fold the same numbers


@dataclass(frozen=True, eq=False)
class Trained:
    """The model as it was trained: fake-quantised, with its ranges."""

    clip: ClipModel

    @property
    def encode(self) -> Encode:
        """Frames uint8 [n, H, W, 3] to unit rows [n, D]."""
        return image_encoder(self.clip)

    def applied(self, model: ModelProto) -> tuple[ModelProto, dict[str, Range]]:
        """Its float encoder's graph with the weights and biases as the training computes them, to
        the last bit, for else some would be rounded otherwise; and the ranges of its tensors.
        Raises DataError where graph and model do not have the same layers.

        A node of the graph is the layer that has its weight: nothing else is the same whatever the
        exporter's names and optimisations are.
        """
        made = ModelProto()
        made.CopyFrom(model)
        constants, left = initializers(model), dict(fake_layers(self.clip.model))
        known, found, exact = dict(left), dict[str, Range](), dict[str, Floats]()
        for layer in find_layers(model):
            weight = _by_output(np.asarray(constants[layer.weight], np.float32), layer)
            name = _named(weight, left) or _named(weight, known)
            if name is None:
                raise DataError(f"{NAME} has no range for the layer {layer.title} of the export")
            left.pop(name, None)
            own = _range(known[name].quantizer.step.item())
            if found.setdefault(layer.input, own).threshold != own.threshold:
                raise DataError(f"{NAME} has two ranges for what the layer {layer.title} takes")
            exact |= _constants(layer, known[name])
        if left:
            raise DataError(f"{NAME}: the export has no layer for {', '.join(left)}")
        _replace(made, exact)
        return made, found


def read_trained(clip: ClipModel) -> Trained | None:
    """The model of a checkpoint folder as it was trained; None where that was without --qat.
    Raises DataError where its ranges do not belong to it, or are not of 8 bits."""
    found = None if clip.folder is None else read_quantization(clip.folder, clip.folder / WEIGHTS)
    if clip.folder is None or found is None:
        return None
    if found.bits != BITS:
        raise DataError(
            f"{clip.folder / NAME} is of {found.bits} bits, for research alone: int8 has {BITS}"
        )
    return restored(clip, found)


def restored(clip: ClipModel, quantization: Quantization) -> Trained:
    """A fake-quantised copy of the model."""
    own = create(str(clip.folder))
    fake_quantize(own, quantization.bits)
    set_steps(own, quantization.input_steps)
    return Trained(own)


def _range(step: float) -> Range:
    # A little less: what it is divided by again is rounded up to the step.
    return Range(step * LEVELS * (1 - 1e-6), "training", 0.0, exact=True)


@torch.no_grad()
def _constants(layer: Layer, own: FakeLayer) -> dict[str, Floats]:
    """What the graph's constants for a layer are in the training."""
    weight, bias = own.float_weight().numpy(), own.float_bias()
    found = {layer.weight: np.moveaxis(weight, 0, layer.out_axis)}
    if layer.bias is not None and bias is not None:
        found[layer.bias] = bias.numpy()
    return found


def _replace(model: ModelProto, values: Mapping[str, Floats]) -> None:
    for tensor in model.graph.initializer:
        if tensor.name in values:
            value = np.ascontiguousarray(values[tensor.name])
            if tuple(tensor.dims) != value.shape:
                raise DataError(f"{NAME}: {tensor.name} of the export has another shape")
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))


def _by_output(weight: Floats, layer: Layer) -> Floats:
    return np.moveaxis(weight, layer.out_axis, 0)


def _named(weight: Floats, layers: dict[str, FakeLayer]) -> str | None:
    """The first layer that has this weight [out, ...]."""
    for name, layer in layers.items():
        with torch.no_grad():
            own = layer.float_weight().numpy()
        if own.shape == weight.shape:
            if np.abs(own - weight).max() <= _SAME * np.abs(own).max():
                return name
    return None
