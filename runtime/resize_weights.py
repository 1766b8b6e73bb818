"""The weights of Pillow's resize with antialias, as small matrices over the pixels of one axis.

Each output is a weighted mean of a window of pixels (Pillow's Resample.c). The windows of
neighbours overlap almost wholly, so the matrix of a block of neighbours is dense.

Where a picture is halved first, a weight goes to the cell that its pixel falls in. Halving takes
from a frequency w (in radians a cell) the part 1 - cos(w/4) by its mean of two pixels, as much by
its blur with [1, 2, 1] twice, and as much by the adding up of weights: cos(w/4)^2 or ^4 is left
in all. With v = (1 - cos w) / 8, the convolution with [-1, 2, -1] / 16, the inverse of these is
the series sum k / (2n + k) * binomial(2n + k, n) * v^n, for k = 1 or 2 (the k-th power of the
generating function of Catalan's numbers): the weights are convolved with its first four terms.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .opencv import Halving

Floats = NDArray[np.float64]
Index = NDArray[np.intp]
Filter = Literal["bicubic", "bilinear"]

BLOCK = 64  # bytes of outputs that share a matrix; of more, most of it is zeros
ONE = 1 << 22  # Pillow's weights are multiples of 1 / 2^22
TERMS: dict[Halving, tuple[int, int, int, int]] = {
    "mean": (1, 1, 2, 5),
    "blurred mean": (1, 2, 5, 14),
}


@dataclass(frozen=True)
class Span:
    """What is asked of one axis: `size` pixels are resized to `resized`, and `count` of these, from
    `first` on, are made."""

    size: int
    resized: int
    first: int
    count: int


@dataclass(frozen=True, eq=False)
class Block:
    """A matrix [inputs, outputs] that makes these outputs of those inputs."""

    inputs: slice
    outputs: slice
    weights: NDArray[Any]


@dataclass(frozen=True, eq=False)
class Axis:
    """The resize of one axis. It takes the pixels from `start` to `start + length`, halved, and
    makes `count` outputs of them. Its weights are float64 multiples of 1 / 2^22, as Pillow's are,
    or float32 where the picture is halved."""

    start: int
    length: int
    count: int
    blocks: tuple[Block, ...]


def plan_axis(span: Span, filtering: Filter, halvings: tuple[Halving, ...]) -> Axis:
    """The resize of one axis of a picture that is halved so; its length is made a multiple of the
    cells by repeating the last pixel."""
    low, weights = _windows(span, filtering)
    cell = 2 ** len(halvings)
    margin = 2 * cell if halvings else 0
    start = max(int(low[0]) - margin, 0)
    length = min(int(low[-1]) + weights.shape[1] + margin, span.size) - start
    cells = -(-length // cell) * cell
    low = low - start
    for halving in halvings:
        cells //= 2
        low, weights = _halved(low, weights, cells, _kernel(halving))
    if not halvings:
        weights = np.trunc(weights * ONE + np.copysign(0.5, weights)) / ONE
    dtype = np.float32 if halvings else np.float64
    step = BLOCK // np.dtype(dtype).itemsize
    pieces = (slice(i, min(i + step, span.count)) for i in range(0, span.count, step))
    blocks = tuple(_block(low[piece], weights[piece], cells, piece, dtype) for piece in pieces)
    return Axis(start, length, span.count, blocks)


def _windows(span: Span, filtering: Filter) -> tuple[Index, Floats]:
    """Where the window of each output begins [count], and its weights [count, widest], 0 beyond
    its end: Pillow's precompute_coeffs, operation by operation."""
    kernel, support = _KERNELS[filtering]
    scale = span.size / span.resized
    stretch = max(scale, 1.0)
    centres = (np.arange(span.first, span.first + span.count) + 0.5) * scale
    low = np.maximum((centres - support * stretch + 0.5).astype(np.intp), 0)
    high = np.minimum((centres + support * stretch + 0.5).astype(np.intp), span.size)
    taps = low[:, None] + np.arange(int((high - low).max()))
    weights = kernel(np.abs((taps - centres[:, None] + 0.5) * (1.0 / stretch)))
    weights[taps >= high[:, None]] = 0
    return low, weights / np.cumsum(weights, axis=1)[:, -1:]


def _bicubic(x: Floats) -> Floats:
    """The kernel of Keys 1981, Cubic convolution interpolation, with a = -0.5."""
    near = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _bilinear(x: Floats) -> Floats:
    return np.maximum(1.0 - x, 0.0)


_KERNELS: dict[Filter, tuple[Callable[[Floats], Floats], float]] = {
    "bicubic": (_bicubic, 2.0),
    "bilinear": (_bilinear, 1.0),
}


def _kernel(halving: Halving) -> Floats:
    """What makes up for a halving: convolve the weights with it."""
    v = np.array([-1.0, 2.0, -1.0]) / 16
    power, total = np.ones(1), np.zeros(2 * len(TERMS[halving]) - 1)
    for n, factor in enumerate(TERMS[halving]):
        middle = slice(len(TERMS[halving]) - 1 - n, len(TERMS[halving]) + n)
        total[middle] += factor * power
        power = np.convolve(power, v)
    return total


def _halved(low: Index, weights: Floats, cells: int, kernel: Floats) -> tuple[Index, Floats]:
    """The windows over `cells` cells of two pixels each, of those over the pixels. Beyond its ends
    a picture is continued by its mirror image, in which also the last cell has a neighbour."""
    count, wide = weights.shape
    reach = len(kernel) // 2
    where = (low[:, None] + np.arange(wide)) // 2 - low[:, None] // 2
    folded = _added(where, weights)
    spread = np.zeros((count, folded.shape[1] + 2 * reach))
    for i, factor in enumerate(kernel):
        spread[:, i : i + folded.shape[1]] += factor * folded
    where = (low[:, None] // 2 - reach + np.arange(spread.shape[1])) % (2 * cells)
    where = np.minimum(where, 2 * cells - 1 - where)
    first = where.min(axis=1)
    return first, _added(where - first[:, None], spread)


def _added(where: Index, weights: Floats) -> Floats:
    """Weights [count, N] added up in each row by their new position [count, N]."""
    count, width = len(where), int(where.max()) + 1
    flat = where + np.arange(count)[:, None] * width
    sums = np.bincount(flat.ravel(), weights.ravel(), count * width)
    return np.asarray(sums, dtype=np.float64).reshape(count, width)


def _block(low: Index, weights: Floats, size: int, outputs: slice, dtype: Any) -> Block:
    """The matrix of neighbouring outputs."""
    begin = int(low.min())
    where = low[:, None] - begin + np.arange(weights.shape[1])
    matrix = _added(where, weights)[:, : size - begin]  # beyond are only zeros
    inputs = slice(begin, begin + matrix.shape[1])
    return Block(inputs, outputs, np.ascontiguousarray(matrix.T, dtype))
