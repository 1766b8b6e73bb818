"""How surely a frame is of any of the labels: what is measured, for a threshold to cut."""

from collections.abc import Callable, Mapping
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from .manifest import Head

Measure = Literal["score", "margin", "energy", "contrast"]
RULED_OUT = np.float32(-1.005)  # in the place of a cosine: below all of them, and rounding
_Values = NDArray[np.float64]


class Fitted(msgspec.Struct, frozen=True, kw_only=True):
    """What was fitted to frames for one precision: a head whose scores can be believed, and the
    `threshold` of a `measure` below which a frame is of none of the labels."""

    head: Head
    threshold: float
    measure: Measure = "score"


def measured(
    measure: Measure, cosines: NDArray[np.float32], scores: NDArray[np.float32], head: Head
) -> _Values:
    """One number a frame, float64 [...], from cosines and scores [..., N]: higher is surer. Where a
    label is ruled out its cosine is RULED_OUT.

    - `score`: the best label's (maximum softmax probability: Hendrycks & Gimpel 2017,
      arXiv:1610.02136).
    - `margin`: by how much it is above the second best; of a single label the score.
    - `energy`: log sum exp(scale * cosine) / scale, a smooth maximum of the cosines (Liu et al.
      2020, arXiv:2010.03759). Unlike a softmax it knows a frame that fits all labels badly.
    - `contrast`: the best cosine less the mean of all: to the first order what the softmax of
      unscaled cosines tells (Ming et al. 2022, arXiv:2211.13445). Indifferent to what lifts the
      cosines of a frame with any text.
    """
    return _MEASURES[measure](cosines.astype(np.float64), scores.astype(np.float64), head)


def _score(cosines: _Values, scores: _Values, head: Head) -> _Values:
    return np.asarray(scores.max(axis=-1))


def _margin(cosines: _Values, scores: _Values, head: Head) -> _Values:
    if scores.shape[-1] == 1:
        return scores[..., 0]
    best = np.partition(scores, -2, axis=-1)
    return np.asarray(best[..., -1] - best[..., -2])


def _energy(cosines: _Values, scores: _Values, head: Head) -> _Values:
    top = cosines.max(axis=-1)
    sums = np.exp(head.logit_scale * (cosines - top[..., None])).sum(axis=-1)
    return np.asarray(top + np.log(sums) / head.logit_scale)


def _contrast(cosines: _Values, scores: _Values, head: Head) -> _Values:
    stands = cosines > RULED_OUT
    mean = (cosines * stands).sum(axis=-1) / np.maximum(stands.sum(axis=-1), 1)
    return np.asarray(cosines.max(axis=-1) - mean)


_MEASURES: Mapping[Measure, Callable[[_Values, _Values, Head], _Values]] = {
    "score": _score,
    "margin": _margin,
    "energy": _energy,
    "contrast": _contrast,
}
