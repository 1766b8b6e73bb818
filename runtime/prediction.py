"""The one result type: what a frame was taken for."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .layout import Tree
from .manifest import Head

_NO_SCORES: NDArray[np.float32] = np.empty(0, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Prediction:
    """Labels of one frame, best first by `top`.

    `scores` are the model's probabilities (softmax over the labels and what competes with them, or
    a sigmoid each; 0 for a label that a negative prompt rules out), `cosines` the raw
    similarities, both float32 [N] in the order of `labels`. `timings` are milliseconds by stage, of
    the whole batch where frames were classified together.

    `best` is the position of the label that was chosen coarse to fine (None: by cosine alone),
    `ruled_out` bool [N] where labels have negative prompts, `background` the background text that
    fits the frame better than every label, if one does. `tree` has the groups of labels, and
    `group_scores` float32 [G] theirs. `certainty` is held against `threshold` where that was fitted
    to another measure than the score (see `runtime.unknown`).
    """

    labels: tuple[str, ...]
    scores: NDArray[np.float32]
    cosines: NDArray[np.float32]
    threshold: float = 0.0
    timings: Mapping[str, float] = field(default_factory=dict)
    backend: str = ""
    best: int | None = None
    ruled_out: NDArray[np.bool_] | None = None
    background: str | None = None
    tree: Tree | None = None
    group_scores: NDArray[np.float32] = field(default_factory=lambda: _NO_SCORES)
    certainty: float | None = None

    @property
    def index(self) -> int:
        """Position of the best label."""
        if self.best is not None:
            return self.best
        return int(self.cosines.argmax())  # scores may be so sure that they are equal

    @property
    def label(self) -> str:
        """The best label."""
        return self.labels[self.index]

    @property
    def score(self) -> float:
        """The best label's probability."""
        return float(self.scores[self.index])

    @property
    def cosine(self) -> float:
        """The best label's cosine with the frame."""
        return float(self.cosines[self.index])

    @property
    def margin(self) -> float:
        """The best label's score less that of the next: how clear the choice was. Of a single label
        the score; below 0 where a label of another group scores higher."""
        return self.score - sum(score for _, score in self.top(2)[1:])

    @property
    def unknown(self) -> bool:
        """Whether the frame is of none of the labels: background fits it better, or all are ruled
        out, or the score is below the `threshold` (0 unless it was set or fitted)."""
        if self.background is not None or (self.ruled_out is not None and self.ruled_out.all()):
            return True
        certainty = self.score if self.certainty is None else self.certainty
        return certainty < self.threshold

    @property
    def groups(self) -> dict[str, float]:
        """The score of every group of labels: the sum of its labels' (sigmoid: the maximum)."""
        names = self.tree.groups if self.tree else ()
        return dict(zip(names, self.group_scores.tolist(), strict=True))

    @property
    def path(self) -> tuple[str, ...]:
        """The best label with its groups, coarse to fine: ("animal", "dog"). It ends where scores
        fall below the threshold: ("animal",) is some animal. Empty where background fits better."""
        if not self.unknown:
            return tuple(name for name, _ in self._levels())
        beyond = self.background is not None or self.score == 0
        if beyond or self.certainty is not None:  # it says nothing of groups
            return ()
        return tuple(name for name, score in self._levels() if score >= self.threshold)

    def top(self, count: int) -> list[tuple[str, float]]:
        """The `count` best labels with their scores: the chosen one, the others by score, and last
        those that were ruled out."""
        order = -self.cosines
        if self.ruled_out is not None:
            order[self.ruled_out] += 4  # beyond all cosines
        order[self.index] = -np.inf
        best = np.argsort(order, kind="stable")[:count]
        return [(self.labels[i], float(self.scores[i])) for i in best]

    def _levels(self) -> list[tuple[str, float]]:
        """Groups and label on the path, with their scores."""
        tree = self.tree
        if tree is None:
            return [(self.label, self.score)]
        above = tree.above[self.index]
        levels = [(tree.groups[g], float(self.group_scores[g])) for g in above]
        return [*levels, (self.label, self.score)]

    def __repr__(self) -> str:
        mark = ", unknown" if self.unknown else ""
        return f"Prediction({self.label!r}, {self.score:.3f}{mark})"


def scores_of(cosines: NDArray[np.float32], head: Head) -> NDArray[np.float32]:
    """Probabilities [..., N] from cosines [..., N]: softmax or sigmoid of scale * cosine + bias."""
    logits = cosines.astype(np.float64) * head.logit_scale + head.logit_bias
    if head.activation == "sigmoid":
        return (1 / (1 + np.exp(-np.clip(logits, -500, 500)))).astype(np.float32)
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(exp / exp.sum(axis=-1, keepdims=True), dtype=np.float32)
