"""Augmented views of a picture, as numbers: two models see the very same one, each at its size.

Dataset reinforcement (Faghri et al. 2023, arXiv:2303.08983; MobileCLIP, Vasu et al. 2024,
arXiv:2311.17049) stores what was drawn beside what the teacher said of it.
"""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from runtime.frames import Frame
from runtime.manifest import ImageSpec

from .augment import Augmentation

PLAIN = 0  # the number of the view that is the picture as the runtime sees it
FIELDS = (
    "left", "top", "width", "height",  # of the box, as shares of the picture
    "mirrored", "angle", "brightness", "contrast", "saturation",
)  # fmt: skip
View = NDArray[np.float32]
"""One view: float32 [9], in the order of FIELDS."""

_TRIES = 10
_HOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def draw_view(strength: Augmentation, size: tuple[int, int], key: tuple[int, bytes, int]) -> View:
    """The view of a picture of `size` (width, height; only their ratio counts) that `key` stands
    for: seed, the picture's digest, and the view's number. Number 0 is the plain view."""
    seed, digest, number = key
    view = np.array([0, 0, 1, 1, 0, 0, 1, 1, 1], np.float32)
    if number == PLAIN:
        return view
    rng = np.random.default_rng((seed, int.from_bytes(digest, "big"), number))
    if strength.crop < 1:
        view[:4] = _box(strength, size[0] / size[1], rng)
    view[4] = strength.flip and rng.random() < 0.5
    view[5] = rng.uniform(-strength.rotate, strength.rotate)
    view[6:] = rng.uniform(max(0, 1 - strength.jitter), 1 + strength.jitter, 3)
    return view


def _box(
    strength: Augmentation, aspect: float, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """A random resized crop (Szegedy et al. 2015, arXiv:1409.4842) of about the model's shape, or,
    with `squash`, the picture's; the largest middle one where ten do not fit."""
    spec = strength.spec
    shape = aspect if spec.fit == "squash" else spec.width / spec.height
    for _ in range(_TRIES):
        area = rng.uniform(strength.crop, 1)
        ratio = shape * math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = math.sqrt(area * ratio / aspect), math.sqrt(area * aspect / ratio)
        if width <= 1 and height <= 1:
            return rng.uniform(0, 1 - width), rng.uniform(0, 1 - height), width, height
    width, height = min(1.0, shape / aspect), min(1.0, aspect / shape)
    return (1 - width) / 2, (1 - height) / 2, width, height


def apply_view(stored: Frame, view: View, spec: ImageSpec) -> Frame:
    """What a model sees of a view: uint8 RGB [H, W, 3] of a picture as `Augmentation.store` keeps
    it. The box's edges lie between pixels, so that it is the same one at any size."""
    left, top, width, height, mirrored, angle, *colors = view.tolist()
    image = Image.fromarray(stored)
    w, h = image.size
    box = left * w, top * h, min(w, (left + width) * w), min(h, (top + height) * h)
    if box != (0, 0, w, h) or image.size != (spec.width, spec.height):
        image = image.resize((spec.width, spec.height), _HOW[spec.interpolation], box)
    if angle:
        image = image.rotate(angle, _HOW["bilinear"])
    if mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for kind, factor in zip(_ENHANCERS, colors, strict=True):
        if factor != 1:
            image = kind(image).enhance(factor)
    return np.asarray(image, dtype=np.uint8)


_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
