"""The distribution of a tensor's magnitudes, gathered in one pass, and where to cut it off."""

import numpy as np
from numpy.typing import NDArray

from .metrics import Floats

BINS = 2048
LEVELS = 127  # of symmetric int8: -127 to 127
PERCENTILES = (99.9, 99.99, 99.999)


class Histogram:
    """Counts of |x| in bins of equal width over [0, range]. Where a larger value comes, the range
    doubles and neighbouring bins are put together, so that one pass over the data is enough."""

    def __init__(self) -> None:
        self.counts: NDArray[np.float64] = np.zeros(BINS)
        self.range = 0.0
        self.largest = 0.0

    def add(self, values: Floats) -> None:
        """Counts an array's values."""
        magnitudes = np.abs(values).ravel()
        largest = float(magnitudes.max(initial=0.0))
        self.largest = max(self.largest, largest)
        if not self.range and largest:
            self.range = largest
        while self.range < largest:
            halved = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([halved, np.zeros(BINS - len(halved))])
            self.range *= 2
        if self.range:
            self.counts += np.histogram(magnitudes, BINS, (0, self.range))[0]

    @property
    def centers(self) -> NDArray[np.float64]:
        """The middle of each bin [BINS]."""
        return np.asarray((np.arange(BINS) + 0.5) * (self.range / BINS), np.float64)


def thresholds(histogram: Histogram) -> dict[str, float]:
    """By method, the magnitude from which on values are clipped: all of them candidates."""
    if not histogram.range:
        return {"min-max": 1.0}  # nothing but zeros: any scale represents them
    found = {"min-max": histogram.largest}
    share = histogram.counts.cumsum() / histogram.counts.sum()
    edges = (np.arange(BINS) + 1) * (histogram.range / BINS)
    for percent in PERCENTILES:
        found[f"percentile {percent:g}"] = float(edges[np.searchsorted(share, percent / 100)])
    found["mse"] = mse_threshold(histogram)
    found["entropy"] = entropy_threshold(histogram)
    return {name: min(value, histogram.largest) for name, value in found.items()}


def mse_threshold(histogram: Histogram) -> float:
    """The threshold t that makes mean (x - q(x))^2 smallest, q clipping to t and rounding to steps
    of t / 127; by trying 100 shares of the range."""
    centers, counts = histogram.centers, histogram.counts
    tried = np.linspace(0.01, 1, 100) * histogram.range
    steps = tried[:, None] / LEVELS
    rounded = np.minimum(np.round(centers / steps), LEVELS) * steps
    errors = ((centers - rounded) ** 2 * counts).sum(axis=1)
    return float(tried[errors.argmin()])


def entropy_threshold(histogram: Histogram) -> float:
    """The threshold whose quantised distribution diverges least (Kullback-Leibler) from the clipped
    one: TensorRT's calibration (Migacz 2017, "8-bit Inference with TensorRT", slides 26 to 38)."""
    best, chosen = np.inf, histogram.range
    for end in range(LEVELS + 1, BINS + 1, 16):
        clipped = histogram.counts[:end].copy()
        clipped[-1] += histogram.counts[end:].sum()
        divergence = _divergence(clipped, _coarse(histogram.counts[:end]))
        if divergence < best:
            best, chosen = divergence, histogram.range * end / BINS
    return float(chosen)


def _coarse(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """The counts as 128 levels can tell them apart: spread evenly over the filled bins of each."""
    level = np.arange(len(counts)) * (LEVELS + 1) // len(counts)
    filled = counts > 0
    total = np.bincount(level, weights=counts, minlength=LEVELS + 1)
    bins = np.bincount(level, weights=filled, minlength=LEVELS + 1)
    return np.asarray(np.where(filled, (total / np.maximum(bins, 1))[level], 0.0))


def _divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """KL(p || q) of two histograms; what q has lost counts as a very small share."""
    p, q = p / max(p.sum(), 1.0), q / max(q.sum(), 1.0)
    filled = p > 0
    return float((p[filled] * np.log(p[filled] / np.maximum(q[filled], 1e-12))).sum())
