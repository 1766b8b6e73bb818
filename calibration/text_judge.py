"""What a text encoder costs: the texts that it turns, and the frames that it names otherwise."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.label_sets import Labels, parse_labels
from runtime.prompts import build_bank, prompts_of

from .gate import Cost, Encode, relabelled, turned
from .metrics import Counts, Floats
from .texts import Tokens

BATCH = 8
MOST_PROMPTS = 2048  # embedded by each encoder that is judged


@dataclass(frozen=True, eq=False)
class Naming:
    """Frames, and the labels that they are named by.

    `frames` are the fp32 image encoder's unit rows [F, D] and `targets` the frames' labels [F] or
    None; `prompts` are the labels in the `templates` (the first ones of `of`) as tokens [P, L], and
    `reference` the fp32 text encoder's unit rows of these [P, D].
    """

    frames: Floats
    targets: Counts | None
    labels: Labels
    templates: tuple[str, ...]
    of: int
    prompts: Tokens
    reference: Floats

    def best(self, rows: Floats) -> Counts:
        """The best label of each frame [F] by the bank of these embeddings of the prompts."""
        finite = np.nan_to_num(rows, posinf=0, neginf=0)
        bank = build_bank(self.labels, self.templates, lambda _: finite, "")
        return np.asarray((self.frames @ bank.embeddings.T).argmax(axis=1), np.int64)


def naming(
    frames: Floats,
    targets: Counts | None,
    labels: Labels,
    templates: Sequence[str],
    tokenizer: Callable[[Sequence[str]], Tokens],
    encode: Encode,
) -> Naming:
    """The same from fp32's text encoder. Of many prompts only those of the first templates are
    taken, such that they are about MOST_PROMPTS."""
    label_set = parse_labels(labels)
    whole = label_set.templates or tuple(templates)
    bare = dataclasses.replace(label_set, templates=None)
    some = whole[: max(1, MOST_PROMPTS // len(prompts_of(bare, ["{}"])))]
    prompts = tokenizer(prompts_of(bare, some))
    return Naming(frames, targets, bare, some, len(whole), prompts, embedded(encode, prompts))


@dataclass(frozen=True, eq=False)
class TextJudge:
    """Texts that were not calibrated on, as tokens [N, L], and fp32's unit rows of them [N, D];
    and frames that are named by the encoder's prompts, where there are any."""

    tokens: Tokens
    reference: Floats
    naming: Naming | None = None

    def first(self, count: int) -> "TextJudge":
        """The same with only the first `count` texts, and no frames: they take all prompts."""
        return TextJudge(self.tokens[:count], self.reference[:count])

    def cost(self, encode: Encode) -> Cost:
        """What an encoder costs. A text whose embedding is not finite counts as cosine -1."""
        cost = turned(self.reference, embedded(encode, self.tokens))
        cost = dataclasses.replace(cost, texts=len(self.tokens), frames=0)
        if self.naming is None:
            return cost
        after = self.naming.best(embedded(encode, self.naming.prompts))
        before = self.naming.best(self.naming.reference)
        return relabelled(cost, before, after, self.naming.targets)


def embedded(encode: Encode, inputs: NDArray[Any]) -> Floats:
    """The embeddings [N, D] of tokens [N, L] or frames [N, H, W, 3], in batches."""
    return np.concatenate([encode(inputs[at : at + BATCH]) for at in range(0, len(inputs), BATCH)])
