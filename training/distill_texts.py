"""The texts that a student's own text tower learns from."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.errors import DataError
from runtime.label_sets import Labels, filled
from runtime.prompts import prompts_of


@dataclass(frozen=True)
class Texts:
    """Texts to learn from, and those to compare on; each once."""

    learn: tuple[str, ...]
    compare: tuple[str, ...]


def gather_texts(
    file: Path | None,
    labels: Labels | None,
    captions: Sequence[str],
    templates: Sequence[str],
    share: float,
    seed: int,
) -> Texts:
    """The prompts of the labels, the captions, and each line of `file` as it is and in the
    templates. `share` of the lines, or without any of the captions, is set apart to compare on;
    where there are neither, the prompts are compared on.

    Raises DataError where there is nothing to learn from.
    """
    prompts = [] if labels is None else prompts_of(labels, templates)
    lines = [] if file is None else read_lines(file)
    learned, apart = _split(lines or list(captions), share, seed)
    if lines:
        learned, apart = ([t for line in s for t in (line, *filled(line, templates))]
                          for s in (learned, apart))  # fmt: skip
    known = dict.fromkeys([*prompts, *learned, *(captions if lines else ())])
    if len(known) < 2:
        raise DataError(
            "--student-text: there are no texts to learn from: give --labels, words or texts by "
            "--texts, or pictures with captions"
        )
    compare = tuple(t for t in dict.fromkeys(apart) if t not in known)
    return Texts(tuple(known), compare or tuple(dict.fromkeys(prompts)) or tuple(known))


def read_lines(file: Path) -> list[str]:
    """The lines of a text file that hold something, each once. Raises DataError."""
    try:
        content = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"--texts {file} cannot be read as UTF-8: {error}") from error
    lines = _once(line.strip() for line in content.splitlines())
    if not lines:
        raise DataError(f"--texts {file} holds no text")
    return lines


def _once(texts: Iterable[str]) -> list[str]:
    return [text for text in dict.fromkeys(texts) if text]


def _split(texts: Sequence[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """By lot, the same for a seed."""
    order = np.random.default_rng((seed, 3)).permutation(len(texts)).tolist()
    apart = set(order[: round(share * len(texts))])
    return (
        [text for i, text in enumerate(texts) if i not in apart],
        [text for i, text in enumerate(texts) if i in apart],
    )
