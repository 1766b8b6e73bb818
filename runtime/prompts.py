"""Prompt banks: the text side of zero-shot classification, computed once.

A label becomes prompts (each synonym put into each template); a label's embedding is the mean of
its prompts' unit embeddings, made unit again (Radford et al. 2021, "Learning Transferable Visual
Models From Natural Language Supervision", section 3.1.4). What competes with the labels, negative
prompts and background, is embedded alike, a row for each text. A bank is bound to the text encoder
that made it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .errors import DataError
from .label_sets import Label, Labels, LabelSet, check_templates, filled, parse_labels
from .layout import Layout, layout_of
from .unknown import Fitted

Embeddings = NDArray[np.float32]
EmbedText = Callable[[Sequence[str]], Embeddings]


@dataclass(frozen=True, eq=False)
class PromptBank:
    """Labels and their embeddings, float32 unit rows [N, D].

    `text_encoder` is the SHA-256 of the ONNX file that made them. `fitted` has an entry for each
    precision whose scores were fitted to frames; the others use the model's own head. `label_set`
    is what the bank was made of; None in banks of older releases, which are plain lists.
    `other_embeddings` are the unit rows [E, D] of what competes with the labels
    (`LabelSet.others`); None where nothing does.
    """

    labels: tuple[str, ...]
    embeddings: Embeddings
    templates: tuple[str, ...]
    text_encoder: str
    fitted: Mapping[str, Fitted] = field(default_factory=dict)
    label_set: LabelSet | None = None
    other_embeddings: Embeddings | None = None

    @cached_property
    def made_of(self) -> LabelSet:
        """`label_set`; where that is not known, the labels as their own synonyms."""
        return self.label_set or parse_labels(self.labels)

    @cached_property
    def rows(self) -> Embeddings:
        """All rows that take part in the scores, float32 [N + E, D]: labels, then the others."""
        if self.other_embeddings is None:
            return self.embeddings
        return np.concatenate([self.embeddings, self.other_embeddings])

    @cached_property
    def layout(self) -> Layout:
        """Which rows are whose."""
        return layout_of(self.made_of)

    def __repr__(self) -> str:
        return f"PromptBank({len(self.labels)} labels, {self.embeddings.shape[1]} dimensions)"


def build_bank(
    labels: Labels, templates: Sequence[str], embed_text: EmbedText, text_encoder: str
) -> PromptBank:
    """Embeds every prompt and averages per label.

    `labels` are in any of the forms of `runtime.label_sets`; `templates` are for a set that has
    none of its own. `embed_text` is called once, with `prompts_of(labels, templates)`. Raises
    DataError for empty or repeated labels, or a template without `{}`.
    """
    label_set = parse_labels(labels)
    templates = _templates(label_set, templates)
    texts = [label.texts(templates) for label in label_set.labels]
    texts += [filled(text, templates) for text in label_set.others]
    rows = _means(embed_text([text for own in texts for text in own]), texts)
    count = len(label_set.labels)
    return PromptBank(
        label_set.names,
        rows[:count],
        templates,
        text_encoder,
        label_set=label_set,
        other_embeddings=rows[count:] if label_set.others else None,
    )


def prompts_of(labels: Labels, templates: Sequence[str]) -> list[str]:
    """Every text that a bank of these labels is made of: the prompts label by label, then those of
    what competes with them. Raises as `build_bank` does."""
    label_set = parse_labels(labels)
    templates = _templates(label_set, templates)
    own = [text for label in label_set.labels for text in label.texts(templates)]
    return own + [text for other in label_set.others for text in filled(other, templates)]


def with_label(bank: PromptBank, label: Label, embed_text: EmbedText) -> PromptBank:
    """The bank with one label more, as the last: only its own texts are embedded.

    Nothing is `fitted` then: heads and thresholds were fitted for the labels as they were. Raises
    DataError where the name is taken or a text contradicts another label.
    """
    known = bank.made_of
    if label.name in known.names:
        raise DataError(f"there is a label {label.name!r} already: remove it first")
    label_set = dataclasses.replace(known, labels=(*known.labels, label))
    new = [text for text in label_set.others if text not in known.others]
    texts = [label.texts(bank.templates), *(filled(text, bank.templates) for text in new)]
    rows = _means(embed_text([text for own in texts for text in own]), texts)
    others = _other_rows(bank) | dict(zip(new, rows[1:], strict=True))
    return _changed(bank, label_set, np.concatenate([bank.embeddings, rows[:1]]), others)


def without_label(bank: PromptBank, name: str) -> PromptBank:
    """The bank without one of its labels, and without what was fitted. Raises DataError where it
    has no such label, or no other."""
    known = bank.made_of
    if name not in known.names:
        raise DataError(f"there is no label {name!r}; there are: {', '.join(known.names)}")
    kept = [n for n, own in enumerate(known.names) if own != name]
    label_set = dataclasses.replace(known, labels=tuple(known.labels[n] for n in kept))
    return _changed(bank, label_set, bank.embeddings[kept], _other_rows(bank))


def _changed(
    bank: PromptBank, label_set: LabelSet, embeddings: Embeddings, others: Mapping[str, Embeddings]
) -> PromptBank:
    rows = [others[text] for text in label_set.others]
    return PromptBank(
        label_set.names,
        embeddings,
        bank.templates,
        bank.text_encoder,
        label_set=label_set,
        other_embeddings=np.stack(rows) if rows else None,
    )


def _other_rows(bank: PromptBank) -> dict[str, Embeddings]:
    if bank.other_embeddings is None:
        return {}
    return dict(zip(bank.made_of.others, bank.other_embeddings, strict=True))


def _templates(label_set: LabelSet, otherwise: Sequence[str]) -> tuple[str, ...]:
    return check_templates(otherwise if label_set.templates is None else label_set.templates)


def _means(rows: Embeddings, texts: Sequence[Sequence[str]]) -> Embeddings:
    """The unit mean of each list's rows, which follow each other in `rows`."""
    ends = np.cumsum([len(own) for own in texts])
    means = np.stack([part.mean(axis=0) for part in np.split(rows, ends[:-1])])
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    return means.astype(np.float32)
