"""The golden inputs of a bundle: what engines are tested by where no other backend runs."""

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from calibration.sensitivity import encoder
from calibration.text_judge import embedded
from calibration.texts import Texts
from runtime.golden import NAME, Golden, save_golden

from .precisions import Made

MOST = 32


def write_golden(
    image: Path, text: Path, others: Made, texts: Texts, patterns: NDArray[np.uint8], folder: Path
) -> str:
    """Writes some of the judged frames (the patterns, where there are none) and texts with the
    embeddings of the fp32 encoder files; returns the file's name."""
    frames, tokens = patterns, texts.judged[_spread(len(texts.judged))]
    if others.judged is not None:
        frames = np.concatenate(list(others.judged.batches(MOST, _spread(len(others.judged)))))
    golden = Golden(
        frames=frames,
        embeddings=embedded(encoder(onnx.load(image)), frames),
        tokens=tokens,
        text_embeddings=embedded(encoder(onnx.load(text)), tokens),
    )
    save_golden(golden, folder / NAME)
    return NAME


def _spread(count: int) -> list[int]:
    """At most MOST of `count` rows, evenly."""
    return [int(row) for row in np.linspace(0, count - 1, min(count, MOST))]
