"""A smaller ViT that begins with the weights of a larger one of its kind.

TinyCLIP (Wu et al. 2023, arXiv:2309.12314), manual inheritance: layers at even distances; of the
channels, heads and hidden units those whose weights matter most, here by their norm. One choice of
channels holds for the whole residual stream; heads and hidden units are chosen layer by layer.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import torchvision_ops as torchvision_ops  # before open_clip, which imports torchvision

# isort: split
from open_clip.transformer import VisionTransformer

Weights = dict[str, Tensor]
_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.")


def is_smaller(small: Any, large: Any) -> bool:
    """Whether both image towers are open_clip's own ViTs, the small one no larger in anything, with
    equal patches, head width and embeddings."""
    if not (isinstance(small, VisionTransformer) and isinstance(large, VisionTransformer)):
        return False
    if small.attn_pool is not None or large.attn_pool is not None:
        return False
    own, old = _shape(small), _shape(large)
    fits = all(own[name] <= old[name] for name in ("width", "layers", "heads", "hidden"))
    return (
        fits
        and own["width"] // own["heads"] == old["width"] // old["heads"]
        and small.conv1.kernel_size == large.conv1.kernel_size
        and small.output_dim == large.output_dim
        and {_LAYER.sub("", k) for k in small.state_dict()}
        == {_LAYER.sub("", k) for k in large.state_dict()}
    )


@torch.no_grad()
def inherit_vit(small: Any, large: Any) -> str:
    """Fills a student's image tower, `is_smaller` than its teacher's, with the teacher's weights;
    says in words what was taken over."""
    given: Weights = {k: v.detach().cpu().float() for k, v in large.state_dict().items()}
    width, old_width = (_shape(tower)["width"] for tower in (small, large))
    layers = even_layers(_shape(large)["layers"], _shape(small)["layers"])
    channels = largest(written(given), width)
    made: Weights = {}
    for name in small.state_dict():
        if not _LAYER.search(name):
            made[name] = _outside(name, given[name], channels, old_width)
    for own, old in enumerate(layers):
        made |= take_layer(given, old, own, small, channels)
    made["positional_embedding"] = _positions(made["positional_embedding"], small)
    small.load_state_dict(made)
    return f"{len(layers)} of {_shape(large)['layers']} layers, {width} of {old_width} channels"


def _shape(tower: Any) -> dict[str, int]:
    blocks = tower.transformer.resblocks
    return {
        "width": blocks[0].attn.embed_dim,
        "layers": len(blocks),
        "heads": blocks[0].attn.num_heads,
        "hidden": blocks[0].mlp.c_fc.out_features,
    }


def even_layers(count: int, wanted: int) -> list[int]:
    """`wanted` of the numbers below `count`, the first and the last among them."""
    if wanted == 1:
        return [count - 1]
    return [round(i * (count - 1) / (wanted - 1)) for i in range(wanted)]


def written(given: Weights) -> Tensor:
    """How much each channel of the residual stream is written to, over all layers [width]."""
    writers = [v for k, v in given.items() if k.endswith(("out_proj.weight", "c_proj.weight"))]
    return torch.stack([v.square().sum(dim=1) for v in writers]).sum(dim=0)


def largest(weights: Tensor, count: int) -> Tensor:
    """The places of the `count` largest, in their order."""
    return weights.topk(count).indices.sort().values


def _outside(name: str, value: Tensor, channels: Tensor, width: int) -> Tensor:
    """What is not in a layer: stem, class embedding, positions, norms, projection."""
    axis = next(i for i, length in enumerate(value.shape) if length == width)
    if name in ("positional_embedding", "proj"):
        axis = 1 if name == "positional_embedding" else 0
    return value.index_select(axis, channels)


def take_layer(given: Weights, old: int, own: int, small: Any, channels: Tensor) -> Weights:
    """Layer `old` of the given weights, as layer `own` of the small tower."""
    prefix, new = f"transformer.resblocks.{old}.", f"transformer.resblocks.{own}."
    values = {k.removeprefix(prefix): v for k, v in given.items() if k.startswith(prefix)}
    shape = _shape(small)
    size = shape["width"] // shape["heads"]
    out = values["attn.out_proj.weight"]
    by_head = out.square().sum(dim=0).view(-1, size).sum(dim=1)
    heads = (largest(by_head, shape["heads"])[:, None] * size + torch.arange(size)).flatten()
    fc, proj = values["mlp.c_fc.weight"], values["mlp.c_proj.weight"]
    hidden = largest(fc.square().sum(dim=1) * proj.square().sum(dim=0), shape["hidden"])
    three = torch.cat([heads + part * out.shape[1] for part in range(3)])  # queries, keys, values
    rows = {
        "attn.in_proj_weight": three, "attn.in_proj_bias": three,
        "mlp.c_fc.weight": hidden, "mlp.c_fc.bias": hidden,
    }  # fmt: skip
    columns = {
        "attn.in_proj_weight": channels, "attn.out_proj.weight": heads,
        "mlp.c_fc.weight": channels, "mlp.c_proj.weight": hidden,
    }  # fmt: skip
    made = {}
    for name, value in values.items():
        chosen = value.index_select(0, rows.get(name, channels))
        made[new + name] = chosen.index_select(1, columns[name]) if name in columns else chosen
    return made


def _positions(value: Tensor, small: Any) -> Tensor:
    """Positional embeddings [1 + n, width] for another number of patches, by bicubic resizing."""
    height, width = small.grid_size
    first, grid = value[:1], value[1:]
    side = round(len(grid) ** 0.5)
    if len(grid) == height * width:
        return value
    planes = grid.T.reshape(1, -1, side, side)
    planes = F.interpolate(planes, (height, width), mode="bicubic", antialias=True)
    return torch.cat([first, planes.flatten(2)[0].T])
