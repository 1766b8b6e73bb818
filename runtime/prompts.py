"""Prompt banks: the text side of zero-shot classification, computed once.

A label becomes prompts (each synonym put into each template); a label's embedding is the mean of
its prompts' unit embeddings, made unit again (Radford et al. 2021, "Learning Transferable Visual
Models From Natural Language Supervision", section 3.1.4). A bank is bound to the text encoder
that made it.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from .errors import BundleError, DataError, UnsupportedFormat
from .manifest import Head

Embeddings = NDArray[np.float32]
Labels = Sequence[str] | Mapping[str, Sequence[str]]
DEFAULT_TEMPLATES = ("a photo of {}",)


class Fitted(msgspec.Struct, frozen=True, kw_only=True):
    """What was fitted to frames for one precision: a head whose scores can be believed, and the
    score below which a frame is of none of the labels."""

    head: Head
    threshold: Annotated[float, msgspec.Meta(ge=0, le=1)]


@dataclass(frozen=True, eq=False)
class PromptBank:
    """Labels and their embeddings, float32 unit rows [N, D].

    `text_encoder` is the SHA-256 of the ONNX file that made them. `fitted` has an entry for each
    precision whose scores were fitted to frames; the others use the model's own head.
    """

    labels: tuple[str, ...]
    embeddings: Embeddings
    templates: tuple[str, ...]
    text_encoder: str
    fitted: Mapping[str, Fitted] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"PromptBank({len(self.labels)} labels, {self.embeddings.shape[1]} dimensions)"


def build_bank(
    labels: Labels,
    templates: Sequence[str],
    embed_text: Callable[[Sequence[str]], Embeddings],
    text_encoder: str,
) -> PromptBank:
    """Embeds every prompt and averages per label.

    `labels` is a list, or a mapping from each label to its synonyms. Raises DataError for empty
    or repeated labels, or a template without `{}`.
    """
    synonyms = _synonyms(labels)
    templates = check_templates(templates)
    rows = embed_text(prompts_of(labels, templates))
    sizes = [len(names) * len(templates) for names in synonyms.values()]
    means = np.stack([part.mean(axis=0) for part in np.split(rows, np.cumsum(sizes)[:-1])])
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    return PromptBank(tuple(synonyms), means.astype(np.float32), templates, text_encoder)


def prompts_of(labels: Labels, templates: Sequence[str]) -> list[str]:
    """Every name of every label in every template, label by label. Raises as `build_bank` does."""
    templates = check_templates(templates)
    return [
        template.replace("{}", name)
        for names in _synonyms(labels).values()
        for name in names
        for template in templates
    ]


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Returns the templates as a tuple; raises DataError for one without `{}`, or for none."""
    if isinstance(templates, str) or not templates:
        raise DataError("templates are a non-empty list of texts with {} where the label goes")
    for template in templates:
        if "{}" not in template:
            raise DataError(f"the template {template!r} has no {{}} where the label goes")
    return tuple(templates)


def _synonyms(labels: Labels) -> dict[str, tuple[str, ...]]:
    if isinstance(labels, str):
        raise DataError(f"labels are a list of texts, not the one text {labels!r}")
    if not isinstance(labels, Mapping):
        labels = list(labels)
        twice = sorted({str(label) for label in labels if labels.count(label) > 1})
        if twice:
            raise DataError(f"these labels are given more than once: {', '.join(twice)}")
        labels = {label: [label] for label in labels if _is_label(label)}
    if not labels:
        raise DataError("at least one label is needed")
    for label, names in labels.items():
        if isinstance(names, str) or not isinstance(names, Sequence) or not names:
            raise DataError(f"the synonyms of {label!r} are a list of texts, not {names!r}")
        _is_label(label)
        for name in names:
            _is_label(name)
    return {label: tuple(names) for label, names in labels.items()}


def _is_label(label: object) -> bool:
    """True, or DataError where `label` is not a text that says something."""
    if not isinstance(label, str) or not label.strip():
        raise DataError(f"a label or synonym is a text that is not empty, not {label!r}")
    return True


def save_bank(bank: PromptBank, path: Path) -> None:
    """Writes a bank as safetensors; labels and templates go into the metadata as JSON."""
    metadata = {
        "labels": json.dumps(bank.labels, ensure_ascii=False),
        "templates": json.dumps(bank.templates, ensure_ascii=False),
        "text_encoder": bank.text_encoder,
        "fitted": msgspec.json.encode(bank.fitted).decode(),
    }
    path.write_bytes(save({"embeddings": bank.embeddings}, metadata=metadata))


def load_bank(path: Path, text_encoder: str, dim: int) -> PromptBank:
    """Reads a bank that `save_bank` wrote.

    Raises BundleError where it was made by another text encoder than the one with the SHA-256
    `text_encoder`, and UnsupportedFormat where the file is not a bank of `dim` dimensions.
    """
    try:
        with safe_open(path, framework="numpy") as stream:
            metadata, embeddings = stream.metadata() or {}, stream.get_tensor("embeddings")
        labels = json.loads(metadata["labels"])
        templates = json.loads(metadata["templates"])
        made_by = metadata["text_encoder"]
        fitted = msgspec.json.decode(metadata.get("fitted", "{}"), type=dict[str, Fitted])
    except Exception as error:  # safetensors, JSON and dtypes each fail in their own way
        raise UnsupportedFormat(f"{path} is not a prompt bank: {error}") from error
    texts = labels and _is_texts(labels) and _is_texts(templates)
    if not texts or embeddings.shape != (len(labels), dim) or embeddings.dtype != np.float32:
        raise UnsupportedFormat(f"{path} is not a prompt bank of {dim} dimensions; export it again")
    if not np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-3):
        raise UnsupportedFormat(f"{path}: the embeddings are not unit rows; export it again")
    if made_by != text_encoder:
        raise BundleError(
            f"{path} was made by another text encoder than the bundle's; "
            "make it again, or pass labels="
        )
    return PromptBank(tuple(labels), embeddings, tuple(templates), made_by, fitted)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def read_labels(given: str) -> Labels:
    """Labels from the command line: a file (a label a line, or JSON: a list, or an object of label
    and synonyms), or texts with commas between them. Raises DataError."""
    path = Path(given).expanduser()
    if path.suffix not in (".txt", ".json") and not os.path.isfile(path):
        return [name.strip() for name in given.split(",") if name.strip()]
    content = _read_text(path)
    if path.suffix != ".json":
        return [line.strip() for line in content.splitlines() if line.strip()]
    try:
        labels = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    lists = labels.values() if isinstance(labels, dict) else [labels]
    if not all(_is_texts(texts) for texts in lists):
        raise DataError(f'{path}: expected ["label", ...] or {{"label": ["synonym", ...], ...}}')
    return labels  # type: ignore[no-any-return]


def read_templates(given: Sequence[str]) -> tuple[str, ...]:
    """Templates from the command line: texts with {}, or one file with a template a line."""
    if len(given) == 1 and "{}" not in given[0]:
        if not os.path.isfile(Path(given[0]).expanduser()):
            raise DataError(f"{given[0]!r} is neither a template with {{}} nor a file of templates")
        lines = _read_text(Path(given[0]).expanduser()).splitlines()
        given = [line.strip() for line in lines if line.strip()]
    return check_templates(given)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a text file: {error}") from error
