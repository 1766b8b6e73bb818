"""What runs an encoder: the one protocol of the backends, and what goes in and comes out."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .manifest import Manifest

ON_CPU = ("onnxruntime", "openvino")
NAMES = (*ON_CPU, "tensorrt", "ort-cuda", "ort-tensorrt")


class Encoder(Protocol):
    """An encoder that is ready to run: uint8 frames [N, H, W, 3], or int32 tokens [N, L], in;
    float32 unit rows [N, D] out."""

    name: str

    def __call__(self, batch: NDArray[Any]) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Opened:
    """An image encoder that is ready to run. `notes` say why it is this one; `chosen` in short
    where `auto` measured."""

    encoder: Encoder
    backend: str
    precision: str
    notes: tuple[str, ...] = ()
    chosen: str = ""


@dataclass(frozen=True)
class Border:
    """What goes into an encoder, and comes out: the input's name and its shape without the batch
    ([H, W, 3] or [L]), and the width of the embeddings."""

    name: str
    shape: tuple[int, ...]
    dim: int


def image_border(manifest: Manifest) -> Border:
    """The border of a bundle's image encoder."""
    return Border(
        "frames", (manifest.image.height, manifest.image.width, 3), manifest.model.embedding_dim
    )


def text_border(manifest: Manifest) -> Border:
    """The border of a bundle's text encoder."""
    return Border("tokens", (manifest.text.context_length,), manifest.model.embedding_dim)
