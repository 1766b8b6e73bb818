"""Chooses what runs an encoder: the one backend protocol, and the modules that implement it."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import BackendUnavailable
from .manifest import Manifest

NAMES = ("onnxruntime",)


class Encoder(Protocol):
    """An encoder that is ready to run: uint8 frames [N, H, W, 3], or int32 tokens [N, L], in;
    float32 unit rows [N, D] out."""

    name: str

    def __call__(self, batch: NDArray[Any]) -> NDArray[np.float32]: ...


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


def choose(backend: str) -> str:
    """The backend to use for `backend`, which is a name or "auto".

    Raises BackendUnavailable, naming what to install, where it is not here.
    """
    if backend not in ("auto", *NAMES):
        raise BackendUnavailable(
            f"there is no backend {backend!r}; this release has {', '.join(NAMES)} (or 'auto')"
        )
    if find_spec("onnxruntime") is None:
        raise BackendUnavailable(
            "no inference backend is installed: pip install 'edgeclip[cpu]' for ONNX Runtime"
        )
    return "onnxruntime"


def open_encoder(backend: str, path: Path, border: Border, threads: int | None) -> Encoder:
    """Opens an encoder file on a backend that `choose` returned."""
    from .ort import OrtEncoder

    return OrtEncoder(path, border, threads)
