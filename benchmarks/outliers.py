"""Outliers planted into an encoder that computes the same function as before.

It models the residual stream of large vision transformers: the same few of its channels are far
larger than the others in every block, and through each block's LayerNormalizations they reach the
Linears, where one int8 step for the whole tensor leaves little of the other channels. A small
encoder has none of that; here the LayerNormalizations make these channels larger, and the weights
behind them are smaller by as much.
"""

import numpy as np
from onnx import ModelProto

from calibration.layers import find_layers, initializers
from calibration.quantize import folded
from calibration.ranges import Range, foldable_inputs

SHARE = 192  # one channel in so many, at least two


def plant(model: ModelProto, factor: float) -> ModelProto:
    """The same float function, with channels larger by `factor` in what LayerNormalizations give
    to Linears. Raises ValueError where there is no such place, as in a convolutional encoder."""
    layers = find_layers(model)
    places = foldable_inputs(model, layers)
    if not places:
        raise ValueError(
            "no LayerNormalization feeds a Linear here: there is no place for outliers"
        )
    constants = initializers(model)
    norms = {node.output[0]: node for node in model.graph.node if node.output[0] in places}
    outliers = {
        name: Range(1.0, "", 0.0, smooth(constants[node.input[1]].size, factor), 0.0, True)
        for name, node in norms.items()
    }
    return folded(model, layers, outliers)


def smooth(width: int, factor: float) -> np.ndarray:
    """What the channels [width] are divided by: the same few of them, however many blocks."""
    chosen = np.random.default_rng(0).choice(width, max(2, width // SHARE), replace=False)
    found = np.ones(width, np.float32)
    found[chosen] = 1 / factor
    return found
