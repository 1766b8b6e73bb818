"""A model's layers in order from input to output: what is locked, and how fast each may learn."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from . import torchvision_ops as torchvision_ops  # before timm, which imports torchvision

# isort: split
import timm.models
from torch import nn

from runtime.errors import DataError

from .model import ClipModel

Groups = list[list[str]]
_BLOCK = re.compile(r"(?:resblocks\.|layer)(\d+)\.")
_STEM = re.compile(
    r"^(?!.*attn_?pool)(?:.*\.)?(?:conv\d|bn\d|class_embedding|cls_emb|positional_embedding|token_embedding|ln_pre)\b"
)


def image_groups(model: nn.Module) -> Groups:
    """Names of the image tower's parameters: the stem, each block, and last the projection."""
    visual = model.visual
    names = [name for name, _ in visual.named_parameters()]  # type: ignore[union-attr]
    trunk: Any = getattr(visual, "trunk", None)
    if trunk is None:
        return _prefixed("visual.", _by_block(names))
    found = timm.models.group_parameters(trunk, trunk.group_matcher(coarse=False))
    ordered = [[f"trunk.{name}" for name in found[key]] for key in sorted(found)]
    projection = [name for name in names if not name.startswith("trunk.")]
    return _prefixed("visual.", [*ordered, projection] if projection else ordered)


def text_groups(model: nn.Module) -> Groups:
    """Names of the text tower's parameters: the embeddings, each block, and last the projection."""
    rest = ("visual.", "logit_")
    return _by_block([n for n, _ in model.named_parameters() if not n.startswith(rest)])


def _by_block(names: Sequence[str]) -> Groups:
    found: dict[float, list[str]] = {}
    for name in names:
        block = _BLOCK.search(name)
        order = int(block[1]) if block else -1 if _STEM.search(name) else float("inf")
        found.setdefault(order, []).append(name)
    return [found[order] for order in sorted(found)]


def _prefixed(prefix: str, groups: Groups) -> Groups:
    return [[prefix + name for name in group] for group in groups]


def lock(clip: ClipModel, groups: Groups, unlocked: int, flag: str) -> None:
    """Takes a tower's groups, but for the last `unlocked`, out of the training.

    Weights that no start has given (the projection after --init-image) are always trained.
    """
    if unlocked >= len(groups):
        raise DataError(
            f"{flag}: {unlocked} of the tower's {len(groups)} groups of layers leave none"
        )
    names = {name for group in groups[: len(groups) - unlocked] for name in group}
    if names <= clip.fresh:
        raise DataError(f"{flag}: that tower's weights are random: give them a start by --init")
    parameters = dict(clip.model.named_parameters())
    for name in names:
        parameters[name].requires_grad_(name in clip.fresh)


def set_training(module: nn.Module, freeze_bn: bool = False) -> None:
    """Training mode, but for the parts that are locked: those keep their statistics, and nothing
    in them is dropped. With `freeze_bn` all of batch normalisation keeps its statistics."""
    module.train()
    for part in _locked(module):
        part.eval()
    for part in module.modules():
        if freeze_bn and isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()


def _locked(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts whose parameters are all locked."""
    parameters = list(module.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        yield module
        return
    for child in module.children():
        yield from _locked(child)


def parameter_groups(
    clip: ClipModel, lr: float, weight_decay: float, image_lr: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Groups for the optimiser: {"params", "names", "lr", "weight_decay"} each.

    A layer's rate is lr * layer_decay^(groups between it and the output), as in BEiT (Bao et al.
    2021, arXiv:2106.08254), times `image_lr` in the image tower. There is no weight decay on
    biases, norms, scales, positions and class tokens.
    """
    exempt = _not_decayed(clip.model)
    factors: dict[str, float] = {}
    for tower, factor in ((image_groups(clip.model), image_lr), (text_groups(clip.model), 1.0)):
        for depth, group in enumerate(reversed(tower)):
            factors |= dict.fromkeys(group, factor * layer_decay**depth)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in clip.model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = lr * factors.get(name, 1.0)
        decay = 0.0 if parameter.ndim < 2 or name in exempt else weight_decay
        new = {"params": [], "names": [], "lr": rate, "weight_decay": decay}
        own = groups.setdefault((rate, decay), new)
        own["params"].append(parameter)
        own["names"].append(name)
    return list(groups.values())


def _not_decayed(model: Any) -> set[str]:
    """Names of the parameters of two and more dimensions that are no weights of a layer."""
    trunk: Any = getattr(model.visual, "trunk", None)
    named = trunk.no_weight_decay() if hasattr(trunk, "no_weight_decay") else ()
    positions = (n for n, _ in model.named_parameters() if n.endswith("positional_embedding"))
    return {*model.no_weight_decay(), *(f"visual.trunk.{name}" for name in named), *positions}
