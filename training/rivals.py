"""Held-out pictures on which a student is held against its teacher, epoch after epoch."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

from rich.progress import Progress

from calibration.against import Against, Banks, against
from calibration.embed import Pictures, embed_pictures
from calibration.evaluation import Evaluation, evaluate
from calibration.metrics import Floats
from calibration.pairs import Bad, Pairs
from runtime.frames import Frame
from runtime.label_sets import Labels
from runtime.manifest import ImageSpec
from runtime.prompts import EmbedText, PromptBank, build_bank

from .cost import multiply_adds, parameters, text_parameters, tower_as_exported
from .embedding_store import Digests
from .evaluate import head, image_encoder, text_encoder
from .heldout import KEEP
from .model import ClipModel
from .teacher import Teacher

Figures = dict[str, float]
Encode = Callable[[Frame], Floats]


class Rivals:
    """The pictures of `pairs` as both see them at run time, and what the teacher says of them,
    `said` [N, D].

    With labels or captions both are evaluated; over the labels, else over `labels`, it is told how
    often they agree. `templates` go with labels. Where the student has a text tower of its own, it
    is named by that, and `texts` are what both text towers are compared on; else they are empty.
    """

    def __init__(
        self,
        teacher: Teacher,
        pairs: Pairs,
        said: Floats,
        labels: Labels | None,
        templates: Sequence[str],
        spec: ImageSpec,
        texts: Sequence[str] = (),
    ) -> None:
        self._teacher, self._said, self._templates = teacher, said, templates
        self.pairs, self._texts = pairs, texts
        self._pictures = Pictures(pairs.files, spec, KEEP)
        self._head = head(teacher.clip)
        self._labels = labels if pairs.targets is None else pairs.classes
        self._bank = self._bank_of(teacher.read)
        self._teachers = self._evaluated(pairs, said, teacher.read)
        self.student: Evaluation | None = None
        self.bad: tuple[Bad, ...] = pairs.bad

    def measure(self, clip: ClipModel, progress: Progress) -> Figures:
        """The figures of a student's evaluation, teacher_cosine, agreement and text_cosine."""
        return self._measure(image_encoder(clip), self._reads(clip), progress)[0]

    def measure_as(self, encode: Encode, read: EmbedText) -> Figures:
        """The same of a student that others run: its encoders of frames uint8 RGB [N, H, W, 3] and
        of texts, both to unit rows [N, D]."""
        return self._measure(encode, read, Progress(disable=True))[0]

    @property
    def teachers(self) -> Figures:
        """The figures of the teacher's own evaluation; empty without labels and captions."""
        return dict(self._teachers.figures) if self._teachers else {}

    def compare(self, clip: ClipModel, progress: Progress) -> Against:
        """All that a report says of a student and its teacher."""
        read = self._reads(clip)
        figures, pairs, rows, said = self._measure(image_encoder(clip), read, progress)
        bank = self._bank_of(read)
        both = {}
        if self.student:
            others = self.teachers
            both = {name: (value, others[name]) for name, value in self.student.figures.items()}
        banks = None
        if bank and self._bank:
            banks = Banks(bank.labels, bank.embeddings, self._bank.embeddings, self._head)
        found = against(rows, said, pairs.files, both, self._sizes(clip), banks, pairs.targets)
        borrowed = self._evaluated(pairs, rows, self._teacher.read) if self._texts else None
        return dataclasses.replace(
            found,
            text_cosine=figures.get("text_cosine"),
            borrowed=borrowed.figures if borrowed else {},
        )

    def _measure(
        self, encode: Encode, read: EmbedText, progress: Progress
    ) -> tuple[Figures, Pairs, Floats, Floats]:
        task = progress.add_task("comparing with the teacher", total=len(self.pairs))
        kept, rows = embed_pictures(
            self.pairs, self._pictures, encode, lambda n: progress.advance(task, n)
        )
        progress.remove_task(task)
        self.bad = kept.bad
        place = {file: i for i, file in enumerate(self.pairs.files)}
        said = self._said[[place[file] for file in kept.files]]
        self.student = self._evaluated(kept, rows, read)
        figures = dict(self.student.figures) if self.student else {}
        figures["teacher_cosine"] = float((rows * said).sum(axis=1).mean())
        if (bank := self._bank_of(read)) and self._bank:
            own = (rows @ bank.embeddings.T).argmax(axis=1)
            other = (said @ self._bank.embeddings.T).argmax(axis=1)
            figures["agreement"] = float((own == other).mean())
        if self._texts:
            both = read(self._texts) * self._teacher.read(self._texts)
            figures["text_cosine"] = float(both.sum(axis=1).mean())
        return figures, kept, rows, said

    def _reads(self, clip: ClipModel) -> EmbedText:
        """What turns texts into embeddings for the student."""
        return text_encoder(clip, self._teacher.tokenizer) if self._texts else self._teacher.read

    def _bank_of(self, read: EmbedText) -> PromptBank | None:
        if self._labels is None:
            return None
        return build_bank(self._labels, self._templates, read, "")

    def _evaluated(self, pairs: Pairs, rows: Floats, read: EmbedText) -> Evaluation | None:
        """The evaluation of these embeddings; None without labels and captions."""
        if pairs.targets is None and not all(pairs.captions):
            return None
        return evaluate(pairs, rows, read, self._head, self._templates)

    def _sizes(self, clip: ClipModel) -> list[tuple[str, str, str]]:
        rows = []
        for what, value in (
            ("name", lambda c: c.name),
            ("input", lambda c: f"{c.image.width} x {c.image.height}"),
            ("parameters of the image tower", lambda c: f"{parameters(tower_as_exported(c)):,}"),
            ("multiply-adds of a frame", lambda c: f"{multiply_adds(c):,}"),
            ("parameters of the text tower", lambda c: f"{text_parameters(c):,}"),
        ):
            rows.append((what, value(clip), value(self._teacher.clip)))
        return rows


def split(digests: Digests, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows to learn from and rows to compare on, `share` of all, by the digests of the pictures
    [N, 16] and the seed: equal pictures stay together, and more pictures move few others."""
    lots = [hashlib.blake2b(own.tobytes(), key=str(seed).encode()).digest() for own in digests]
    count = round(share * len(lots))
    last = sorted(lots)[count - 1] if count else b""
    parts: tuple[list[int], list[int]] = ([], [])
    for row, lot in enumerate(lots):
        parts[lot <= last].append(row)
    return parts
