"""A PyTorch model's two encoders as functions from NumPy to NumPy, for evaluation and export."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibration.metrics import Floats
from calibration.subject import Subject
from runtime.errors import DataError
from runtime.frames import Frame
from runtime.manifest import Head, ImageSpec
from runtime.tokenizer import Tokenizer

from .model import ClipModel, create
from .text import text_side

TEXT_BATCH = 256
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def normalise(frames: Tensor, spec: ImageSpec) -> Tensor:
    """uint8 RGB [N, H, W, 3] to the model's float input [N, 3, H, W], by the operations that an
    exported encoder has: a pixel next to the middle between two integers of int8 is rounded alike.
    """
    scale, shift = (part.to(frames.device) for part in normalisation(spec))
    return frames.float().permute(0, 3, 1, 2) * scale + shift


def normalisation(spec: ImageSpec) -> tuple[Tensor, Tensor]:
    """Scale and shift [1, 3, 1, 1] that take 0..255 to the model's input range."""
    mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
    return (1 / (255 * std)).view(1, 3, 1, 1), (-mean / std).view(1, 3, 1, 1)


def image_encoder(clip: ClipModel, precision: str = "fp32") -> Callable[[Frame], Floats]:
    """A function from uint8 RGB frames [N, H, W, 3] to unit rows [N, D], on the model's device.

    It runs the model in evaluation mode and leaves it in the mode that it was in. `precision` is
    fp32, or bf16 or fp16 by autocast.
    """

    def encode(frames: Frame) -> Floats:
        with _evaluating(clip.model, precision) as device:
            pixels = normalise(torch.from_numpy(frames).to(device), clip.image)
            return _unit(clip.model.encode_image(pixels))

    return encode


def text_encoder(
    clip: ClipModel, tokenizer: Tokenizer, precision: str = "fp32"
) -> Callable[[Sequence[str]], Floats]:
    """A function from N texts to unit rows [N, D]; otherwise as `image_encoder`."""

    def encode(texts: Sequence[str]) -> Floats:
        parts = []
        with _evaluating(clip.model, precision) as device:
            for start in range(0, len(texts), TEXT_BATCH):
                tokens = torch.from_numpy(tokenizer(texts[start : start + TEXT_BATCH])).long()
                parts.append(_unit(clip.model.encode_text(tokens.to(device))))
        return np.concatenate(parts)

    return encode


def head(clip: ClipModel) -> Head:
    """Scale, bias and activation of the model's logits; a bias means SigLIP's sigmoid."""
    bias = clip.model.logit_bias
    return Head(
        logit_scale=float(clip.model.logit_scale.detach().exp()),
        logit_bias=0.0 if bias is None else float(bias.detach()),
        activation="softmax" if bias is None else "sigmoid",
    )


def checkpoint_subject(
    name: str,
    pretrained: str | None = None,
    tokenizer: Path | None = None,
    precision: str = "auto",
) -> Subject:
    """A checkpoint folder or open_clip model, to be evaluated on a CUDA device where there is one.

    `precision` "auto" is fp32. Raises DataError for a model or precision that does not work.
    """
    precision = "fp32" if precision == "auto" else precision
    if precision not in _DTYPES:
        raise DataError(f"--precision is {' or '.join(_DTYPES)} for a model, not {precision!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "fp16" and device == "cpu":
        raise DataError("--precision fp16 needs a CUDA device; use bf16 or fp32 here")
    clip = create(name, pretrained)
    content, text = text_side(clip, tokenizer)
    clip.model.to(device)
    return Subject(
        about={
            "model": clip.name,
            "weights": f"checkpoint {clip.folder}" if clip.folder else clip.source,
            "runs on": f"{precision} on PyTorch {torch.__version__}, {device}",
        },
        image=clip.image,
        head=head(clip),
        templates=clip.templates,
        encode=image_encoder(clip, precision),
        embed_text=text_encoder(clip, Tokenizer(content, text), precision),
    )


@contextlib.contextmanager
def _evaluating(model: Any, precision: str) -> Iterator[torch.device]:
    """Evaluation mode without gradients, in a precision; yields the model's device."""
    in_training = [module for module in model.modules() if module.training]
    device = model.logit_scale.device
    model.eval()
    try:
        with torch.inference_mode(), autocast(device, precision):
            yield device
    finally:
        for module in in_training:
            module.training = True


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a model computes in a precision: fp32, bf16 or fp16."""
    dtype = _DTYPES[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)


def _unit(rows: Tensor) -> Floats:
    """The L2 norm is taken in float32, whatever the precision of the model."""
    return torch.nn.functional.normalize(rows.float(), dim=-1).cpu().numpy()
