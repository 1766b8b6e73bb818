"""Holds a bundle against the rules of its format: hashes, graphs, borders, prompt banks."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto

from runtime.bundle import Bundle
from runtime.errors import EdgeClipError
from runtime.manifest import NAME
from runtime.ort import OrtEncoder
from runtime.prompts import load_bank
from runtime.tokenizer import Tokenizer

from .to_onnx import OPSET

_REDUCTIONS = {
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSumSquare",
}  # fmt: skip
_DTYPES = {"frames": TensorProto.UINT8, "tokens": TensorProto.INT32}


def verify(folder: Path) -> list[str]:
    """Returns what is wrong with the bundle in `folder`, a line each; empty where it is sound.

    Raises BundleError where there is no bundle, or its manifest cannot be read.
    """
    bundle = Bundle(folder)
    faults = list(_files(bundle))
    if faults:  # what is damaged is not parsed
        return faults
    made = bundle.manifest
    encoders = {entry.image: "frames" for entry in made.precisions.values()}
    for name, input_name in (encoders | {made.text_encoder: "tokens"}).items():
        faults += [f"{name}: {fault}" for fault in _encoder(bundle, name, input_name)]
    return faults + list(_prompts(bundle))


def _files(bundle: Bundle) -> Iterator[str]:
    made = bundle.manifest
    named = {entry.image for entry in made.precisions.values()}
    named |= {made.text_encoder, made.tokenizer, *made.prompts.values()}
    for name in sorted(named | set(made.files)):
        try:
            bundle.file(name)
        except EdgeClipError as error:
            yield str(error)
    for path in sorted(bundle.folder.rglob("*")):
        name = path.relative_to(bundle.folder).as_posix()
        if path.is_file() and name not in made.files and name != NAME:
            if not name.startswith("engines/"):
                yield f"{name} is not listed in the manifest"


def _encoder(bundle: Bundle, name: str, input_name: str) -> Iterator[str]:
    path = bundle.file(name)
    try:
        model = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf, checker and inference errors share no base
        yield f"not a valid ONNX file: {error}"
        return
    yield from _graph(model, input_name)
    made = bundle.manifest
    sizes = {
        "frames": (made.image.height, made.image.width, 3),
        "tokens": (made.text.context_length,),
    }
    dtype = np.uint8 if input_name == "frames" else np.int32
    try:
        encoder = OrtEncoder(path, input_name)
        for batch in (1, 3):
            rows = encoder(np.zeros((batch, *sizes[input_name]), dtype=dtype))
            if rows.shape != (batch, made.model.embedding_dim):
                yield f"gives {rows.shape} for a batch of {batch}"
            elif not np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-4):
                yield "its embeddings are not unit rows"
    except EdgeClipError as error:
        yield str(error)


def _graph(model: ModelProto, input_name: str) -> Iterator[str]:
    opsets = {o.domain: o.version for o in model.opset_import}
    if opsets != {"": OPSET}:
        yield f"opset {opsets}, expected {OPSET} of the default domain only"
    border = {i.name: i.type.tensor_type.elem_type for i in model.graph.input}
    if border != {input_name: _DTYPES[input_name]}:
        yield f"inputs {border}, expected {input_name} of type {_DTYPES[input_name]}"
    border = {o.name: o.type.tensor_type.elem_type for o in model.graph.output}
    if border != {"embeddings": TensorProto.FLOAT}:
        yield f"outputs {border}, expected float32 embeddings"
    for node in model.graph.node:
        if node.op_type in _REDUCTIONS and len(node.input) > 1:
            yield f"{node.name}: {node.op_type} takes its axes as an input"
    if any(t.data_location == TensorProto.EXTERNAL for t in model.graph.initializer):
        yield "weights lie in another file"


def _prompts(bundle: Bundle) -> Iterator[str]:
    made = bundle.manifest
    encoder = made.files[made.text_encoder].sha256
    try:
        Tokenizer(bundle.file(made.tokenizer).read_bytes(), made.text)
        for name in made.prompts.values():
            load_bank(bundle.file(name), encoder, made.model.embedding_dim)
    except EdgeClipError as error:
        yield str(error)
