"""Export-only forms of CLIP's two encoders: uint8 frames or int32 tokens in, unit rows out.

They hold a copy of the trained weights. Attention is written out (one QKV Linear with the scale
folded into Q, MatMul, Softmax, MatMul), the text mask is finite, and the end of the text is found
by its id: forms that TensorRT's parsers and ONNX Runtime read alike. They are not for training.
"""

import copy
from typing import Any

from training import (
    torchvision_ops as torchvision_ops,
)  # before open_clip, which imports torchvision

# isort: split
import open_clip.modified_resnet
import open_clip.transformer
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from runtime.errors import DataError
from training.evaluate import normalisation
from training.model import ClipModel

MASKED = -1e4  # exp(-1e4) is 0 in float32, and no infinity reaches an int8 or fp16 file


class ImageEncoder(nn.Module):
    """uint8 RGB frames [N, H, W, 3] to unit embeddings [N, D]."""

    scale: Tensor
    shift: Tensor

    def __init__(self, clip: ClipModel) -> None:
        super().__init__()
        tower = copy.deepcopy(clip.model.visual)
        if hasattr(tower, "trunk"):
            tower.trunk = reparameterize_model(tower.trunk)
        self.tower = written_out(tower)
        scale, shift = normalisation(clip.image)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, frames: Tensor) -> Tensor:
        # The cast comes first: TensorRT takes uint8 into nothing else.
        pixels = frames.float().permute(0, 3, 1, 2) * self.scale + self.shift
        return unit(self.tower(pixels))


class TextEncoder(nn.Module):
    """int32 tokens [N, L] to unit embeddings [N, D]."""

    mask: Tensor | None
    earlier_first: Tensor

    def __init__(self, clip: ClipModel, end_id: int | None) -> None:
        super().__init__()
        source = text_tower(clip)
        self.embedding = copy.deepcopy(source.token_embedding)
        self.position = copy.deepcopy(source.positional_embedding)
        self.transformer = written_out(copy.deepcopy(source.transformer))
        self.norm = copy.deepcopy(source.ln_final)
        self.projection = copy.deepcopy(source.text_projection)
        self.pool = getattr(source, "text_pool_type", None) or source.pool_type
        if self.pool == "eos":
            end_id = getattr(source, "text_eos_id", None) or source.eos_id
        if self.pool in ("argmax", "eos") and end_id is None:
            raise DataError(f"{clip.name} pools at the end token, and its tokenizer has none")
        self.end_id = -1 if end_id is None else end_id
        self.register_buffer("mask", finite(source.attn_mask))
        length = clip.context_length
        self.register_buffer("earlier_first", torch.arange(length, 0, -1).float())

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens) + self.position
        hidden = self.norm(self.transformer(hidden, attn_mask=self.mask))
        return unit(self._projected(self._pooled(hidden, tokens)))

    def _pooled(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        if self.pool == "first":
            return hidden[:, 0]
        if self.pool == "last":
            return hidden[:, -1]
        # A one-hot row for the first end token, times the hidden states: no gather, no argmax.
        ends = torch.eq(tokens, self.end_id).float() * self.earlier_first
        first = torch.eq(ends, ends.amax(dim=1, keepdim=True)).float()
        return (first[:, None] @ hidden)[:, 0]

    def _projected(self, pooled: Tensor) -> Tensor:
        if self.projection is None:
            return pooled
        if isinstance(self.projection, nn.Linear):
            return torch.as_tensor(self.projection(pooled))
        return torch.matmul(pooled, self.projection)


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` of one input, written out; the same call signature."""

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, self.width = source.num_heads, source.embed_dim
        scale = torch.ones(3 * self.width, 1)
        scale[: self.width] = (self.width // self.heads) ** -0.5
        self.qkv = _linear(source.in_proj_weight * scale, source.in_proj_bias * scale[:, 0])
        self.out = source.out_proj

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        length, head = query.shape[1], self.width // self.heads
        parts = self.qkv(query).reshape(-1, length, 3 * self.heads, head).transpose(1, 2)
        q, k, v = parts.split(self.heads, dim=1)  # [N, heads, length, head] each
        scores = q @ k.transpose(-2, -1)
        if attn_mask is not None:
            scores = scores + attn_mask
        mixed = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(-1, length, self.width)
        return self.out(mixed), None


class AttentionPool(nn.Module):
    """The ResNets' attention pooling, written out for its one query, the mean token."""

    def __init__(self, source: open_clip.modified_resnet.AttentionPool2d) -> None:
        super().__init__()
        self.heads, width = source.num_heads, source.q_proj.in_features
        scale = (width // self.heads) ** -0.5
        self.q = _linear(source.q_proj.weight * scale, source.q_proj.bias * scale)
        self.k, self.v, self.out = source.k_proj, source.v_proj, source.c_proj
        self.position = source.positional_embedding

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = pixels.flatten(2).transpose(1, 2)  # [N, HW, C]
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + self.position
        q = self._by_head(self.q(tokens[:, :1]))
        k, v = self._by_head(self.k(tokens)), self._by_head(self.v(tokens))
        mixed = (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v  # [N, heads, 1, C / heads]
        return torch.as_tensor(self.out(mixed.flatten(1)))

    def _by_head(self, tokens: Tensor) -> Tensor:
        length, width = tokens.shape[1], tokens.shape[2]
        return tokens.reshape(-1, length, self.heads, width // self.heads).transpose(1, 2)


class Mean(nn.Module):
    """Pooling to one number a channel; PyTorch's own is exported as arithmetic on indices."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.mean(dim=(2, 3), keepdim=True)


def written_out(module: nn.Module) -> nn.Module:
    """Replaces every fused attention and every pooling to one number inside `module`, in place, and
    returns it."""
    for name, child in module.named_children():
        if isinstance(child, open_clip.modified_resnet.AttentionPool2d):
            setattr(module, name, AttentionPool(child))
        elif isinstance(child, nn.AdaptiveAvgPool2d) and child.output_size in (1, (1, 1)):
            setattr(module, name, Mean())
        else:
            written_out(child)
    if isinstance(module, open_clip.transformer.ResidualAttentionBlock):
        module.attn = SelfAttention(module.attn)
    if hasattr(module, "fused_attn"):  # timm's switch to the explicit form, scale on Q
        module.fused_attn = False  # type: ignore[assignment]
    return module


def text_tower(clip: ClipModel) -> Any:
    """The part of the model that holds the text transformer. Raises DataError where it is of a
    kind that cannot be exported."""
    tower = clip.model if hasattr(clip.model, "token_embedding") else clip.model.text
    if not hasattr(tower, "token_embedding") or getattr(tower, "cls_emb", None) is not None:
        raise DataError(
            f"{clip.name}: its text encoder ({type(tower).__name__}) cannot be exported yet; "
            "CLIP's own text transformers can"
        )
    return tower


def finite(mask: Tensor | None) -> Tensor | None:
    """The additive attention mask with a large negative number for minus infinity."""
    return None if mask is None else mask.clamp(min=MASKED)


def unit(rows: Tensor) -> Tensor:
    """Rows divided by their L2 norm; written out, since ReduceL2 is read wrongly by old parsers."""
    return rows / (rows * rows).sum(dim=-1, keepdim=True).sqrt().clamp(min=1e-12)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight, linear.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    return linear
