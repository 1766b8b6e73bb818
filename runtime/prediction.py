"""The one result type: what a frame was taken for."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .manifest import Head


@dataclass(frozen=True, eq=False)
class Prediction:
    """Labels of one frame, best first by `top`.

    `scores` are the model's probabilities (softmax over the labels, or a sigmoid each), `cosines`
    the raw similarities, both float32 [N] in the order of `labels`. `timings` are milliseconds
    by stage, of the whole batch where frames were classified together.
    """

    labels: tuple[str, ...]
    scores: NDArray[np.float32]
    cosines: NDArray[np.float32]
    threshold: float = 0.0
    timings: Mapping[str, float] = field(default_factory=dict)
    backend: str = ""

    @property
    def index(self) -> int:
        """Position of the best label."""
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
    def unknown(self) -> bool:
        """Whether the best score is below the classifier's `threshold` (0 unless it was set)."""
        return self.score < self.threshold

    def top(self, count: int) -> list[tuple[str, float]]:
        """The `count` best labels with their scores."""
        best = np.argsort(-self.cosines, kind="stable")[:count]
        return [(self.labels[i], float(self.scores[i])) for i in best]

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
