"""Fits a head to frames' cosines: the temperature, and for sigmoid the bias, of their scores.

One loss serves all heads. With logits z = scale * cosine + bias, targets t (the label as one-hot
row, or another encoder's scores) and A(z) = log sum exp(z) for softmax, sum log(1 + exp(z)) for
sigmoid, the cross-entropy of a frame is A(z) - t . z, the sums over its labels. It is convex in
scale and bias, and linear in t, so that of all targets only two means matter.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.errors import DataError
from runtime.manifest import Head

from .metrics import Counts, Floats

Doubles = NDArray[np.float64]

LOWEST, HIGHEST = 1.0, 200.0  # of a fitted scale; CLIPs are trained with up to 100
BIAS_SPREAD = 10.0  # of the prior: how far a bias may easily move
TOLERANCE = 1e-12  # nats: what a Newton step must promise to be worth it
STEPS, HALVINGS = 100, 40
BLOCK = 1024  # rows at once: 8 MB of float64 with 1,000 labels


def nll(cosines: Floats, targets: Counts, head: Head) -> float:
    """The negative log-likelihood of the labels [N] given cosines [N, C]: nats, mean of the frames.

    Softmax: -log score of the right label. Sigmoid: the binary cross-entropy of every label with
    whether it is the right one, summed over the labels. Raises DataError.
    """
    check(cosines, head, targets)
    return _loss_at(cosines, _means_of_labels(cosines, targets), head).value


def fit_head(
    cosines: Floats, targets: Counts | None, head: Head, reference: Floats | None = None
) -> Head:
    """The head of the given kind whose scores of cosines [N, C] fit best; no ranking changes.

    - With labels, int64 [N] in [0, C): the greatest likelihood. Of the scale for softmax
      (temperature scaling: Guo et al. 2017, arXiv:1706.04599, section 4.2, with scale =
      1 / temperature), of scale and bias over all labels for sigmoid (Platt 1999, "Probabilistic
      Outputs for Support Vector Machines").
    - Without labels, with `reference` float32 [N, C], the same frames' cosines from the fp32
      encoder: the least Kullback-Leibler divergence from `scores_of(reference, head)`.
    - With neither, the head as it is.

    Few or separable frames do not decide it: the head given acts as a prior of the weight of one
    frame, scale / s0 - log(scale / s0) (a gamma density of shape 2 with its mode there) and
    ((bias - b0) / 10)^2 / 2. The scale stays in [1, 200], or at a given one beyond. Solved by
    Newton's method in float64. Raises DataError for values that are not finite or do not fit.
    """
    check(cosines, head, targets, reference)
    if targets is not None:
        means = _means_of_labels(cosines, targets)
    elif reference is not None:
        means = _means_of_scores(cosines, reference, head)
    else:
        return head

    def loss(at: Head) -> _Loss:
        return _with_prior(_loss_at(cosines, means, at), at, head, len(cosines))

    return _minimum(loss, head)


class _Loss(NamedTuple):
    """A loss and its derivatives by (scale, bias): [2] and [2, 2]."""

    value: float
    gradient: Doubles
    curvature: Doubles


def _means_of_labels(cosines: Floats, targets: Counts) -> Doubles:
    """Means over the frames of sum t * cosine and of sum t, where t is 1 at the label."""
    return np.array([cosines[np.arange(len(targets)), targets].mean(dtype=np.float64), 1.0])


def _means_of_scores(cosines: Floats, reference: Floats, head: Head) -> Doubles:
    """The same where t are the scores of the reference."""
    sums = np.zeros(2)
    for own, other in zip(_blocks(cosines), _blocks(reference), strict=True):
        _, scores = _normalised(other, head)
        sums += (scores * own).sum(), scores.sum()
    return sums / len(cosines)


def _blocks(cosines: Floats) -> Iterator[Doubles]:
    for start in range(0, len(cosines), BLOCK):
        yield cosines[start : start + BLOCK].astype(np.float64)


def _normalised(cosines: Doubles, head: Head) -> tuple[Doubles, Doubles]:
    """A(z) of each frame [N], and the scores [N, C]: `scores_of`, but in float64."""
    logits = head.logit_scale * cosines + head.logit_bias
    if head.activation == "sigmoid":
        each = np.logaddexp(0, logits)
        return each.sum(axis=1), np.exp(logits - each)
    top = logits.max(axis=1, keepdims=True)
    exp = np.exp(logits - top)
    total = exp.sum(axis=1, keepdims=True)
    return (top + np.log(total))[:, 0], exp / total


def _loss_at(cosines: Floats, means: Doubles, head: Head) -> _Loss:
    """The mean cross-entropy of the frames' scores with targets that have these means."""
    value, gradient, curvature = 0.0, np.zeros(2), np.zeros((2, 2))
    for block in _blocks(cosines):
        normaliser, scores = _normalised(block, head)
        value += float(normaliser.sum())
        gradient += (scores * block).sum(), scores.sum()
        curvature += _curvature(block, scores, head)
    count = len(cosines)
    value = value / count - float(means @ (head.logit_scale, head.logit_bias))
    return _Loss(value, gradient / count - means, curvature / count)


def _curvature(cosines: Doubles, scores: Doubles, head: Head) -> Doubles:
    """The second derivatives of A(z), summed over frames: the variance of (cosine, 1)."""
    weights = scores * (1 - scores) if head.activation == "sigmoid" else scores
    weighted = weights * cosines
    mixed = weighted.sum()
    squares = np.array([[(weighted * cosines).sum(), mixed], [mixed, weights.sum()]])
    if head.activation == "sigmoid":
        return squares
    centres = np.stack([weighted.sum(axis=1), weights.sum(axis=1)])
    return np.asarray(squares - centres @ centres.T)


def _with_prior(loss: _Loss, at: Head, start: Head, frames: int) -> _Loss:
    """The loss with that of leaving `start`, which weighs as much as one frame."""
    ratio = at.logit_scale / start.logit_scale
    shift = (at.logit_bias - start.logit_bias) / BIAS_SPREAD
    gradient = np.array([1 / start.logit_scale - 1 / at.logit_scale, shift / BIAS_SPREAD])
    curvature = np.diag([1 / at.logit_scale**2, 1 / BIAS_SPREAD**2])
    return _Loss(
        loss.value + float(ratio - 1 - np.log(ratio) + shift**2 / 2) / frames,
        loss.gradient + gradient / frames,
        loss.curvature + curvature / frames,
    )


def _minimum(loss: Callable[[Head], _Loss], head: Head) -> Head:
    """The head with the least loss, the scale within its bounds.

    The loss is convex: if the best scale is out of bounds, the best one is the bound, with the
    bias that is best there.
    """
    bias = [1] if head.activation == "sigmoid" else []
    found = _descend(loss, head, [0, *bias])
    low, high = min(LOWEST, head.logit_scale), max(HIGHEST, head.logit_scale)
    if low <= found.logit_scale <= high:
        return found
    scale = low if found.logit_scale < low else high
    bound = Head(logit_scale=scale, logit_bias=found.logit_bias, activation=head.activation)
    return _descend(loss, bound, bias)


def _moved(head: Head, step: Doubles) -> Head:
    scale, bias = head.logit_scale + float(step[0]), head.logit_bias + float(step[1])
    return Head(logit_scale=scale, logit_bias=bias, activation=head.activation)


def _descend(loss: Callable[[Head], _Loss], head: Head, free: list[int]) -> Head:
    """Newton's method on the `free` ones of (scale, bias), from a head on.

    A step moves the scale by its half at most, the bias by BIAS_SPREAD, and is halved until the
    loss falls.
    """
    here = loss(head)
    for _ in range(STEPS if free else 0):
        step = np.zeros(2)
        step[free] = np.linalg.solve(here.curvature[np.ix_(free, free)], -here.gradient[free])
        if -(here.gradient @ step) < TOLERANCE:
            break
        step /= max(1.0, float(np.max(np.abs(step) / (head.logit_scale / 2, BIAS_SPREAD))))
        moved, there = _line_search(loss, head, here, step)
        if there.value >= here.value:
            break  # there is no better one in float64
        head, here = moved, there
    return head


def _line_search(
    loss: Callable[[Head], _Loss], head: Head, here: _Loss, step: Doubles
) -> tuple[Head, _Loss]:
    for halved in range(HALVINGS):
        moved = _moved(head, step / 2**halved)
        there = loss(moved)
        if there.value < here.value:
            break
    return moved, there


def check(
    cosines: Floats, head: Head, targets: Counts | None, reference: Floats | None = None
) -> None:
    """Raises DataError, naming the argument, for what cannot be fitted to."""
    check_cosines("cosines", cosines)
    if not (0 < head.logit_scale < np.inf and np.isfinite(head.logit_bias)):
        raise DataError(f"the head has no scale above 0 and finite bias: {head}; export it again")
    if targets is not None:
        _check_targets(targets, *cosines.shape)
    if reference is not None:
        check_cosines("reference", reference, cosines.shape[1])
    if reference is not None and len(reference) != len(cosines):
        raise DataError(
            f"reference has {len(reference)} frames and cosines {len(cosines)}: "
            "both must be of the same frames, in the same order"
        )


def check_cosines(name: str, rows: Floats, labels: int | None = None) -> None:
    """Raises DataError, naming the argument, for what are not cosines [N, C]."""
    if rows.ndim != 2 or not rows.size:
        raise DataError(
            f"{name} has the shape {rows.shape}, not [frames, labels], at least one each"
        )
    if labels is not None and rows.shape[1] != labels:
        raise DataError(
            f"{name} has {rows.shape[1]} labels and cosines {labels}: take the same prompt bank"
        )
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise DataError(
            f"{name} is not finite in {len(bad)} of {len(rows)} frames, first in row {bad[0]}: "
            "leave them out, or mend the encoder"
        )
    if np.abs(rows).max() > 1.01:  # unit rows of a half-precision encoder are not quite
        raise DataError(
            f"{name} reaches {np.abs(rows).max():.3g}, a cosine at most 1: "
            "give unit embeddings @ unit bank.T, not yet scaled"
        )


def _check_targets(targets: Counts, frames: int, labels: int) -> None:
    if targets.shape != (frames,) or not np.issubdtype(targets.dtype, np.integer):
        raise DataError(
            f"targets are {targets.dtype} {list(targets.shape)}, not an integer for each of the "
            f"{frames} frames"
        )
    if targets.min() < 0 or targets.max() >= labels:
        raise DataError(
            f"targets are from {targets.min()} to {targets.max()}, but there are {labels} labels "
            f"(0 to {labels - 1}): take the prompt bank that they were made for"
        )
