"""The precisions of an encoder: each made from fp32, judged on frames, accepted or not."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from rich.progress import Progress

from .activations import observe
from .gate import AnyJudge, Cost, Encode, Judge, LayerRow, Limits, faults
from .half import in_float, int8_in_half, to_half
from .half_search import by_loss
from .layers import Layer, find_layers
from .metrics import Floats, row_cosines
from .overflow import overflowing, rounding
from .quantize import folded, int8_share
from .ranges import Range, choose_ranges
from .sensitivity import Search, encoder

BATCH = 8
DRIFT_FRAMES = 64  # on which each layer is judged by itself
TRAINED_COSINE = 0.9999  # with the model as it was trained
HALF_COSINE = 0.9999  # with fp32, at the 1st percentile: what fp16 can reach
_MORE_IN_FLOAT = (0, 1, 2, 4, 8)  # layers, until that is reached, or int8_fp16 holds the gate

Batches = Callable[[], Iterator[NDArray[Any]]]


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
    search: Search | None = None
    """What int8 was found by, and the layers from the one that suffers most, for int8_fp16."""
    order: tuple[str, ...] = ()
    trained_cosine: float | None = None
    """The smallest with the model as it was trained, where that was as int8."""

    @property
    def accepted(self) -> bool:
        """Whether it may be shipped."""
        return not self.faults

    def figures(self) -> dict[str, float]:
        """What decided on it, for the manifest."""
        found = self.cost.figures()
        if self.trained_cosine is not None:
            found |= {"trained_cosine_min": self.trained_cosine}
        return found | {"int8_share": self.int8_share} if self.name.startswith("int8") else found


def half_candidate(
    model: ModelProto, frames: Batches, judge: AnyJudge, limits: Limits, progress: Progress
) -> Candidate:
    """The fp16 encoder. What would overflow on the frames stays in float; so do, where it is not
    HALF_COSINE from fp32 otherwise, the few layers that lose most by weights in half."""
    task = progress.add_task("fp16: largest activations", total=None)
    beyond = overflowing(model, frames())
    made, cost = _in_half(model, beyond, judge)
    kept = set(beyond)
    if cost.cosine_p1 < HALF_COSINE:
        progress.update(task, description="fp16: each layer by itself")
        order = by_loss(model, find_layers(model), judge.first(DRIFT_FRAMES))
        for more in _MORE_IN_FLOAT[1:]:
            tried = {*beyond, *order[:more]}
            other, found = _in_half(model, tried, judge)
            if found.cosine_p1 > cost.cosine_p1:
                made, cost, kept = other, found, tried
            if cost.cosine_p1 >= HALF_COSINE:
                break
    progress.remove_task(task)
    return Candidate(
        name="fp16",
        model=made,
        cost=cost,
        faults=tuple(faults(cost, limits)),
        float_layers=tuple(sorted(kept)),
    )


def _in_half(
    model: ModelProto, keep_float: Collection[str], judge: AnyJudge
) -> tuple[ModelProto, Cost]:
    made = to_half(model, keep_float)
    return made, judge.cost(encoder(rounding(made), optimise=False))


def int8_candidate(
    model: ModelProto,
    frames: Batches,
    judge: AnyJudge,
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
    search, cost = search.with_residuals(kept, cost)
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
        search=search,
        order=tuple(sorted(drift, key=lambda name: drift[name].cosine_p1)),
    )


def trained_candidate(
    model: ModelProto,
    ranges: Mapping[str, Range],
    trained: Encode,
    judge: Judge,
    limits: Limits,
    progress: Progress,
) -> Candidate:
    """The int8 encoder by ranges that were trained, and with no layer in float: it is to be the
    function that `trained` computes, frames to unit rows.

    The gate is against fp32 of the same weights. But that is not what was trained: where the true
    labels of the frames are known, accuracy alone decides, and neither cosine nor agreement.
    """
    if judge.targets is not None:
        limits = replace(limits, min_cosine=-1.0, min_agreement=-1.0)
    layers = find_layers(model)
    search = Search(model, layers, ranges, judge, limits)
    task = progress.add_task("int8: each layer by itself", total=len(layers))
    alone = Search(model, layers, ranges, judge.first(DRIFT_FRAMES), limits)
    drift = alone.drift(lambda: progress.advance(task))
    progress.update(task, description="int8: the gate", total=None)
    made = search.made([])
    cost, cosines = search.cost([]), _cosines(encoder(made), trained, judge)
    progress.remove_task(task)
    found = faults(cost, limits)
    if np.median(cosines) < TRAINED_COSINE:
        found.append(
            f"its median cosine with the model as it was trained is {np.median(cosines):.5f}, "
            f"less than {TRAINED_COSINE}: it is not the same function"
        )
    return Candidate(
        name="int8",
        model=made,
        cost=cost,
        faults=tuple(found),
        int8_share=1.0,
        layers=tuple(_row(layer, ranges[layer.input], drift, []) for layer in layers),
        search=search,
        order=tuple(sorted(drift, key=lambda name: drift[name].cosine_p1)),
        trained_cosine=float(cosines.min()),
    )


def _cosines(one: Encode, other: Encode, judge: Judge) -> Floats:
    pairs = [row_cosines(one(batch), other(batch)) for batch in judge.batches()]
    return np.concatenate(pairs)


def int8_half_candidate(int8: Candidate, frames: Batches, progress: Progress) -> Candidate:
    """The int8 encoder with fp16 for all that is float in it, its scales too: opset 19, for
    TensorRT from 10 on.

    It has the same layers in int8, but for a few more of the worst where the gate asks for it.
    """
    assert int8.search is not None
    task = progress.add_task("int8_fp16: largest activations", total=None)
    beyond = overflowing(int8.model, frames())
    progress.update(task, description="int8_fp16: the gate")
    search, kept = int8.search, list(int8.float_layers)
    others = [name for name in int8.order if name not in kept]
    for more in _MORE_IN_FLOAT:
        extra = others[:more]
        made = int8_in_half(search.made([*kept, *extra]), beyond)
        cost = search.judge.cost(encoder(rounding(made), optimise=False))
        found = faults(cost, search.limits)
        if not found or not int8.accepted:
            break
    progress.remove_task(task)
    return Candidate(
        name="int8_fp16",
        model=made,
        cost=cost,
        faults=tuple(found),
        float_layers=tuple(sorted({*kept, *extra} | in_float(made, beyond))),
        int8_share=int8_share(search.layers, [*kept, *extra]),
    )


def _search(
    model: ModelProto,
    layers: tuple[Layer, ...],
    frames: Batches,
    judge: AnyJudge,
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
