"""Has a backend prepare itself for batches before the first frame comes."""

import time
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .stream import Classifies

LONGEST = 2.0  # seconds: a model that takes longer loses little by first runs


def warm_up(classifier: "Classifies", most: int) -> None:
    """Classifies black frames, from one at once to `most`: the first run of each number is slow.

    (OpenVINO compiles a second model for more than one frame, for 0.1 s and more, and prepares each
    number for some 10 ms; ONNX Runtime's very first run takes some 50 ms.)
    """
    black = np.zeros((64, 64, 3), np.uint8)
    end = time.monotonic() + LONGEST
    for number in range(1, most + 1):
        if time.monotonic() < end:
            classifier.classify_batch([black] * number, "bgr")
