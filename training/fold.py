"""Batch normalisation folded into the convolution before it: a locked tower runs faster so."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights


@torch.inference_mode()
def folded(tower: nn.Module, example: Tensor) -> nn.Module:
    """A copy of a tower, for inference, with each batch normalisation that directly follows a
    convolution in the run on `example` folded into it. Paths of modules stay as they are."""
    made: Any = copy.deepcopy(tower).eval()
    made.to(memory_format=torch.channels_last)
    for convolution, norm in pairs(made, example):
        conv, bn = made.get_submodule(convolution), made.get_submodule(norm)
        _fold(conv, bn)
        made.set_submodule(norm, getattr(bn, "act", nn.Identity()))  # timm's have an activation
    result: nn.Module = made
    return result


def pairs(tower: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Paths of convolutions, and of the batch normalisations that take their outputs, in the run of
    `tower` (in evaluation mode) on `example`."""
    made_by: dict[int, str] = {}
    kept: list[Tensor] = []  # alive, so that no other tensor has its identity
    found: list[tuple[str, str]] = []
    hooks = []

    def remember(path: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            made_by[id(output)] = path
            kept.append(output)

        return hook

    def match(path: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if id(inputs[0]) in made_by:
                found.append((made_by.pop(id(inputs[0])), path))

        return hook

    for path, module in tower.named_modules():
        if type(module) is nn.Conv2d:
            hooks.append(module.register_forward_hook(remember(path)))
        elif isinstance(module, _BatchNorm):
            hooks.append(module.register_forward_pre_hook(match(path)))
    tower(example)
    for handle in hooks:
        handle.remove()
    names = [name for pair in found for name in pair]
    return [pair for pair in found if all(names.count(name) == 1 for name in pair)]


def _fold(conv: Any, bn: Any) -> None:
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )
