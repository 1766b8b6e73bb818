"""Proves that two forms of an encoder say the same: cosine of their embeddings, batch by batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import GateFailed

from .metrics import Floats, row_cosines

Encode = Callable[[NDArray[Any]], Floats]


@dataclass(frozen=True)
class Parity:
    """How far one form of an encoder is from the other, at one batch size."""

    encoder: str
    batch: int
    cosine_min: float
    cosine_mean: float
    largest_difference: float


def measure(
    name: str, reference: Encode, candidate: Encode, inputs: NDArray[Any], batches: Sequence[int]
) -> list[Parity]:
    """Runs both forms on `inputs` [N, ...], cut into each of the batch sizes in turn.

    The reference sees all inputs as one batch, so that a candidate that mixes up its rows at
    some batch size is caught.
    """
    expected = reference(inputs)
    rows = []
    for batch in batches:
        parts = [candidate(inputs[i : i + batch]) for i in range(0, len(inputs), batch)]
        found = np.concatenate(parts)
        cosines = row_cosines(expected, found)
        difference = float(np.abs(expected - found).max())
        rows.append(Parity(name, batch, float(cosines.min()), float(cosines.mean()), difference))
    return rows


def require(rows: Sequence[Parity], cosine: float) -> None:
    """Raises GateFailed, with the figure, where a row's cosine is below `cosine` or not finite."""
    for row in rows:
        if not row.cosine_min >= cosine:
            raise GateFailed(
                f"the exported {row.encoder} encoder differs from the model at batch {row.batch}: "
                f"smallest cosine {row.cosine_min:.7f}, {cosine} is required; nothing was written"
            )
