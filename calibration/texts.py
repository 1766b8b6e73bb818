"""The texts that a text encoder is calibrated and judged on: prompts, captions, probes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.label_sets import Labels
from runtime.prompts import prompts_of

from .candidates import TABLES, list_files
from .frame_set import lot
from .pairs import read_pairs

FEWEST = 16  # distinct texts, for the ranges of int8

Tokens = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Texts:
    """Tokens, int32 [N, L], of texts to calibrate and to judge on. No text is in both, unless there
    are too few for that: then `judged` is the same as `calibration`."""

    calibration: Tokens
    judged: Tokens

    @property
    def apart(self) -> bool:
        """Whether it is judged on texts that it was not calibrated on."""
        return self.judged is not self.calibration


def find_texts(
    sources: Sequence[Path],
    labels: Labels | None,
    templates: Sequence[str],
    probes: Sequence[str],
    most: int,
    seed: int,
) -> list[str]:
    """The texts that there are: `probes`, and at most `most` of the prompts and of the captions.

    `sources` are those of the frames (see `list_files`). The prompts are the labels in all
    templates; without `labels`, those of the sources. Captions are those of tables.
    """
    if labels is None:
        labels = _labels(sources)
    prompts = prompts_of(labels, templates) if labels else []
    return [*probes, *_drawn(prompts, most, seed), *_drawn(_captions(sources), most, seed)]


def split_texts(
    texts: Sequence[str], tokenizer: Callable[[Sequence[str]], Tokens], seed: int
) -> Texts:
    """Every second text, by lot, to calibrate on and the others to judge on; all for both where
    a half would be fewer than FEWEST. Texts with the same tokens count as one."""
    rows = {row.tobytes(): row for row in tokenizer(texts)}
    tokens = np.stack([rows[key] for key in sorted(rows, key=lambda key: lot(seed, key))])
    if len(tokens) < 2 * FEWEST:
        return Texts(tokens, tokens)
    return Texts(tokens[::2], tokens[1::2])


def _labels(sources: Sequence[Path]) -> list[str]:
    listed = list_files(sources, max_bad=1)[0] if sources else []
    return sorted({item.label for item in listed if item.label is not None})


def _captions(sources: Sequence[Path]) -> list[str]:
    tables = [path.expanduser() for path in sources if path.suffix.lower() in TABLES]
    found = [read_pairs(path, ["{}"]) for path in tables if path.is_file()]
    return [text for pairs in found if not pairs.classes for text in pairs.texts]


def _drawn(texts: Iterable[str], most: int, seed: int) -> list[str]:
    """At most `most` of the distinct texts, the same on every machine."""
    return sorted(set(texts), key=lambda text: lot(seed, text))[:most]
