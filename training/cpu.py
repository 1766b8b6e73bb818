"""What makes steps on a CPU faster, where PyTorch leaves time lying about."""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
_PAD = 256 * 2**20  # bytes asked for at a time


def keep_memory() -> None:
    """Lets this process keep what it frees. Otherwise glibc gives each large tensor back to the
    system and asks anew for the next, whose pages are then mapped and zeroed one by one: a fifth
    of a MobileNet's step. Without glibc it does nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for parameter, value in (
            (_TRIM_THRESHOLD, 2**31 - 1),
            (_TOP_PAD, _PAD),
            (_MMAP_MAX, 0),
        ):
            mallopt(parameter, value)


def quicken(tower: nn.Module) -> None:
    """Turns the strided depthwise convolutions of a tower into such as have a fast gradient in
    bfloat16. Their weights, names and outputs stay as they are."""
    for module in tower.modules():
        if type(module) is nn.Conv2d and _is_slow(module):
            module.__class__ = DepthwiseConv2d


def _is_slow(conv: nn.Conv2d) -> bool:
    return (
        conv.groups == conv.in_channels == conv.out_channels > 1
        and max(conv.stride) > 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and all(p < k for p, k in zip(conv.padding, conv.kernel_size, strict=True))
    )


class DepthwiseConv2d(nn.Conv2d):
    """A strided depthwise convolution whose gradient in bfloat16 is computed as one of stride 1."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not (input.requires_grad and torch.is_autocast_enabled("cpu")):
            plain: Tensor = super()._conv_forward(input, weight, bias)
            return plain
        kind = torch.get_autocast_dtype("cpu")
        bias = None if bias is None else bias.to(kind)
        made: Tensor = _Depthwise.apply(  # type: ignore[no-untyped-call]
            input.to(kind), weight.to(kind), bias, self.stride, self.padding
        )
        return made


class _Depthwise(torch.autograd.Function):
    """oneDNN's own gradient by the input takes 20 times as long as the convolution (AVX-512). It is
    the convolution, with the kernel turned about, of the output's gradient with zeros between."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding, ctx.bias = stride, padding, bias is not None
        return F.conv2d(x, weight, bias, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        by_x = _by_input(gradient, x, weight, ctx) if ctx.needs_input_grad[0] else None
        _, by_weight, by_bias = torch.ops.aten.convolution_backward(
            gradient, x, weight, [len(weight)], ctx.stride, ctx.padding, [1, 1], False, [0, 0],
            len(weight), [False, ctx.needs_input_grad[1], ctx.bias],
        )  # fmt: skip
        return by_x, by_weight, by_bias, None, None


def _by_input(gradient: Tensor, x: Tensor, weight: Tensor, ctx: Any) -> Tensor:
    n, channels, *sizes = x.shape
    kernel, around = weight.shape[2:], ctx.padding
    size = [s + 2 * p - k + 1 for s, p, k in zip(sizes, around, kernel, strict=True)]
    spread = gradient.new_zeros(n, *size, channels)  # channels last: they are copied whole
    spread[:, :: ctx.stride[0], :: ctx.stride[1]] = gradient.permute(0, 2, 3, 1)
    outside = [k - 1 - p for k, p in zip(kernel, around, strict=True)]
    return F.conv2d(spread.permute(0, 3, 1, 2), weight.flip(2, 3), padding=outside, groups=channels)
