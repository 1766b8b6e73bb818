"""What a tower costs to run: parameters, and multiply-adds of one frame."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .model import ClipModel


def parameters(module: nn.Module) -> int:
    """The number of a module's weights."""
    return sum(p.numel() for p in module.parameters())


def multiply_adds(clip: ClipModel) -> int:
    """Multiply-adds of the image tower for one frame: those of its convolutions, Linears and
    attention, as PyTorch counts them (half of its FLOPs), on tensors without data."""
    tower = copy.deepcopy(clip.model.visual).eval().to("meta")
    frame = torch.zeros(1, 3, clip.image.height, clip.image.width, device="meta")
    with FlopCounterMode(display=False) as counter:
        tower(frame)  # with gradients: without, attention would be one step that is not counted
    return int(counter.get_total_flops()) // 2
