"""The first ranges of quantisation-aware training, from a few batches of frames."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.errors import DataError

from .evaluate import normalise
from .fake_quant import FakeLayer, Quantizer, fake_layers
from .model import ClipModel
from .qat import forward

CALIBRATION = 8  # batches
_KEPT = 8  # frames, on which ranges are compared
_AT_ONCE = 64  # frames that go through the tower together
_ROWS = 64  # of each, where a Linear takes them
_SHARES = [0.85**n for n in range(14)]  # of the largest value
_ALPHAS = (0.25, 0.5, 0.75, 1.0)
_SMALLEST = 1e-5
_SAME = 1e-4


class Choice(NamedTuple):
    """A range, what it costs, and what the channels are divided by before, if anything [C]."""

    error: float
    range: float
    smooth: Tensor | None = None


@dataclass
class Seen:
    """What came by one quantiser, and who takes it."""

    layers: list[FakeLayer] = field(default_factory=list)
    norm: nn.LayerNorm | None = None
    channels: Tensor | None = None
    """The largest magnitude of each channel [C]."""
    kept: list[Tensor] = field(default_factory=list)
    frames: int = 0

    def add(self, values: Tensor) -> None:
        """Takes in a batch's values."""
        other = [a for a in range(values.ndim) if a != self.axis % values.ndim]
        largest = values.abs().amax(other)
        self.channels = largest if self.channels is None else self.channels.maximum(largest)
        missing = _KEPT - self.frames
        self.frames += len(values)
        if missing > 0:
            self.kept.append(self._some(values[:missing]))

    def _some(self, values: Tensor) -> Tensor:
        if self.axis == 1:
            return values.clone()
        rows = values.flatten(0, -2)
        return rows[:: -(-len(rows) // (_ROWS * len(values)))].clone()

    @property
    def axis(self) -> int:
        """The axis of the channels."""
        return 1 if self.layers[0].CONVOLVES else -1


@torch.no_grad()
def calibrate(clip: ClipModel, batches: Iterable[Tensor]) -> None:
    """Sets every range of a fake-quantised tower to the one that changes the outputs of its layers
    least, on frames uint8 [n, H, W, 3].

    Where a LayerNorm feeds Linears alone, its channels are evened out before, if that helps: it
    divides and they multiply by the factors of SmoothQuant (Xiao et al. 2023, arXiv:2211.10438),
    in the weights themselves, and the float model stays the same function. Raises DataError
    where there are no frames, or a value is not finite.
    """
    parts = (part for frames in batches for part in torch.split(frames, _AT_ONCE))
    found, first = _observed(clip, parts)
    for quantizer, seen in found.items():
        best = _plain(seen, quantizer)
        if seen.norm is not None:
            tried = (_smoothed(seen, quantizer, alpha) for alpha in _ALPHAS)
            better = min(tried, key=lambda choice: choice.error)
            if better.error < best.error and _even_out(clip, seen, better.smooth, first):
                best = better
        quantizer.log_range.fill_(best.range).log_()


def _observed(clip: ClipModel, batches: Iterable[Tensor]) -> tuple[dict[Quantizer, Seen], Tensor]:
    """What each quantiser sees of the float model; and some of the pixels."""
    found: dict[Quantizer, Seen] = {}
    for layer in fake_layers(clip.model).values():
        found.setdefault(layer.quantizer, Seen()).layers.append(layer)
    normed: dict[int, nn.LayerNorm] = {}
    alive: list[Tensor] = []

    def see(quantizer: Any, inputs: tuple[Tensor, ...]) -> None:
        if not torch.isfinite(inputs[0]).all():
            raise DataError("--qat: the float model gives numbers that are not finite")
        found[quantizer].norm = normed.get(id(inputs[0]))
        found[quantizer].add(inputs[0])

    def note(norm: Any, _: Any, output: Tensor) -> None:
        normed[id(output)] = norm
        alive.append(output)

    handles = [quantizer.register_forward_pre_hook(see) for quantizer in found]
    norms = (m for m in clip.model.visual.modules() if isinstance(m, nn.LayerNorm))
    handles += [norm.register_forward_hook(note) for norm in norms]
    first: Tensor | None = None
    for quantizer in found:
        quantizer.enabled = False
    for frames in batches:
        pixels = normalise(frames.to(clip.model.logit_scale.device), clip.image)
        first = pixels[:_KEPT] if first is None else first
        forward(clip.model.visual, pixels)
        normed.clear()
        alive.clear()
    for quantizer in found:
        quantizer.enabled = True
    for handle in handles:
        handle.remove()
    if first is None:
        raise DataError("--qat: there are no frames to calibrate on")
    return {q: _only_linears(seen) for q, seen in found.items()}, first


def _only_linears(seen: Seen) -> Seen:
    if any(layer.CONVOLVES for layer in seen.layers):
        seen.norm = None
    return seen


def _plain(seen: Seen, quantizer: Quantizer) -> Choice:
    assert seen.channels is not None
    weights = [layer.float_weight() for layer in seen.layers]
    return _best(seen, quantizer, torch.cat(seen.kept), weights, float(seen.channels.max()))


def _smoothed(seen: Seen, quantizer: Quantizer, alpha: float) -> Choice:
    """The best range after SmoothQuant's equation 4: max|X_j|^alpha / max|W_j|^(1 - alpha), scaled
    to a mean (of the logarithm) of 1."""
    assert seen.channels is not None
    weights = [layer.float_weight() for layer in seen.layers]
    rows = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    factors = seen.channels.clamp(_SMALLEST) ** alpha / rows.clamp(_SMALLEST) ** (1 - alpha)
    factors = (factors / factors.log().mean().exp()).clamp(1e-4, 1e4)
    largest = float((seen.channels / factors).max())
    values, weights = torch.cat(seen.kept) / factors, [weight * factors for weight in weights]
    return _best(seen, quantizer, values, weights, largest)._replace(smooth=factors)


def _best(
    seen: Seen, quantizer: Quantizer, values: Tensor, weights: Sequence[Tensor], largest: float
) -> Choice:
    """The range with the smallest error of the outputs, weights rounded as well."""
    pairs = list(zip(seen.layers, weights, strict=True))
    right = [layer.product(values, weight) for layer, weight in pairs]
    rounded = [quantizer.weight(weight) for weight in weights]

    def error(share: float) -> float:
        quantizer.log_range.fill_(max(share * largest, _SMALLEST)).log_()
        own = quantizer(values)
        made = [layer.product(own, w) for layer, w in zip(seen.layers, rounded, strict=True)]
        return sum(
            float((m - r).square().sum() / r.square().sum().clamp(1e-20))
            for m, r in zip(made, right, strict=True)
        )

    found, share = min((error(share), share) for share in _SHARES)
    return Choice(found, max(share * largest, _SMALLEST))


def _even_out(clip: ClipModel, seen: Seen, factors: Tensor | None, pixels: Tensor) -> bool:
    """Divides what the LayerNorm gives, and multiplies the weights that take it. Takes it back, and
    returns False, where something else takes it as well, and the model is another one then."""
    assert factors is not None
    quantizers = {layer.quantizer for layer in fake_layers(clip.model).values()}
    for quantizer in quantizers:
        quantizer.enabled = False
    before = F.normalize(forward(clip.model.visual, pixels), dim=-1)
    _multiply(seen, factors)
    after = F.normalize(forward(clip.model.visual, pixels), dim=-1)
    same = bool((before - after).abs().max() < _SAME)
    if not same:
        _multiply(seen, 1 / factors)
    for quantizer in quantizers:
        quantizer.enabled = True
    return same


def _multiply(seen: Seen, factors: Tensor) -> None:
    assert seen.norm is not None
    for parameter in seen.norm.parameters():
        parameter.div_(factors)
    for layer in seen.layers:
        weight: Any = getattr(layer, layer.WEIGHT)
        weight.mul_(factors if layer.WEIGHT != "proj" else factors[:, None])
