"""What half cannot hold of an encoder, seen on frames; and the encoder as a GPU runs it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from runtime.errors import DataError

from .half import LARGEST
from .typed_graph import FLOAT, HALF, TypedGraph, name_of, read_graph, types_of


def overflowing(
    model: ModelProto, batches: Iterable[NDArray[Any]], margin: float = 4.0
) -> dict[str, float]:
    """The nodes, by name, that half cannot hold on these inputs, each with the largest magnitude
    that went in or came out; good for `to_half`'s `keep_float`.

    Runs the fp32 model in ONNX Runtime on batches of its one input (uint8 frames [N, H, W, 3] or
    int32 tokens [N, L]). A node is named where a magnitude is over 65504 / `margin`, or no number.
    They are taken inside the graph: memory does not grow with the number of batches. Raises
    DataError where there is no batch, or one does not go into the model.
    """
    graph = read_graph(model)
    watched = sorted(n for n, kind in graph.types.items() if kind == FLOAT)
    watched = [name for name in watched if name not in graph.constants]
    session = _session(model, watched)
    peaks = None
    for batch in batches:
        seen = _magnitudes(session, batch, len(watched))
        peaks = seen if peaks is None else np.maximum(peaks, seen)
    if peaks is None:
        raise DataError("there are no frames to look for overflow on; give at least one batch")
    return _beyond(graph, dict(zip(watched, peaks.tolist(), strict=True)), LARGEST / margin)


def rounding(half: ModelProto) -> ModelProto:
    """A half file that ONNX Runtime's CPU provider computes as a GPU does, to be judged by.

    That provider has few half kernels: it computes in float, and drops the Casts between two
    such nodes, so that nothing overflows there. Two Identities after each half node keep it from
    that; they must be left in: run it with `graph_optimization_level` ORT_DISABLE_ALL.
    """
    types = types_of(half)
    nodes = []
    for node in half.graph.node:
        kept = NodeProto()
        kept.CopyFrom(node)
        nodes.append(kept)
        for position, name in enumerate(node.output):
            if types.get(name) == HALF:
                kept.output[position] = f"{name}.once"
                nodes.append(onnx.helper.make_node("Identity", [f"{name}.once"], [f"{name}.twice"]))
                nodes.append(onnx.helper.make_node("Identity", [f"{name}.twice"], [name]))
    made = ModelProto()
    made.CopyFrom(half)
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    return made


def _session(model: ModelProto, watched: Sequence[str]) -> onnxruntime.InferenceSession:
    """The model with the largest magnitude of each watched tensor as outputs more."""
    extra = ModelProto()
    for i, name in enumerate(watched):
        extra.graph.node.append(onnx.helper.make_node("Abs", [name], [f"magnitude {i}"]))
        extra.graph.node.append(
            onnx.helper.make_node("ReduceMax", [f"magnitude {i}"], [f"peak {i}"], keepdims=0)
        )
        extra.graph.output.append(onnx.helper.make_tensor_value_info(f"peak {i}", FLOAT, []))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Protobuf reads two messages in a row as one, lists appended: the weights are not copied.
    return onnxruntime.InferenceSession(
        model.SerializeToString() + extra.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )


def _magnitudes(
    session: onnxruntime.InferenceSession, batch: NDArray[Any], number: int
) -> NDArray[np.float32]:
    outputs = [f"peak {i}" for i in range(number)]
    try:
        return np.array(session.run(outputs, {session.get_inputs()[0].name: batch}))
    except Exception as error:  # the library's exceptions have no common base of their own
        reason = " ".join(str(error).split())
        raise DataError(f"a batch does not go into the model: {reason}") from error


def _beyond(graph: TypedGraph, peaks: Mapping[str, float], limit: float) -> dict[str, float]:
    """The nodes that have a tensor above the limit, with the largest magnitude."""
    found = {}
    for node in graph.nodes:
        seen = [peaks[name] for name in (*node.input, *node.output) if name in peaks]
        peak = float(np.max(seen, initial=0))  # NaN where one is
        if not peak <= limit:
            found[name_of(node)] = peak
    return found
