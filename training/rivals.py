"""Held-out pictures on which a student is held against its teacher, epoch after epoch."""

from collections.abc import Sequence

import numpy as np
from rich.progress import Progress

from calibration.against import Against, against
from calibration.embed import Pictures, embed_pictures
from calibration.evaluation import Evaluation, evaluate
from calibration.metrics import Floats
from calibration.pairs import Bad, Pairs
from runtime.manifest import ImageSpec
from runtime.prompts import PromptBank, build_bank

from .cost import multiply_adds, parameters, tower_as_exported
from .evaluate import head, image_encoder
from .heldout import KEEP
from .model import ClipModel
from .teacher import Teacher

Figures = dict[str, float]


class Rivals:
    """The pictures of `pairs` as both see them at run time, and what the teacher says of them,
    `said` [N, D].

    With labels or captions both are evaluated; over the labels, else over `bank`, it is told how
    often they agree. `templates` go with labels.
    """

    def __init__(
        self,
        teacher: Teacher,
        pairs: Pairs,
        said: Floats,
        bank: PromptBank | None,
        templates: Sequence[str],
        spec: ImageSpec,
    ) -> None:
        self._teacher, self._said, self._templates = teacher, said, templates
        self.pairs = pairs
        self._pictures = Pictures(pairs.files, spec, KEEP)
        self._head = head(teacher.clip)
        self._bank = (bank.labels, bank.embeddings) if bank else None
        if pairs.targets is not None:
            self._bank = pairs.classes, _class_rows(teacher, pairs, templates)
        self._teachers = self._evaluated(pairs, said)
        self.student: Evaluation | None = None
        self.bad: tuple[Bad, ...] = pairs.bad

    def measure(self, clip: ClipModel, progress: Progress) -> Figures:
        """The figures of a student's evaluation, teacher_cosine and agreement."""
        return self._measure(clip, progress)[0]

    def compare(self, clip: ClipModel, progress: Progress) -> Against:
        """All that a report says of a student and its teacher."""
        figures, pairs, rows, said = self._measure(clip, progress)
        both = {}
        if self._teachers and self.student:
            others = self._teachers.figures
            both = {name: (value, others[name]) for name, value in self.student.figures.items()}
        bank = None if self._bank is None else (*self._bank, self._head)
        return against(rows, said, pairs.files, both, self._sizes(clip), bank, pairs.targets)

    def _measure(
        self, clip: ClipModel, progress: Progress
    ) -> tuple[Figures, Pairs, Floats, Floats]:
        task = progress.add_task("comparing with the teacher", total=len(self.pairs))
        kept, rows = embed_pictures(
            self.pairs, self._pictures, image_encoder(clip), lambda n: progress.advance(task, n)
        )
        progress.remove_task(task)
        self.bad = kept.bad
        place = {file: i for i, file in enumerate(self.pairs.files)}
        said = self._said[[place[file] for file in kept.files]]
        self.student = self._evaluated(kept, rows)
        figures = dict(self.student.figures) if self.student else {}
        figures["teacher_cosine"] = float((rows * said).sum(axis=1).mean())
        if self._bank:
            own, other = ((r @ self._bank[1].T).argmax(axis=1) for r in (rows, said))
            figures["agreement"] = float((own == other).mean())
        return figures, kept, rows, said

    def _evaluated(self, pairs: Pairs, rows: Floats) -> Evaluation | None:
        """The evaluation of these embeddings; None without labels and captions."""
        if pairs.targets is None and not all(pairs.captions):
            return None
        return evaluate(pairs, rows, self._teacher.read, self._head, self._templates)

    def _sizes(self, clip: ClipModel) -> list[tuple[str, str, str]]:
        rows = []
        for what, value in (
            ("name", lambda c: c.name),
            ("input", lambda c: f"{c.image.width} x {c.image.height}"),
            ("parameters of the image tower", lambda c: f"{parameters(tower_as_exported(c)):,}"),
            ("multiply-adds of a frame", lambda c: f"{multiply_adds(c):,}"),
        ):
            rows.append((what, value(clip), value(self._teacher.clip)))
        return rows


def _class_rows(teacher: Teacher, pairs: Pairs, templates: Sequence[str]) -> Floats:
    return build_bank(pairs.classes, templates, teacher.read, "").embeddings


def split(pairs: Pairs, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows to learn from and rows to compare on, `share` of all: by lot, the same for a seed."""
    order = np.random.default_rng((seed, 2)).permutation(len(pairs))
    count = round(share * len(pairs))
    return sorted(order[count:].tolist()), sorted(order[:count].tolist())
