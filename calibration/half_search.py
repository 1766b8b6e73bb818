"""Which layers lose most by weights in half: early convolutions with batch norm folded in, above
all, whose channels differ by orders of magnitude."""

from collections.abc import Sequence

import numpy as np
import onnx
import onnx.numpy_helper
from onnx import ModelProto

from .gate import AnyJudge
from .layers import Layer
from .sensitivity import encoder


def by_loss(model: ModelProto, layers: Sequence[Layer], judge: AnyJudge) -> list[str]:
    """The layers' names, from the one whose weight alone in half turns the embeddings most."""
    cosines = {}
    for layer in layers:
        cost = judge.cost(encoder(_rounded(model, layer.weight)))
        cosines[layer.name] = (cost.cosine_p1, cost.cosine_p50)
    return sorted(cosines, key=lambda name: cosines[name])


def _rounded(model: ModelProto, weight: str) -> ModelProto:
    """The float model with one constant rounded to half."""
    made = ModelProto()
    made.CopyFrom(model)
    for tensor in made.graph.initializer:
        if tensor.name == weight:
            values = onnx.numpy_helper.to_array(tensor)
            with np.errstate(over="ignore"):
                half = values.astype(np.float16).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(half, weight))
    return made
