"""The gate: what a precision costs on real frames, and whether that is little enough to ship it."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.errors import DataError

from .metrics import Counts, Floats, row_cosines

Encode = Callable[[NDArray[Any]], Floats]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a precision may cost: `min_cosine` is of the first percentile of the frames, agreement
    of the best label, `max_drop` in points of top-1 accuracy (0.5: from 90.0 % to 89.5 %)."""

    min_cosine: float = 0.99
    min_agreement: float = 0.99
    max_drop: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a precision was seen to cost against fp32. `agreement` is the share of frames with the
    same best label (None without labels to choose from), `top1` and `drop` (in points) are of the
    true labels (None where frames have none). `flipped` are the rows whose label changed. The
    cosines of a text encoder are of `texts`, not of the frames."""

    frames: int
    cosine_p1: float
    cosine_p50: float
    agreement: float | None = None
    top1: float | None = None
    drop: float | None = None
    flipped: tuple[int, ...] = ()
    texts: int | None = None

    def figures(self) -> dict[str, float]:
        """The figures that there are, for the manifest."""
        named = ("texts", "cosine_p1", "cosine_p50", "agreement", "top1", "drop")
        found = {name: getattr(self, name) for name in named}
        there = {name: float(value) for name, value in found.items() if value is not None}
        return {"frames": float(self.frames), **there}


class LayerRow(NamedTuple):
    """What int8 does to one layer: by itself, and whether it is in the file as int8."""

    title: str
    operator: str
    weights: int
    method: str
    smoothed: float
    cosine: float
    flips: int
    in_float: bool


class AnyJudge(Protocol):
    """What judges an encoder, by what it makes of inputs that it was not calibrated on."""

    def first(self, count: int) -> "AnyJudge":
        """The same by only the first `count` inputs."""

    def cost(self, encode: Encode) -> Cost:
        """What an encoder costs."""


@dataclass(frozen=True, eq=False)
class Judge:
    """Frames that were not calibrated on, and what fp32 makes of them.

    `batches` gives the frames, uint8 [n, H, W, 3], anew each time; `reference` are fp32's unit
    rows [N, D]; `bank` unit rows of labels [C, D] or None; `targets` the frames' labels [N] or
    None.
    """

    batches: Callable[[], Iterator[NDArray[np.uint8]]]
    reference: Floats
    bank: Floats | None = None
    targets: NDArray[np.int64] | None = None

    def first(self, count: int) -> "Judge":
        """The same with only the first `count` frames."""
        targets = None if self.targets is None else self.targets[:count]
        return Judge(
            lambda: _first(self.batches(), count), self.reference[:count], self.bank, targets
        )

    def cost(self, encode: Encode) -> Cost:
        """What an encoder costs. A frame whose embedding is not finite counts as cosine -1."""
        return self.compare(np.concatenate([encode(batch) for batch in self.batches()]))

    def compare(self, rows: Floats) -> Cost:
        """The same of its embeddings [N, D]."""
        cost = turned(self.reference, rows)
        if self.bank is None:
            return cost
        before = (self.reference @ self.bank.T).argmax(axis=1)
        after = np.nan_to_num(rows @ self.bank.T, nan=-1.0).argmax(axis=1)
        return relabelled(cost, before, after, self.targets)


def turned(reference: Floats, rows: Floats) -> Cost:
    """How far embeddings [N, D] are from fp32's; one that is not finite counts as cosine -1."""
    cosines = np.nan_to_num(row_cosines(reference, rows), nan=-1.0)
    return Cost(
        frames=len(cosines),
        cosine_p1=float(np.quantile(cosines, 0.01)),
        cosine_p50=float(np.median(cosines)),
    )


def relabelled(cost: Cost, before: Counts, after: Counts, targets: Counts | None) -> Cost:
    """The cost with what becomes of the frames' best labels [N]: fp32's, now, and the true ones."""
    same = before == after
    top1 = drop = None
    if targets is not None:
        top1 = float((after == targets).mean())
        drop = 100 * (float((before == targets).mean()) - top1)
    return dataclasses.replace(
        cost,
        frames=len(same),
        agreement=float(same.mean()),
        top1=top1,
        drop=drop,
        flipped=tuple(np.flatnonzero(~same).tolist()),
    )


def _first(batches: Iterator[NDArray[np.uint8]], count: int) -> Iterator[NDArray[np.uint8]]:
    for batch in batches:
        if count <= 0:
            return
        yield batch[:count]
        count -= len(batch)


def faults(cost: Cost, limits: Limits) -> list[str]:
    """What of the cost is over the limits, in words; nothing where the gate holds."""
    found = []
    if cost.cosine_p1 < limits.min_cosine:
        found.append(
            f"cosine with fp32 is {cost.cosine_p1:.4f} at the 1st percentile, "
            f"less than --min-cosine {limits.min_cosine:g}"
        )
    if cost.agreement is not None and cost.agreement < limits.min_agreement:
        found.append(
            f"{cost.agreement:.2%} of {cost.frames} frames keep their label, "
            f"less than --min-agreement {limits.min_agreement:g}"
        )
    if cost.drop is not None and cost.drop > limits.max_drop:
        found.append(
            f"top-1 accuracy falls by {cost.drop:.2f} points, "
            f"more than --max-drop {limits.max_drop:g}"
        )
    return found


def check_limits(limits: Limits) -> None:
    """Raises DataError for a limit that is no number of its kind."""
    for flag, value in (
        ("--min-cosine", limits.min_cosine),
        ("--min-agreement", limits.min_agreement),
    ):
        if not -1 <= value <= 1:
            raise DataError(f"{flag} is at most 1, not {value}")
    if not -100 <= limits.max_drop <= 100:
        raise DataError(f"--max-drop is in points of accuracy, not {limits.max_drop}")
