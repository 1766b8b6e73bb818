"""Layers that compute in float what their int8 will: the arithmetic of quantisation-aware training.

Symmetric, rounded half to even: a layer's input by one step for the whole tensor, its weight by one
for each output channel, batch normalisation folded into the weight before it is rounded, its bias
to multiples of the two steps' product, all as `calibration.quantize` writes it. The gradient passes
the rounding as if it were not there; where the input is clipped it passes to the step alone.

Steps have few significant bits. A layer's products, its bias and their sums are then numbers that
float32 holds, and the order in which an engine adds them changes nothing, as long as a sum stays
below 2^18 times the product of the two steps, as it does in trained layers. Else a few values in a
million, next to the middle between two integers, are rounded up here and down there; a network
with many layers multiplies that, and trained model and file differ by as much as int8 does from
float.

torchao's eager fake quantisers know Linears alone, with inputs by token; its graph mode captures
the model as a graph of other modules and other names. Neither has such steps, nor such biases.
"""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import torchvision_ops as torchvision_ops  # before open_clip

# isort: split
from open_clip.transformer import VisionTransformer

BITS = 8
RANGE = "log_range"
# As `calibration.ranges` has them: the smallest range, the significant bits of a step, and the
# exponent of the smallest float16. Its module would bring onnx.
_SMALLEST, _EXACT_BITS, _LOWEST = 1e-5, 3, -24


def steps(ranges: Tensor, bits: int) -> Tensor:
    """The steps of integers that reach up to `ranges`: the next numbers of few significant bits,
    as `calibration.ranges.steps` has them; the gradient is that of the ranges over the levels."""
    least = ranges.clamp(min=_SMALLEST) / (2 ** (bits - 1) - 1)
    _, exponents = torch.frexp(least.detach())
    unit = torch.ldexp(torch.ones_like(least), (exponents - _EXACT_BITS).clamp(min=_LOWEST))
    held = torch.ceil(least.detach() / unit) * unit
    made: Tensor = held + (least - least.detach())
    return made


def _rounded(levels: Tensor) -> Tensor:
    """The nearest integers; the gradient passes."""
    return levels.detach().round() + (levels - levels.detach())


class _Rounded(torch.autograd.Function):
    """The values as integers times a step represent them; the gradient of LSQ (Esser et al. 2020,
    arXiv:1902.08153, equations 2 and 3)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        """Values of any shape, rounded to multiples of `step` [] from low to high of them."""
        levels = values / step
        ctx.save_for_backward(levels)
        ctx.limits = low, high
        return levels.round().clamp_(low, high).mul_(step)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """To the values where they were not clipped; to the step what its change would have made
        of each value: the limit where it was clipped, else the rounding's error in steps."""
        (levels,) = ctx.saved_tensors
        low, high = ctx.limits
        inside = (levels >= low) & (levels <= high)
        for_step = None
        if ctx.needs_input_grad[1]:
            error = levels.round().clamp_(low, high) - levels * inside
            # Scaled as in section 2.2, or it would fill the norm that gradients are clipped to.
            for_step = (gradient * error).sum() / math.sqrt(levels[0].numel() * high)
        return gradient * inside, for_step, None, None


class Quantizer(nn.Module):
    """Rounds what one tensor holds, and the weights of the layers that take it.

    The parameter is the logarithm of the range, so that a step of the optimiser changes a wide
    and a narrow range by the same share (Jain et al. 2019, arXiv:1903.08066). While `enabled` is
    off, all passes as it is.
    """

    def __init__(self, bits: int = BITS) -> None:
        super().__init__()
        self.bits, self.enabled = bits, True
        self.log_range = nn.Parameter(torch.zeros(()))

    @property
    def step(self) -> Tensor:
        """The step of the tensor's integers, float32 [], a number of few significant bits."""
        return steps(self.log_range.exp(), self.bits)

    @torch.no_grad()
    def set_step(self, step: float) -> None:
        """Has `step` be that one, a number of few significant bits."""
        levels = 2 ** (self.bits - 1) - 1
        # A little less: logarithm and exponential are not exact, and steps are rounded up.
        self.log_range.fill_(step * levels * (1 - 1e-4)).log_()

    def forward(self, values: Tensor) -> Tensor:
        """The tensor as its integers represent it."""
        if not self.enabled:
            return values
        high = 2 ** (self.bits - 1) - 1
        apply: Any = _Rounded.apply
        return cast(Tensor, apply(values.float(), self.step, -high - 1, high))

    def weight(self, weight: Tensor) -> Tensor:
        """A weight [out, ...] as its integers represent it, by output channel."""
        if not self.enabled:
            return weight
        step = self._weight_steps(weight).reshape(-1, *[1] * (weight.ndim - 1))
        return _rounded(weight / step) * step

    def bias(self, bias: Tensor | None, weight: Tensor) -> Tensor | None:
        """The bias [out], if any, of a layer with this weight [out, ...] in multiples of what one
        stands for in the sum of the integers' products."""
        if bias is None or not self.enabled:
            return bias
        unit = self.step.detach() * self._weight_steps(weight)
        return _rounded(bias / unit) * unit

    def _weight_steps(self, weight: Tensor) -> Tensor:
        largest = weight.detach().abs().flatten(1).amax(1)
        return steps(torch.where(largest > 0, largest, torch.ones_like(largest)), self.bits)


