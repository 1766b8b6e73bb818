"""What a tower costs to run: parameters, and multiply-adds of one frame."""

import copy
from typing import Any

import torch

from . import torchvision_ops as torchvision_ops  # before timm, which imports torchvision

# isort: split
from timm.utils.model import reparameterize_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .fake_quant import fake_layers
from .model import ClipModel, create_from


def parameters(module: nn.Module) -> int:
    """The number of a module's weights."""
    return sum(p.numel() for p in module.parameters())


def text_parameters(clip: ClipModel) -> int:
    """The number of weights of a model's text tower."""
    own = clip.model.named_parameters()
    return sum(p.numel() for name, p in own if not name.startswith(("visual.", "logit_")))


def tower_as_exported(clip: ClipModel) -> nn.Module:
    """A copy of the image tower, its branches merged where it has some for the training alone; of
    one in quantisation-aware training its architecture."""
    plain = create_from(clip.config, clip.name, 0) if fake_layers(clip.model) else clip
    tower: Any = copy.deepcopy(plain.model.visual).eval()
    if hasattr(tower, "trunk"):
        tower.trunk = reparameterize_model(tower.trunk)
    made: nn.Module = tower
    return made


def multiply_adds(clip: ClipModel) -> int:
    """Multiply-adds of the image tower, as it is exported, for one frame: those of convolutions,
    Linears and attention, as PyTorch counts them (half of its FLOPs), on tensors without data."""
    tower = tower_as_exported(clip).to("meta")
    frame = torch.zeros(1, 3, clip.image.height, clip.image.width, device="meta")
    with FlopCounterMode(display=False) as counter:
        tower(frame)  # with gradients: without, attention would be one step that is not counted
    return int(counter.get_total_flops()) // 2
