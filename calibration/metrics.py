"""Figures of merit, in NumPy: the same for a PyTorch model, an ONNX file and an engine."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def top_k_accuracy(similarity: Floats, targets: NDArray[np.int64], k: int) -> float:
    """Share of rows [N, C] whose target is among the k most similar columns.

    A tie counts against the model, and so does NaN.
    """
    own = similarity[np.arange(len(targets)), targets]
    rank = (~(similarity < own[:, None])).sum(axis=1) - 1
    return float(((rank < k) & np.isfinite(own)).mean())


def recall_at_k(
    similarity: Floats, positives: NDArray[np.bool_], ks: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """R@k: the share of rows [N, M] with a positive among their k most similar columns.

    A tie counts against the model, and so does NaN.
    """
    best = np.where(positives, similarity, -np.inf).max(axis=1)
    rank = (~positives & ~(similarity < best[:, None])).sum(axis=1)
    return {k: float(((rank < k) & np.isfinite(best)).mean()) for k in ks}


def row_cosines(a: Floats, b: Floats) -> NDArray[np.float64]:
    """Cosine of each row of a [N, D] with the same row of b; NaN where a row is not finite."""
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a64, axis=1) * np.linalg.norm(b64, axis=1)
    return np.asarray((a64 * b64).sum(axis=1) / np.maximum(norms, 1e-300), dtype=np.float64)
