"""Predictions and frames as a stream gives them, for tests of what follows it."""

from collections.abc import Mapping

import numpy as np

from runtime.prediction import Prediction
from runtime.stream import Seen


def prediction(scores: Mapping[str, float], threshold: float = 0.0) -> Prediction:
    """One with these scores; where none is over the threshold it is unknown."""
    values = np.array([*scores.values()], dtype=np.float32)
    return Prediction(tuple(scores), values, values, threshold)


def seen(
    time: float, scores: Mapping[str, float], source: str = "door", size: tuple[int, int] = (48, 64)
) -> Seen:
    """A gray frame that was classified so at that time; 10 frames a second."""
    frame = np.full((*size, 3), 90, dtype=np.uint8)
    return Seen(source, round(time * 10), time, prediction(scores), frame, 0, 5.0)