class FakeLayer(nn.Module):
    """What the layers here have in common: the quantiser of their input, perhaps shared with other
    layers that take the same tensor, and the weight in the form that is rounded."""

    quantizer: Quantizer
    WEIGHT = "weight"
    CONVOLVES = False

    def float_weight(self) -> Tensor:
        """The weight [out, ...] that is rounded, with all that is folded into it."""
        return cast(Tensor, getattr(self, self.WEIGHT))

    def float_bias(self) -> Tensor | None:
        """The bias [out] that goes with it, if any."""
        return cast("Tensor | None", getattr(self, "bias", None))

    def rounded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias after rounding."""
        weight = self.float_weight()
        return self.quantizer.weight(weight), self.quantizer.bias(self.float_bias(), weight)

    def product(self, values: Tensor, weight: Tensor) -> Tensor:
        """What the layer makes of its input by a weight of that form, without its bias."""
        return F.linear(values, weight)


def fake_layers(model: nn.Module) -> dict[str, FakeLayer]:
    """The fake-quantised layers of a model, by the names of their weights in the checkpoint."""
    return {
        f"{path}.{module.WEIGHT}" if path else module.WEIGHT: module
        for path, module in model.named_modules()
        if isinstance(module, FakeLayer)
    }


class FakeLinear(FakeLayer, nn.Linear):
    """A Linear."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.quantizer(input), *self.rounded())


class FakeConv2d(FakeLayer, nn.Conv2d):
    """A convolution, with the batch normalisation that follows it, if any, folded in: its running
    statistics stay as they are."""

    CONVOLVES = True
    norm: tuple[nn.Module, ...] = ()  # in a tuple, not to be a module of this one as well

    def float_weight(self) -> Tensor:
        if not self.norm:
            return self.weight
        return self.weight * self._factor().reshape(-1, 1, 1, 1)

    def _factor(self) -> Tensor:
        norm: Any = self.norm[0]
        factor: Tensor = norm.weight / (norm.running_var + norm.eps).sqrt()
        return factor

    def float_bias(self) -> Tensor | None:
        if not self.norm:
            return self.bias
        norm: Any = self.norm[0]
        before = -norm.running_mean if self.bias is None else self.bias - norm.running_mean
        shift: Tensor = before * self._factor() + norm.bias
        return shift

    def product(self, values: Tensor, weight: Tensor) -> Tensor:
        made: Tensor = self._conv_forward(values, weight, None)
        return made

    def forward(self, input: Tensor) -> Tensor:
        made = self._conv_forward(self.quantizer(input), *self.rounded())
        return cast(Tensor, made)


class FoldedNorm(nn.Module):
    """A batch normalisation that is part of the convolution before it; what timm puts into one
    beside it, its activation, stays."""

    def forward(self, input: Tensor) -> Tensor:
        act: Any = getattr(self, "act", None)
        return input if act is None else cast(Tensor, act(input))


class FakeAttention(FakeLayer, nn.MultiheadAttention):
    """Self-attention, its three Linears as one with the scale folded into Q, as export has it."""

    WEIGHT = "in_proj_weight"

    def _scale(self) -> Tensor:
        scale = torch.ones_like(self.in_proj_bias)
        scale[: self.embed_dim] = self.head_dim**-0.5
        return scale

    def float_weight(self) -> Tensor:
        return self.in_proj_weight * self._scale()[:, None]

    def float_bias(self) -> Tensor:
        return self.in_proj_bias * self._scale()

    def forward(self, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        count, length, width = query.shape
        parts = F.linear(self.quantizer(query), *self.rounded())
        parts = parts.reshape(count, length, 3 * self.num_heads, -1).transpose(1, 2)
        q, k, v = parts.chunk(3, dim=1)  # [N, heads, length, head] each
        mixed = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        out: Any = self.out_proj
        return out(mixed.transpose(1, 2).reshape(count, length, width)), None


class FakeTower(FakeLayer, VisionTransformer):  # type: ignore[misc]
    """open_clip's vision transformer, whose projection is a parameter of its own."""

    WEIGHT = "proj"

    def float_weight(self) -> Tensor:
        proj: Any = self.proj
        return cast(Tensor, proj.T)

    def forward(self, x: Tensor) -> Any:
        tower: Any = self
        pooled, tokens = tower._pool(tower.transformer(tower._embeds(x)))
        pooled = self.product(self.quantizer(pooled), self.rounded()[0])
        return (pooled, tokens) if tower.output_tokens else pooled
