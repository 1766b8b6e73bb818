"""Holds a bundle against the rules of its format: hashes, graphs, borders, prompt banks, report."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, ValueInfoProto

from calibration.metrics import row_cosines
from runtime.backends import Border, image_border, text_border
from runtime.bank_file import load_bank
from runtime.bundle import Bundle
from runtime.classifier import Classifier
from runtime.errors import EdgeClipError
from runtime.golden import load_golden
from runtime.manifest import NAME, Precision, TextPrecision
from runtime.ort import OrtEncoder

from .encoder_graph import type_name
from .lint import PRECISIONS, lint

REPORT = "report/report.json"
TEXT_PRECISIONS = PRECISIONS[1:]  # fp32's file is the manifest's text_encoder
MIN_COSINE = 0.9999  # of the golden embeddings with what fp32 gives here
_INPUTS = {"frames": TensorProto.UINT8, "tokens": TensorProto.INT32}


def verify(folder: Path) -> list[str]:
    """Returns what is wrong with the bundle in `folder`, a line each; empty where it is sound.

    Raises BundleError where there is no bundle, or its manifest cannot be read.
    """
    bundle = Bundle(folder)
    faults = list(_files(bundle))
    if faults:  # what is damaged is not parsed
        return faults
    made = bundle.manifest
    faults += _precisions(bundle)
    for precision, entry in made.precisions.items():
        if precision in PRECISIONS:
            found = _encoder(bundle, entry.image, image_border(made), precision, entry.float_layers)
            faults += [f"{entry.image}: {fault}" for fault in found]
    found = _encoder(bundle, made.text_encoder, text_border(made), "fp32")
    faults += [f"{made.text_encoder}: {fault}" for fault in found]
    for precision, text in made.text_precisions.items():
        if precision in TEXT_PRECISIONS:
            found = _encoder(bundle, text.file, text_border(made), precision, text.float_layers)
            faults += [f"{text.file}: {fault}" for fault in found]
    return [*faults, *_prompts(bundle), *_golden(bundle)]


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


def _precisions(bundle: Bundle) -> Iterator[str]:
    """Known ones, fp32 among them, each accepted or rejected as the report says it was."""
    made = bundle.manifest
    if "fp32" not in made.precisions:
        yield "the manifest has no fp32, which the other precisions were judged by"
    if REPORT not in made.files:
        yield f"{REPORT} is missing"
        return
    try:
        report = json.loads(bundle.file(REPORT).read_text(encoding="utf-8"))
        images = {row["precision"]: row["status"] for row in report["precisions"]}
        texts = {row["precision"]: row["status"] for row in report.get("text_precisions", ())}
    except (ValueError, KeyError, TypeError) as error:
        yield f"{REPORT} is not a report: {error!r}"
        return
    yield from _statuses("", made.precisions, images, PRECISIONS)
    yield from _statuses("text ", made.text_precisions, texts, TEXT_PRECISIONS)


def _statuses(
    kind: str,
    entries: Mapping[str, Precision | TextPrecision],
    judged: Mapping[str, str],
    known: Sequence[str],
) -> Iterator[str]:
    for precision, entry in entries.items():
        if precision not in known:
            yield f"the {kind}precision {precision!r} is none of {', '.join(known)}"
        elif entry.status != judged.get(precision):
            yield (
                f"{kind}{precision} is marked as {entry.status} in the manifest, "
                f"as {judged.get(precision)} in {REPORT}"
            )


def _encoder(
    bundle: Bundle, name: str, border: Border, precision: str, float_layers: Sequence[str] = ()
) -> Iterator[str]:
    path = bundle.file(name)
    try:
        model = onnx.load(path, load_external_data=False)
        outside = list(_outside(model))
        if not outside:
            onnx.checker.check_model(model)
    except Exception as error:  # protobuf, checker and inference errors share no base
        yield f"not a valid ONNX file: {error}"
        return
    if outside:  # nothing reads what the manifest does not hold
        yield from outside
        return
    yield from _borders(model, border)
    yield from lint(model, precision, float_layers)
    yield from _rows(path, border)


def _outside(model: ModelProto) -> Iterator[str]:
    """The constants whose values lie in another file, which no hash of this one covers."""
    held = [a.t for node in model.graph.node for a in node.attribute if a.HasField("t")]
    for tensor in (*model.graph.initializer, *held):
        if tensor.data_location == TensorProto.EXTERNAL:
            yield f"{tensor.name}: its values lie in another file (external data)"


def _borders(model: ModelProto, border: Border) -> Iterator[str]:
    """Names, element types and sizes are the manifest's, after a batch of any size."""
    into = _in_words(_INPUTS[border.name], border.name, ["batch", *border.shape])
    out = _in_words(TensorProto.FLOAT, "embeddings", ["batch", border.dim])
    found = ", ".join(map(_value_in_words, model.graph.input))
    if found != into:
        yield f"inputs {found}, expected {into}"
    found = ", ".join(map(_value_in_words, model.graph.output))
    if found != out:
        yield f"outputs {found}, expected {out}"


