"""An encoder as an ONNX file of opset 17, which TensorRT 8.6 to 11 and ONNX Runtime read.

PyTorch's exporter writes opset 18; TensorRT 8.6 reads 17 and silently reduces over all axes where
an opset-18 reduction names them in an input. The few operators that changed are rewritten here.
"""

import collections
import logging
import warnings
from pathlib import Path

import onnx
import onnx.numpy_helper
import torch
from onnx import ModelProto, NodeProto
from torch import Tensor, nn

OPSET = 17
REDUCTIONS = {  # their axes became an input in opset 18
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSumSquare",
}  # fmt: skip
_NEW_ATTRIBUTES = {
    "Split": {"num_outputs"},
    "Resize": {"antialias", "axes", "keep_aspect_ratio_policy"},
    "Pad": set(),
}


def write_onnx(encoder: nn.Module, example: Tensor, input_name: str, path: Path) -> None:
    """Writes `encoder` to `path`: input `input_name`, output `embeddings`, batch dynamic.

    `example` is a batch of two. Raises ValueError for an operator that opset 17 does not have.
    """
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        program = torch.onnx.export(
            encoder.eval(),
            (example,),
            dynamo=True,
            input_names=[input_name],
            output_names=["embeddings"],
            opset_version=OPSET + 1,
            external_data=False,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    model = lower(program.model_proto)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def lower(model: ModelProto) -> ModelProto:
    """Rewrites an opset-18 model as opset 17, in place, and strips the exporter's notes (they
    hold paths of the exporting machine)."""
    constants = {t.name: t for t in model.graph.initializer}
    numbers: collections.Counter[str] = collections.Counter()
    for node in model.graph.node:
        _lower_node(node, constants)
        node.name = (
            f"{node.op_type}_{numbers[node.op_type]}"  # the exporter's depend on its release
        )
        numbers[node.op_type] += 1
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        value.ClearField("metadata_props")
    for tensor in model.graph.initializer:
        tensor.ClearField("metadata_props")
    model.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    model.graph.ClearField("value_info")
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("", OPSET))
    model.ir_version, model.producer_name, model.producer_version = 8, "edgeclip", ""
    _drop_unused(model)
    return model


def _lower_node(node: NodeProto, constants: dict[str, onnx.TensorProto]) -> None:
    since = onnx.defs.get_schema(node.op_type, OPSET + 1, node.domain).since_version
    if since <= OPSET:
        return
    if node.op_type in REDUCTIONS:
        axes = [int(a) for a in onnx.numpy_helper.to_array(constants[node.input[1]])]
        del node.input[1:]
        _drop_attributes(node, {"noop_with_empty_axes"})
        node.attribute.append(onnx.helper.make_attribute("axes", axes))
    elif node.op_type in _NEW_ATTRIBUTES and not (node.op_type == "Pad" and len(node.input) > 3):
        _drop_attributes(node, _NEW_ATTRIBUTES[node.op_type])
    else:
        raise ValueError(f"the operator {node.op_type} is not in opset {OPSET}")


def _drop_attributes(node: NodeProto, names: set[str]) -> None:
    kept = [a for a in node.attribute if a.name not in names]
    del node.attribute[:]
    node.attribute.extend(kept)


def _drop_unused(model: ModelProto) -> None:
    used = {name for node in model.graph.node for name in node.input}
    kept = [t for t in model.graph.initializer if t.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
