"""Which layers suffer from int8, and the fewest that must stay in float for the gate to hold."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto

from .activations import session_of
from .gate import AnyJudge, Cost, Encode, Limits, faults
from .layers import Layer
from .quantize import quantize, residual_sums
from .ranges import Range

Advance = Callable[[], None]
_TRIED_AGAIN = 16  # layers that are tried in int8 once more, at the end of the search


@dataclass(frozen=True, eq=False)
class Search:
    """Quantises some layers of one encoder, and has the result judged."""

    model: ModelProto
    layers: Sequence[Layer]
    ranges: Mapping[str, Range]
    judge: AnyJudge
    limits: Limits
    residuals: bool = False

    def made(self, keep_float: Collection[str]) -> ModelProto:
        """The int8 encoder with these layers in float."""
        return quantize(self.model, self.layers, self.ranges, keep_float, self.residuals)

    def with_residuals(self, keep_float: Collection[str], cost: Cost) -> tuple["Search", Cost]:
        """The same with int8 in the sums that convolutions end in, and what it costs then; as it
        is where there are none, or where the gate would not hold."""
        quantised = [layer for layer in self.layers if layer.name not in keep_float]
        if faults(cost, self.limits) or not residual_sums(self.model, quantised):
            return self, cost
        other = replace(self, residuals=True)
        found = other.cost(keep_float)
        return (self, cost) if faults(found, self.limits) else (other, found)

    def cost(self, keep_float: Collection[str]) -> Cost:
        """What it costs."""
        return self.judge.cost(encoder(self.made(keep_float)))

    def drift(self, advance: Advance = lambda: None) -> dict[str, Cost]:
        """What quantising each layer alone costs, by its name."""
        names = [layer.name for layer in self.layers]
        found = {}
        for name in names:
            found[name] = self.cost([other for other in names if other != name])
            advance()
        return found

    def fewest(
        self, drift: Mapping[str, Cost], advance: Advance = lambda: None
    ) -> tuple[list[str], Cost]:
        """The layers to keep in float such that the gate holds, as few as a search finds, and the
        cost that is left. Where the gate cannot hold, all of them, and the cost of full int8.

        The layers are ranked by their own drift; a bisection finds how many of the worst must
        stay in float, and of those the largest are then tried in int8 again.
        """
        full = self._noted([], advance)
        if not faults(full, self.limits):
            return [], full
        order = sorted(drift, key=lambda name: drift[name].cosine_p1)
        low, high, cost = 0, len(order), full  # at `low` it fails, at `high` it is thought to hold
        while high - low > 1:
            middle = (low + high) // 2
            found = self._noted(order[:middle], advance)
            if faults(found, self.limits):
                low = middle
            else:
                high, cost = middle, found
        if high == len(order):
            return order, full
        return self._tried_again(order[:high], cost, advance)

    def _tried_again(self, kept: list[str], cost: Cost, advance: Advance) -> tuple[list[str], Cost]:
        size = {layer.name: layer.size for layer in self.layers}
        for name in sorted(kept, key=lambda name: -size[name])[:_TRIED_AGAIN]:
            fewer = [other for other in kept if other != name]
            found = self._noted(fewer, advance)
            if not faults(found, self.limits):
                kept, cost = fewer, found
        return kept, cost

    def _noted(self, keep_float: Collection[str], advance: Advance) -> Cost:
        cost = self.cost(keep_float)
        advance()
        return cost


def encoder(model: ModelProto, optimise: bool = True) -> Encode:
    """An ONNX encoder as a function from frames [n, H, W, 3] or tokens [n, L] to unit rows [n, D];
    without `optimise` each node is run as it is written."""
    session = session_of(model, optimise)
    name = session.get_inputs()[0].name
    return lambda frames: np.asarray(session.run(None, {name: frames})[0])
