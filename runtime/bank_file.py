"""Prompt banks as files: safetensors, with what is not an array as JSON in the metadata."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from .errors import BundleError, DataError, UnsupportedFormat
from .label_sets import LabelSet, parse_labels
from .prompts import Embeddings, PromptBank
from .unknown import Fitted


def save_bank(bank: PromptBank, path: Path) -> None:
    """Writes a bank. Labels, templates, the label set in its long form and what was fitted go into
    the metadata, as JSON."""
    metadata = {
        "labels": json.dumps(bank.labels, ensure_ascii=False),
        "templates": json.dumps(bank.templates, ensure_ascii=False),
        "text_encoder": bank.text_encoder,
        "fitted": msgspec.json.encode(bank.fitted).decode(),
    }
    arrays = {"embeddings": bank.embeddings}
    if bank.label_set is not None:
        metadata["label_set"] = json.dumps(bank.label_set.as_given(), ensure_ascii=False)
    if bank.other_embeddings is not None:
        arrays["other_embeddings"] = bank.other_embeddings
    path.write_bytes(save(arrays, metadata=metadata))


def load_bank(path: Path, text_encoder: str, dim: int) -> PromptBank:
    """Reads a bank that `save_bank` wrote, now or in an older release.

    Raises BundleError where it was made by another text encoder than the one with the SHA-256
    `text_encoder`, and UnsupportedFormat where the file is not a bank of `dim` dimensions.
    """
    bank = read_bank(path, dim)
    if bank.text_encoder != text_encoder:
        raise BundleError(
            f"{path} was made by another text encoder than the bundle's; "
            "make it again, or pass labels="
        )
    return bank


def read_bank(path: Path, dim: int) -> PromptBank:
    """Reads a bank, whatever text encoder made it. Raises UnsupportedFormat."""
    try:
        with safe_open(path, framework="numpy") as stream:
            metadata = stream.metadata() or {}
            arrays = {name: stream.get_tensor(name) for name in stream.keys()}
        labels, templates = json.loads(metadata["labels"]), json.loads(metadata["templates"])
        label_set = _label_set(json.loads(metadata.get("label_set", "null")), labels)
        bank = PromptBank(
            labels=tuple(labels),
            embeddings=arrays["embeddings"],
            templates=tuple(templates),
            text_encoder=metadata["text_encoder"],
            fitted=msgspec.json.decode(metadata.get("fitted", "{}"), type=dict[str, Fitted]),
            label_set=label_set,
            other_embeddings=arrays.get("other_embeddings"),
        )
        fits = labels and _is_texts(labels) and _is_texts(templates) and _fits(bank, dim)
    except Exception as error:  # safetensors, JSON and dtypes each fail in their own way
        raise UnsupportedFormat(f"{path} is not a prompt bank: {error}") from error
    if not fits:
        raise UnsupportedFormat(f"{path} is not a prompt bank of {dim} dimensions; export it again")
    if not np.allclose(np.linalg.norm(bank.rows, axis=1), 1, atol=1e-3):
        raise UnsupportedFormat(f"{path}: the embeddings are not unit rows; export it again")
    return bank


def _label_set(given: Any, labels: list[str]) -> LabelSet | None:
    """The label set in the order of the bank's rows: its groups may have moved labels."""
    if given is None:
        return None
    found = parse_labels(given)
    named = dict(zip(found.names, found.labels, strict=True))
    if sorted(named) != sorted(labels):
        raise DataError("its label set does not name its labels")
    return LabelSet(tuple(named[name] for name in labels), found.background, found.templates)


def _fits(bank: PromptBank, dim: int) -> bool:
    others = len(bank.made_of.others)
    return _has_shape(bank.embeddings, (len(bank.labels), dim)) and (
        bank.other_embeddings is None
        if not others
        else bank.other_embeddings is not None and _has_shape(bank.other_embeddings, (others, dim))
    )


def _has_shape(rows: Embeddings, shape: tuple[int, int]) -> bool:
    return rows.shape == shape and rows.dtype == np.float32


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
