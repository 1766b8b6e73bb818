"""Validation of a model in training: zero-shot accuracy with labels, retrieval without."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibration.metrics import Floats, recall_at_k, top_k_accuracy
from runtime.frames import Frame
from runtime.manifest import ImageSpec
from runtime.prompts import build_bank
from runtime.tokenizer import Tokenizer

from .data import Pairs

BATCH = 256


def normalise(frames: Tensor, spec: ImageSpec) -> Tensor:
    """uint8 RGB [N, H, W, 3] to the model's float input [N, 3, H, W]."""
    mean = torch.tensor(spec.mean, device=frames.device).view(1, 3, 1, 1)
    std = torch.tensor(spec.std, device=frames.device).view(1, 3, 1, 1)
    return (frames.permute(0, 3, 1, 2).float() / 255 - mean) / std


@torch.inference_mode()
def embed_frames(model: Any, frames: Frame, spec: ImageSpec) -> Floats:
    """Unit embeddings [N, D] of uint8 RGB frames [N, H, W, 3], by the PyTorch model."""
    device = model.logit_scale.device
    parts = []
    for start in range(0, len(frames), BATCH):
        batch = torch.from_numpy(np.ascontiguousarray(frames[start : start + BATCH])).to(device)
        parts.append(model.encode_image(normalise(batch, spec), normalize=True).float().cpu())
    return torch.cat(parts).numpy()


@torch.inference_mode()
def embed_texts(model: Any, tokenizer: Tokenizer, texts: Sequence[str]) -> Floats:
    """Unit embeddings [N, D] of texts, by the PyTorch model."""
    device = model.logit_scale.device
    parts = []
    for start in range(0, len(texts), BATCH):
        tokens = torch.from_numpy(tokenizer(texts[start : start + BATCH])).long().to(device)
        parts.append(model.encode_text(tokens, normalize=True).float().cpu())
    return torch.cat(parts).numpy()


def evaluate(
    model: Any,
    tokenizer: Tokenizer,
    pairs: Pairs,
    frames: Frame,
    spec: ImageSpec,
    templates: Sequence[str],
) -> dict[str, float]:
    """Zero-shot top-1 and top-5 among the classes, or R@1/5/10 both ways where there are none.

    In retrieval a hit is any of an image's captions, or any image of a caption.
    """
    images = embed_frames(model, frames, spec)
    if pairs.targets is not None:
        bank = build_bank(
            pairs.classes, templates, lambda texts: embed_texts(model, tokenizer, texts), ""
        )
        similarity, targets = images @ bank.embeddings.T, np.array(pairs.targets)
        return {f"top{k}": top_k_accuracy(similarity, targets, k) for k in (1, 5)}
    used = sorted({c for own in pairs.captions for c in own})
    column = {caption: j for j, caption in enumerate(used)}
    positives = np.zeros((len(images), len(used)), dtype=bool)
    for row, own in enumerate(pairs.captions):
        positives[row, [column[c] for c in own]] = True
    similarity = images @ embed_texts(model, tokenizer, [pairs.texts[c] for c in used]).T
    to_text = recall_at_k(similarity, positives)
    to_image = recall_at_k(similarity.T, positives.T)
    return {f"image_to_text_r{k}": v for k, v in to_text.items()} | {
        f"text_to_image_r{k}": v for k, v in to_image.items()
    }