def _value_in_words(value: ValueInfoProto) -> str:
    kind = value.type.tensor_type
    sizes: list[int | str] = [d.dim_value or d.dim_param or "?" for d in kind.shape.dim]
    if sizes and not kind.shape.dim[0].HasField("dim_value"):
        sizes[0] = "batch"  # by whatever name
    return _in_words(kind.elem_type, value.name, sizes)


def _in_words(kind: int, name: str, sizes: Sequence[int | str]) -> str:
    return f"{type_name(kind)} {name} [{', '.join(map(str, sizes))}]"


def _rows(path: Path, border: Border) -> Iterator[str]:
    """The file runs at batches of several sizes, and gives unit rows."""
    dtype = np.uint8 if border.name == "frames" else np.int32
    try:
        encoder = OrtEncoder(path, border)
        for batch in (1, 3):
            rows = encoder(np.zeros((batch, *border.shape), dtype=dtype))
            if not np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-4):
                yield f"its embeddings are not unit rows at batch {batch}"
    except EdgeClipError as error:
        yield str(error)


def _prompts(bundle: Bundle) -> Iterator[str]:
    """Uses the bundle as an application would: a label by every template, and every bank."""
    made = bundle.manifest
    frame = np.zeros((made.image.height, made.image.width, 3), np.uint8)
    text_encoder = made.files[made.text_encoder].sha256
    try:
        precision = "fp32" if "fp32" in made.precisions else next(iter(made.precisions))
        # not an engine of this device, nor whatever is fastest on it
        classifier = Classifier(bundle, backend="onnxruntime", precision=precision)
        classifier.set_labels(["a label"])
        classifier.classify(frame)
        for name, file in made.prompts.items():
            classifier.use_prompts(name)
            classifier.classify(frame)
            bank = load_bank(bundle.file(file), text_encoder, made.model.embedding_dim)
            for precision in sorted(set(bank.fitted) - set(made.precisions)):
                yield f"{file} is fitted to {precision}, which is no precision of this bundle"
    except EdgeClipError as error:
        yield str(error)


def _golden(bundle: Bundle) -> Iterator[str]:
    """The golden embeddings are those of the fp32 encoders."""
    made = bundle.manifest
    if made.golden is None:
        yield "it has no golden inputs, which TensorRT engines are tested on"
    if made.golden is None or "fp32" not in made.precisions:
        return
    try:
        golden = load_golden(bundle.file(made.golden), made)
        image = OrtEncoder(bundle.file(made.precisions["fp32"].image), image_border(made))
        text = OrtEncoder(bundle.file(made.text_encoder), text_border(made))
        for name, encoder, inputs, rows in (
            ("frames", image, golden.frames, golden.embeddings),
            ("texts", text, golden.tokens, golden.text_embeddings),
        ):
            if not row_cosines(encoder(inputs), rows).min() >= MIN_COSINE:  # nan is not, either
                yield f"{made.golden}: the embeddings of its {name} are not those of fp32"
    except EdgeClipError as error:
        yield str(error)
