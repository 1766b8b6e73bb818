"""Layers that compute in float what their int8 will: the arithmetic of quantisation-aware training.

Symmetric, rounded half to even: a layer's input by one step for the whole tensor, its weight by one
for each output channel, batch normalisation folded into the weight before it is rounded, all as
`calibration.quantize` writes it. The gradient passes the rounding as if it were not there; where
the input is clipped it passes to the step alone.

torchao's eager fake quantisers know Linears alone, with inputs by token; its graph mode captures
the model as a graph of other modules and other names. Neither has steps that float16 holds.
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
_SMALLEST = 1e-5  # the smallest range, as `calibration.ranges` has it


def steps(ranges: Tensor, bits: int) -> Tensor:
    """The steps of integers that reach up to `ranges`: the next numbers that float16 holds too, as
    `calibration.ranges.steps` has them; the gradient is that of the ranges over the levels."""
    exact = ranges.clamp(min=_SMALLEST) / (2 ** (bits - 1) - 1)
    half = exact.detach().to(torch.float16)
    above = (half.view(torch.int16) + 1).view(torch.float16)  # the next positive number
    held = torch.where(half.float() < exact, above, half).float()
    made: Tensor = held + (exact - exact.detach())
    return made


class _Rounded(torch.autograd.Function):
    """The values as integers times a step represent them; the gradient of LSQ (Esser et al. 2020,
    arXiv:1902.08153, equations 2 and 3)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        levels = values / step
        ctx.save_for_backward(levels)
        ctx.limits = low, high
        return levels.round().clamp_(low, high).mul_(step)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
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
        """The step of the tensor's integers, float32 [], a number that float16 holds."""
        return steps(self.log_range.exp(), self.bits)

    @torch.no_grad()
    def set_step(self, step: float) -> None:
        """Has `step` be that one, a number that float16 holds."""
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
        largest = weight.detach().abs().flatten(1).amax(1)
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        step = steps(largest, self.bits).reshape(-1, *[1] * (weight.ndim - 1))
        levels = weight / step
        return (levels.detach().round() + (levels - levels.detach())) * step


class FakeLayer(nn.Module):
    """What the layers here have in common: the quantiser of their input, perhaps shared with other
    layers that take the same tensor, and the weight in the form that is rounded."""

    quantizer: Quantizer
    WEIGHT = "weight"

    def float_weight(self) -> Tensor:
        """The weight [out, ...] that is rounded, with all that is folded into it."""
        return cast(Tensor, getattr(self, self.WEIGHT))

    def rounded(self) -> Tensor:
        """The same after rounding."""
        return self.quantizer.weight(self.float_weight())

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
        return F.linear(self.quantizer(input), self.rounded(), self.bias)


class FakeConv2d(FakeLayer, nn.Conv2d):
    """A convolution, with the batch normalisation that follows it, if any, folded in: its running
    statistics stay as they are."""

    norm: tuple[nn.Module, ...] = ()  # in a tuple, not to be a module of this one as well

    def float_weight(self) -> Tensor:
        if not self.norm:
            return self.weight
        return self.weight * self._factor().reshape(-1, 1, 1, 1)

    def _factor(self) -> Tensor:
        norm: Any = self.norm[0]
        factor: Tensor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        return factor

    def _shift(self) -> Tensor | None:
        if not self.norm:
            return self.bias
        norm: Any = self.norm[0]
        before = norm.running_mean if self.bias is None else norm.running_mean - self.bias
        shift: Tensor = norm.bias - before * self._factor()
        return shift

    def product(self, values: Tensor, weight: Tensor) -> Tensor:
        made: Tensor = self._conv_forward(values, weight, None)
        return made

    def forward(self, input: Tensor) -> Tensor:
        made = self._conv_forward(self.quantizer(input), self.rounded(), self._shift())
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

    def forward(self, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        count, length, width = query.shape
        bias = self.in_proj_bias * self._scale()
        parts = F.linear(self.quantizer(query), self.rounded(), bias)
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
        pooled = self.product(self.quantizer(pooled), self.rounded())
        return (pooled, tokens) if tower.output_tokens else pooled
