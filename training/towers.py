"""What a training step runs: both towers on one batch, from pictures or from cached features."""

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from .evaluate import normalise
from .model import ClipModel


class Embeddings(NamedTuple):
    """The outputs for n pairs: unit rows float32 [n, D], the inverse temperature, the bias of a
    sigmoid model, and the scores of the classes [n, C], of the training's own classifier. In a
    distillation of the text tower also `words`, of as many texts, and what the teacher has `said`
    of them."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor | None
    classes: Tensor | None
    words: Tensor | None = None
    said: Tensor | None = None


class Towers(nn.Module):
    """The model to be trained. `rest` runs the image tower behind its locked part, from cached
    features; `classes` is the number of labels of a classifier on the image embeddings, if any."""

    def __init__(self, clip: ClipModel, rest: nn.Module | None = None, classes: int = 0) -> None:
        super().__init__()
        self.model: Any = clip.model
        self.rest = rest
        self.spec = clip.image
        self._planar = any(map(_crashes_interleaved, clip.model.visual.modules()))
        width = int(clip.config["embed_dim"])
        self.classifier = nn.Linear(width, classes) if classes else None

    def forward(self, images: Tensor, texts: Tensor) -> Embeddings:
        """Embeds frames (uint8 [n, H, W, 3]) or features (float16 [n, ...]), and tokens (int64
        [n * K, L]) or ready embeddings (float32 [n * K, D]): K captions of each picture, whose
        own embedding is repeated for them."""
        if self.rest is None:
            pixels = normalise(images, self.spec)
            image = self.model.encode_image(pixels.contiguous() if self._planar else pixels)
        else:
            image = self.rest(images.float())
        text = texts if texts.is_floating_point() else self.model.encode_text(texts)
        image = image.repeat_interleave(len(text) // len(image), dim=0)
        image, text = (F.normalize(rows.float(), dim=-1) for rows in (image, text))
        return Embeddings(
            image,
            text,
            self.model.logit_scale.exp().sum(),  # of one number: sharded, it is no scalar
            None if self.model.logit_bias is None else self.model.logit_bias.sum(),
            None if self.classifier is None else self.classifier(image),
        )


def _crashes_interleaved(layer: nn.Module) -> bool:
    """Whether a layer is FastViT's first: the gradient of a strided 1 x 1 convolution of 3 channels
    ends the process (PyTorch 2.13 on the CPU) where pixels lie interleaved (channels last), as
    frames come and as other convolutions are fastest."""
    return (
        isinstance(layer, nn.Conv2d)
        and layer.in_channels == 3
        and layer.kernel_size == (1, 1)
        and layer.stride != (1, 1)
    )
