"""What an image tower is made of: its size, its multiply-adds, and how well INT8 suits it."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
from torch import nn

from runtime.remembered import recall, remember
from training.cost import multiply_adds, parameters, tower_as_exported
from training.model import PRESETS, ClipModel, create

KNOWN = ("ViT-B-32", "ViT-B-16", "RN50", "MobileCLIP-S1")
"""open_clip models that are listed beside the presets: for comparison, and as teachers."""
JETSON = {
    "resnet18": "Orin Nano, TensorRT fp16: 0.70 ms a frame in batches of 8 [1]",
    "ViT-B-32": "Orin Nano, TensorRT fp16: 2.98 ms a frame in batches of 8 [1]",
    "ViT-B-16": "Orin Nano 8 GB, TensorRT 10.3: fp16 5.68 ms, int8 4.92 ms [2]",
}
JETSON_SOURCES = (
    "[1] NVIDIA-AI-IOT/jetson-intro-to-distillation, README (224 pixels)",
    "[2] onnxsim/onnxsim, scripts/nvidia/README.md (batch 1, Linears alone in int8)",
)
_SMOOTH = (nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Hardsigmoid)


class Facts(msgspec.Struct, frozen=True):
    """An image tower: input side in pixels, parameters, multiply-adds for a frame, as it is
    exported; the parameters of the text tower beside it; and how INT8 suits it, in words."""

    name: str
    side: int
    image_parameters: int
    multiply_adds: int
    text_parameters: int
    int8: str


def presets() -> list[str]:
    """The names of our own presets, from the smallest file name to the last."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def facts(name: str) -> Facts:
    """The facts of a preset, an open_clip model, a config or a checkpoint folder; counted once on a
    machine for each. Raises DataError for a name that is none of these."""
    key = {"name": name, "torch": torch.__version__, "preset": digest(name)}
    found = recall("towers", key, Facts) if key["preset"] else None
    if found is None:
        found = count(create(name))
        if key["preset"]:
            remember("towers", key, found)
    return found


def count(clip: ClipModel) -> Facts:
    """Counts a model's parameters and multiply-adds."""
    tower = tower_as_exported(clip)
    return Facts(
        clip.name,
        clip.image.height,
        parameters(tower),
        multiply_adds(clip),
        parameters(clip.model) - parameters(clip.model.visual),
        suitability(tower),
    )


def suitability(tower: nn.Module) -> str:
    """How well INT8 suits a tower, by what it is made of.

    Linears and convolutions with ReLU hold their ranges; smooth activations and gates between
    convolutions have long tails; branches that were merged into one convolution leave weights of
    very different sizes (Chu et al. 2022, arXiv:2212.01593).
    """
    layers = list(tower.modules())
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if len(linears) > len(convolutions):
        return "good: Linears"
    if any("mobileone" in type(layer).__module__ or "repvit" in type(layer).__module__
           or "fastvit" in type(layer).__module__ for layer in layers):  # fmt: skip
        return "check it: merged branches"
    if any(isinstance(layer, _SMOOTH) for layer in layers):
        return "fair: smooth activations"
    return "good: convolutions and ReLU"


def digest(name: str) -> str:
    """What a name stands for: a preset's content, an open_clip name itself; nothing for a path,
    which may hold anything tomorrow."""
    preset = PRESETS / f"{name}.json"
    if preset.is_file():
        return hashlib.sha256(preset.read_bytes()).hexdigest()
    return "" if Path(name).expanduser().exists() else json.dumps(name)


def listed(names: Sequence[str]) -> list[str]:
    """The names that are asked for, else all presets and what is known."""
    return list(names) or [*presets(), *KNOWN]
