"""Blocks of several branches that export merges into one convolution, quantised as that one.

They keep their branches as parameters, so that the checkpoint stays what it is; in the run the
kernels are added up (RepVGG, Ding et al. 2021, arXiv:2101.03697), the sum is rounded, and the
gradient goes to every branch. Batch normalisation's running statistics stay as they are.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import torchvision_ops as torchvision_ops  # before timm, which imports torchvision

# isort: split
from timm.models.fastvit import (
    MobileOneBlock,
    ReparamLargeKernelConv,
    RepConditionalPosEnc,
    RepMixer,
)
from timm.models.repvit import ConvNorm, RepVggDw, RepVit, RepVitClassifier

from .fake_quant import FakeLayer

MERGES = ("reparameterize", "fuse", "switch_to_deploy")  # as timm's reparameterize_model has it
AS_THEY_ARE = (
    ConvNorm,
    RepVit,
    RepVitClassifier,
)  # merge nothing but a convolution with its normalisation


class FakeMerged(FakeLayer):
    """What the blocks have in common. `WEIGHT` is a name alone: no parameter has it."""

    WEIGHT = "merged"
    CONVOLVES = True
    BEHIND: tuple[str, ...] = ()
    """The parts that run on what the convolution gives, with layers of their own."""

    stride: int = 1

    def merged(self) -> tuple[Tensor, Tensor]:
        """The convolution's weight [out, in / groups, K, K] and bias [out]."""
        raise NotImplementedError

    def float_weight(self) -> Tensor:
        return self.merged()[0]

    def float_bias(self) -> Tensor:
        return self.merged()[1]

    def product(self, values: Tensor, weight: Tensor) -> Tensor:
        return self._convolved(values, weight)

    def _convolved(self, values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        padding, groups = weight.shape[-1] // 2, values.shape[1] // weight.shape[1]
        return F.conv2d(values, weight, bias, self.stride, padding, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        made = self._convolved(self.quantizer(x), *self.rounded())
        for name in self.BEHIND:
            made = getattr(self, name)(made)
        return made


class FakeMobileOne(FakeMerged, MobileOneBlock):
    """FastViT's convolutions: some of one size, one of 1 x 1, and the input itself."""

    BEHIND = ("se", "act")

    def merged(self) -> tuple[Tensor, Tensor]:
        return _mobile_one(self)


class FakeLargeKernel(FakeMerged, ReparamLargeKernelConv):
    """FastViT's large kernel beside a small one."""

    BEHIND = ("se", "act")

    def merged(self) -> tuple[Tensor, Tensor]:
        block: Any = self
        convolutions = [block.large_conv, getattr(block, "small_conv", None)]
        return _sum([_branch(b.conv, b.bn) for b in convolutions if b is not None])


class FakeRepMixer(FakeMerged, RepMixer):
    """FastViT's x + scale * (mixer(x) - norm(x))."""

    def merged(self) -> tuple[Tensor, Tensor]:
        block: Any = self
        (weight, bias), (less, shift) = _mobile_one(block.mixer), _mobile_one(block.norm)
        gamma = getattr(block.layer_scale, "gamma", torch.ones_like(bias)).reshape(-1)
        same = _identity(weight, block.dim)
        return same + gamma.reshape(-1, 1, 1, 1) * (weight - less), gamma * (bias - shift)


class FakePositions(FakeMerged, RepConditionalPosEnc):
    """FastViT's positions: a convolution and its input."""

    def merged(self) -> tuple[Tensor, Tensor]:
        block: Any = self
        return block.pos_enc.weight + _identity(block.pos_enc.weight, block.groups), (
            block.pos_enc.bias
        )


class FakeRepVgg(FakeMerged, RepVggDw):
    """RepViT's convolution by channel, one of 1 x 1 and the input, normalised together."""

    def merged(self) -> tuple[Tensor, Tensor]:
        block: Any = self
        small = block.conv1
        other = _branch(small.c, small.bn) if block.legacy else (small.weight, small.bias)
        weight, bias = _sum([_branch(block.conv.c, block.conv.bn), other])
        weight = weight + _identity(weight, block.dim)
        return (weight, bias) if block.legacy else _normalised(weight, bias, block.bn)


KINDS: dict[type[nn.Module], type[FakeMerged]] = {
    MobileOneBlock: FakeMobileOne,
    ReparamLargeKernelConv: FakeLargeKernel,
    RepMixer: FakeRepMixer,
    RepConditionalPosEnc: FakePositions,
    RepVggDw: FakeRepVgg,
}


def branches(block: nn.Module) -> set[nn.Module]:
    """The modules inside a block of `KINDS` that are merged, and run no more."""
    behind = KINDS[type(block)].BEHIND
    return {
        module
        for name, child in block.named_children()
        if name not in behind
        for module in child.modules()
    }


def _mobile_one(block: Any) -> tuple[Tensor, Tensor]:
    convolutions = [*(block.conv_kxk or ()), block.conv_scale]
    found = [_branch(b.conv, b.bn) for b in convolutions if b is not None]
    if block.identity is not None:
        size, inside = block.kernel_size, block.in_chs // block.groups
        like = block.identity.weight.new_empty(block.out_chs, inside, size, size)
        same = _identity(like, block.groups)
        found.append(_normalised(same, torch.zeros_like(block.identity.bias), block.identity))
    return _sum(found)


def _branch(conv: nn.Conv2d, norm: Any) -> tuple[Tensor, Tensor]:
    bias = torch.zeros_like(norm.bias) if conv.bias is None else conv.bias
    return _normalised(conv.weight, bias, norm)


def _normalised(weight: Tensor, bias: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    deviation = (norm.running_var + norm.eps).sqrt()
    shift = norm.bias + (bias - norm.running_mean) * norm.weight / deviation
    return weight * (norm.weight / deviation).reshape(-1, 1, 1, 1), shift


def _sum(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The sum of convolutions, the smaller kernels in the middle of the first."""
    weight, bias = parts[0]
    for other, shift in parts[1:]:
        weight = weight + F.pad(other, [(weight.shape[-1] - other.shape[-1]) // 2] * 4)
        bias = bias + shift
    return weight, bias


@torch.no_grad()
def _identity(like: Tensor, groups: int) -> Tensor:
    """The weight of the convolution that gives back what it takes."""
    return nn.init.dirac_(torch.empty_like(like), groups)
