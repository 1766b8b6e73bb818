"""Quantisation-aware training: an image tower that computes as its int8 file will, in place.

`fake_quantize` exchanges the classes of the tower's Linears and convolutions; paths, parameters and
state stay those of the float model, with a range for each quantised tensor beside them. The first
ranges are found by `qat_ranges.calibrate`, and training goes on from there:

    fake_quantize(clip)
    calibrate(clip, frames)     # uint8 [n, H, W, 3], a few batches
    ...                         # train
    save(clip, folder, record)  # writes the float weights, and quantization.json beside them
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from runtime.errors import DataError

from . import torchvision_ops as torchvision_ops  # before open_clip

# isort: split
import open_clip.modified_resnet
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from timm.layers.linear import Linear as TimmLinear

from .fake_merged import AS_THEY_ARE, KINDS, MERGES, branches
from .fake_quant import (
    BITS,
    FakeAttention,
    FakeConv2d,
    FakeLayer,
    FakeLinear,
    FakeTower,
    FoldedNorm,
    Quantizer,
    fake_layers,
)
from .fold import pairs
from .groups import image_groups
from .model import ClipModel
from .quantization import NAME

_NAMED = 4
_LINEARS = (nn.Linear, TimmLinear, nn.modules.linear.NonDynamicallyQuantizableLinear)
_OTHERS = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.MultiheadAttention,
    open_clip.modified_resnet.AttentionPool2d,
    open_clip.transformer.Attention,
)


def require_trained(clip: ClipModel, flags: str) -> None:
    """Raises DataError where the image tower's weights are random."""
    if {name for group in image_groups(clip.model) for name in group} <= clip.fresh:
        raise DataError(f"--qat goes on from a trained model: name its folder by {flags}")


def fake_quantize(clip: ClipModel, bits: int = BITS) -> None:
    """Exchanges, in place, what export's int8 quantises of the image tower: all its Linears and
    convolutions, and the blocks that export merges into one. A tensor that several of them take has
    one quantiser. Raises DataError for a tower with a layer that there is no such form of."""
    visual: Any = clip.model.visual
    chosen, merged = _chosen(clip)
    folds = pairs(visual, _example(clip))
    for module, kind in chosen:
        module.__class__ = kind
        module.quantizer = Quantizer(bits).to(next(module.parameters()).device)
    for convolution, norm in folds:
        conv, bn = visual.get_submodule(convolution), visual.get_submodule(norm)
        if isinstance(conv, FakeConv2d) and bn not in merged:
            conv.norm = (bn,)
            bn.__class__ = type(f"Folded{type(bn).__name__}", (FoldedNorm, type(bn)), {})
    _share(clip)


def set_steps(clip: ClipModel, steps: Mapping[str, float]) -> None:
    """Gives each layer's input of a fake-quantised tower its step, by the layers' names. Raises
    DataError where these are not its layers."""
    layers = fake_layers(clip.model)
    if wrong := sorted(layers.keys() ^ steps.keys()):
        raise DataError(f"{NAME} is not of this model: {', '.join(wrong[:_NAMED])}")
    for name, layer in layers.items():
        layer.quantizer.set_step(steps[name])


def _chosen(clip: ClipModel) -> tuple[list[tuple[Any, type[FakeLayer]]], set[nn.Module]]:
    """Every layer that is to be quantised, and its new class; and the modules that are merged."""
    found: list[tuple[Any, type[FakeLayer]]] = []
    attentions = {
        module.attn
        for module in clip.model.visual.modules()
        if type(module) is ResidualAttentionBlock
    }
    merged: set[nn.Module] = set()
    for path, module in clip.model.visual.named_modules(prefix="visual"):
        if module in merged:
            continue
        if type(module) in KINDS:
            merged |= branches(module)
        kind = _kind(module, attentions)
        if kind:
            found.append((module, kind))
        elif isinstance(module, _OTHERS) or _merges(module):
            raise DataError(
                f"--qat: {clip.name} has a layer that cannot be fake-quantised yet: {path}, "
                f"a {type(module).__name__}; convolutions, Linears and open_clip's own "
                "vision transformers can"
            )
    return found, merged


def _merges(module: nn.Module) -> bool:
    """Whether export makes something else of it."""
    return type(module) not in AS_THEY_ARE and any(hasattr(module, name) for name in MERGES)


def _kind(module: nn.Module, attentions: Collection[nn.Module]) -> type[FakeLayer] | None:
    if type(module) is nn.Conv2d:
        return FakeConv2d
    if type(module) in _LINEARS:
        return FakeLinear
    if type(module) in KINDS:
        return KINDS[type(module)]
    if module in attentions:
        return FakeAttention
    if type(module) is VisionTransformer and module.attn_pool is None and module.proj is not None:
        return FakeTower
    return None


def _example(clip: ClipModel) -> Tensor:
    height, width = clip.image.height, clip.image.width
    return torch.zeros(2, 3, height, width, device=clip.model.logit_scale.device)


def _share(clip: ClipModel) -> None:
    """Gives the layers that take the same tensor the same quantiser."""
    first: dict[tuple[int, int], Quantizer] = {}
    shared: dict[nn.Module, Quantizer] = {}
    alive: list[Tensor] = []  # so that no other tensor has its identity

    def see(quantizer: Any, inputs: tuple[Tensor, ...]) -> None:
        alive.append(inputs[0])
        shared[quantizer] = first.setdefault((id(inputs[0]), inputs[0]._version), quantizer)

    layers = fake_layers(clip.model)
    handles = [layer.quantizer.register_forward_pre_hook(see) for layer in layers.values()]
    forward(clip.model.visual, _example(clip))
    for handle in handles:
        handle.remove()
    if passed := [name for name, layer in layers.items() if layer.quantizer not in shared]:
        raise DataError(
            f"--qat does not know image towers like that of {clip.name}: it takes {passed[0]} past "
            "the layer itself"
        )
    for layer in layers.values():
        layer.quantizer = shared[layer.quantizer]


@torch.no_grad()
def forward(tower: nn.Module, pixels: Tensor) -> Tensor:
    """What a tower makes of pixels [n, 3, H, W] in evaluation; its modes stay as they are."""
    in_training = [module for module in tower.modules() if module.training]
    tower.eval()
    try:
        found: Tensor = tower(pixels)
        return found
    finally:
        for module in in_training:
            module.training = True
