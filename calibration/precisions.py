"""The precisions of an image encoder: each made from fp32, judged on frames, accepted or not."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from rich.progress import Progress

from .activations import observe
from .gate import Cost, Judge, LayerRow, Limits, faults
from .half import to_half
from .layers import Layer, find_layers
from .overflow import overflowing, rounding
from .quantize import folded, int8_share
from .ranges import Range, choose_ranges
from .sensitivity import Search, encoder

BATCH = 8
DRIFT_FRAMES = 64  # on which each layer is judged by itself

Batches = Callable[[], Iterator[NDArray[np.uint8]]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """One precision of the encoder. It holds the gate where there are no `faults`."""

    name: str
    model: ModelProto
    cost: Cost
    faults: tuple[str, ...] = ()
    float_layers: tuple[str, ...] = ()
    int8_share: float = 0.0
    layers: tuple[LayerRow, ...] = ()

    @property
    def accepted(self) -> bool:
        """Whether it may be shipped."""
        return not self.faults

    def figures(self) -> dict[str, float]:
        """What decided on it, for the manifest."""
        found = self.cost.figures()
        return found | {"int8_share": self.int8_share} if self.name.startswith("int8") else found


def half_candidate(
    model: ModelProto, frames: Batches, judge: Judge, limits: Limits, progress: Progress
) -> Candidate:
    """The fp16 encoder; what would overflow on the frames stays in float."""
    task = progress.add_task("fp16: largest activations", total=None)
    beyond = overflowing(model, frames())
    made = to_half(model, beyond)
    cost = judge.cost(encoder(rounding(made), optimise=False))
    progress.remove_task(task)
    return Candidate(
        name="fp16",
        model=made,
        cost=cost,
        faults=tuple(faults(cost, limits)),
        float_layers=tuple(sorted(beyond)),
    )


def int8_candidate(
    model: ModelProto,
    frames: Batches,
    judge: Judge,
    limits: Limits,
    progress: Progress,
    cache: Path | None = None,
) -> Candidate:
    """The int8 encoder, with the fewest layers in float such that the gate holds.

    `cache` is a file in which the ranges are kept while they are gathered (see `observe`).
    """
    layers = find_layers(model)
    search, ranges = _search(model, layers, frames, judge, limits, progress, cache)
    task = progress.add_task("int8: each layer by itself", total=len(layers))
    alone = Search(search.model, layers, ranges, judge.first(DRIFT_FRAMES), limits)
    drift = alone.drift(lambda: progress.advance(task))
    progress.update(task, description="int8: the gate", total=None)
    kept, cost = search.fewest(drift)
    progress.remove_task(task)
    found = faults(cost, limits)
    if len(kept) == len(layers):
        kept, found = [], [*found, "it holds with every layer in float only"]
    return Candidate(
        name="int8",
        model=search.made(kept),
        cost=cost,
        faults=tuple(found),
        float_layers=tuple(layer.name for layer in layers if layer.name in kept),
        int8_share=int8_share(layers, kept),
        layers=tuple(_row(layer, ranges[layer.input], drift, kept) for layer in layers),
    )


def _search(
    model: ModelProto,
    layers: tuple[Layer, ...],
    frames: Batches,
    judge: Judge,
    limits: Limits,
    progress: Progress,
    cache: Path | None,
) -> tuple[Search, dict[str, Range]]:
    task = progress.add_task("int8: ranges of the activations", total=None)
    seen = observe(model, layers, frames(), cache, lambda n: progress.advance(task, n))
    progress.update(task, description="int8: the best of the ranges", completed=0, total=len(seen))
    ranges = choose_ranges(model, layers, seen, lambda: progress.advance(task))
    progress.remove_task(task)
    return Search(folded(model, layers, ranges), layers, ranges, judge, limits), ranges


def _row(layer: Layer, own: Range, drift: dict[str, Cost], kept: list[str]) -> LayerRow:
    alone = drift[layer.name]
    return LayerRow(
        layer.title,
        layer.operator,
        layer.size,
        own.method,
        own.alpha,
        alone.cosine_p1,
        len(alone.flipped),
        layer.name in kept,
    )
