"""Scores in time: what frames say, smoothed over a time constant.

Exponential smoothing of samples that come at uneven times (A. Eckner, "Algorithms for unevenly
spaced time series", 2019, EMA of the last point): after a pause of dt seconds the newest frame
weighs 1 - exp(-dt / tau), so a label is smoothed alike at 5 and at 50 frames a second.
"""

import math

import numpy as np
from numpy.typing import NDArray

from .prediction import Prediction

Scores = dict[str, float]
"""The scores of labels and of groups of labels, by name."""


class Smoother:
    """The scores of one source, smoothed by the time constant `tau` in seconds (0: not at all)."""

    def __init__(self, tau: float) -> None:
        self._tau = tau
        self._names: tuple[str, ...] = ()
        self._values: NDArray[np.float64] = np.empty(0)
        self._time = -math.inf

    def update(self, time: float, prediction: Prediction) -> Scores:
        """The scores by now. An unknown frame is of no label: its labels count as 0, and its groups
        but those that it is known to be of. Labels may change: new ones begin at 0.

        Time that goes back counts as no time.
        """
        names, now = _frame_scores(prediction)
        if names != self._names:
            before = dict(zip(self._names, self._values, strict=True))
            first = not before
            self._values = now if first else np.array([before.get(name, 0.0) for name in names])
            self._names = names
        passed = max(0.0, time - self._time)
        weight = 1.0 if self._tau <= 0 else -math.expm1(-passed / self._tau)
        self._values = self._values + weight * (now - self._values)
        self._time = max(time, self._time)
        return dict(zip(names, self._values.tolist(), strict=True))


def _frame_scores(prediction: Prediction) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    groups = prediction.groups
    names = tuple(dict.fromkeys([*prediction.labels, *groups]))
    scores = np.fromiter(
        [*prediction.scores, *(groups[name] for name in names[len(prediction.labels) :])],
        np.float64,
        len(names),
    )
    if prediction.unknown:
        known = prediction.path
        scores *= [name in known for name in names]
    return names, scores
