"""Holds a bundle against the rules of its format: hashes, graphs, borders, prompt banks."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto

from runtime.backends import Border, image_border, text_border
from runtime.bundle import Bundle
from runtime.classifier import Classifier
from runtime.errors import EdgeClipError
from runtime.manifest import NAME
from runtime.ort import OrtEncoder

from .to_onnx import OPSET, REDUCTIONS

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
    encoders = [(entry.image, image_border(made)) for entry in made.precisions.values()]
    for name, border in [*encoders, (made.text_encoder, text_border(made))]:
        faults += [f"{name}: {fault}" for fault in _encoder(bundle, name, border)]
    return faults + list(_prompts(bundle))


def _files(bundle: Bundle) -> Iterator[str]:
    made = bundle.manifest
    for name in sorted(made.files):
        try:
            bundle.file(name)
        except EdgeClipError as error:
            yield str(error)
    for path in sorted(bundle.folder.rglob("*")):
        name = path.relative_to(bundle.folder).as_posix()
        if path.is_file() and name not in made.files and name != NAME:
            if not name.startswith("engines/"):
                yield f"{name} is not listed in the manifest"


def _encoder(bundle: Bundle, name: str, border: Border) -> Iterator[str]:
    path = bundle.file(name)
    try:
        model = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf, checker and inference errors share no base
        yield f"not a valid ONNX file: {error}"
        return
    yield from _graph(model, border.name)
    dtype = np.uint8 if border.name == "frames" else np.int32
    try:
        encoder = OrtEncoder(path, border)
        for batch in (1, 3):
            rows = encoder(np.zeros((batch, *border.shape), dtype=dtype))
            if not np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-4):
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
        if node.op_type in REDUCTIONS and len(node.input) > 1:
            yield f"{node.name}: {node.op_type} takes its axes as an input"
    if any(t.data_location == TensorProto.EXTERNAL for t in model.graph.initializer):
        yield "weights lie in another file"


def _prompts(bundle: Bundle) -> Iterator[str]:
    """Uses the bundle as an application would: a label by every template, and every bank."""
    frame = np.zeros((bundle.manifest.image.height, bundle.manifest.image.width, 3), np.uint8)
    try:
        classifier = Classifier(bundle)
        classifier.set_labels(["a label"])
        classifier.classify(frame)
        for name in bundle.manifest.prompts:
            classifier.use_prompts(name)
            classifier.classify(frame)
    except EdgeClipError as error:
        yield str(error)
