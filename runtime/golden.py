"""A bundle's golden inputs, and what fp32 makes of them: what an engine is tested by on a device
that has no other backend."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from .errors import UnsupportedFormat
from .manifest import Manifest

NAME = "golden.safetensors"


@dataclass(frozen=True, eq=False)
class Golden:
    """Frames, uint8 [N, H, W, 3], and tokens, int32 [M, L], with fp32's unit rows, float32 [N, D]
    and [M, D]."""

    frames: NDArray[np.uint8]
    embeddings: NDArray[np.float32]
    tokens: NDArray[np.int32]
    text_embeddings: NDArray[np.float32]


def save_golden(golden: Golden, path: Path) -> None:
    """Writes them as safetensors."""
    arrays = {name: np.ascontiguousarray(array) for name, array in vars(golden).items()}
    path.write_bytes(safetensors.numpy.save(arrays))


def load_golden(path: Path, manifest: Manifest) -> Golden:
    """Reads them. Raises UnsupportedFormat where they are not those of such a bundle."""
    try:
        arrays = safetensors.numpy.load_file(path)
        golden = Golden(**arrays)
    except (OSError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise UnsupportedFormat(f"{path} holds no golden inputs: {error}") from error
    image, dim = manifest.image, manifest.model.embedding_dim
    number, texts = len(golden.frames), len(golden.tokens)
    expected = {
        "frames": ((number, image.height, image.width, 3), np.uint8),
        "embeddings": ((number, dim), np.float32),
        "tokens": ((texts, manifest.text.context_length), np.int32),
        "text_embeddings": ((texts, dim), np.float32),
    }
    for name, (shape, dtype) in expected.items():
        array = arrays[name]
        if array.shape != shape or array.dtype != dtype or not number or not texts:
            raise UnsupportedFormat(
                f"{path}: {name} is {array.dtype} {list(array.shape)}, expected "
                f"{np.dtype(dtype)} {list(shape)}; export the bundle again"
            )
    return golden
