"""Random changes of pictures and captions that leave the caption true of the picture."""

import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from . import torchvision_ops as torchvision_ops  # before torchvision

# isort: split
from torchvision.transforms import v2

from runtime.frames import Frame, check_frame
from runtime.manifest import ImageSpec, TextSpec
from runtime.preprocess import preprocess

_SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)
_MODES = {
    "bicubic": v2.InterpolationMode.BICUBIC,
    "bilinear": v2.InterpolationMode.BILINEAR,
}


@dataclass(frozen=True)
class Augmentation:
    """How strongly pictures are changed: see the options of the same names.

    Random resized crop, rotation, mirroring and colour jitter, in this order, each by torchvision
    (`torchvision.transforms.v2`). `stored` is what the cache keeps of a picture.
    """

    spec: ImageSpec
    crop: float = 1.0
    flip: bool = False
    rotate: float = 0.0
    jitter: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether pictures are left as the runtime will see them."""
        return self.crop == 1 and not (self.flip or self.rotate or self.jitter)

    @property
    def side(self) -> int | None:
        """The short side to which pictures are reduced before they are cropped: so much more than
        the model's that the smallest square crop is not blown up. None without crops."""
        if self.crop == 1:
            return None
        return math.ceil(
            max(self.spec.height, self.spec.width) * max(8 / 7, 1 / math.sqrt(self.crop))
        )

    def store(self, frame: Frame) -> Frame:
        """What is kept of a decoded picture, uint8 RGB [h, w, 3]: the whole of it at `side`, never
        enlarged; without crops the model's own input. Raises FrameError for what the runtime would
        not take either."""
        side = self.side
        if side is None:
            return preprocess(frame, self.spec, "rgb")
        height, width = check_frame(frame, "rgb").shape[:2]
        scale = side / min(height, width)
        if scale >= 1:
            return frame
        size = round(width * scale), round(height * scale)
        small = Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)
        return np.asarray(small, dtype=np.uint8)

    def apply(self, stored: Frame, seed: int, caption: str) -> Frame:
        """The model's input, uint8 RGB [H, W, 3]: `stored` changed as `seed` has it.

        A picture whose caption names a side (left, right) is not mirrored.
        """
        if self.exact:
            return stored
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # the CPU's alone: a thousand times faster
            image = Image.fromarray(stored)
            if self.crop < 1:
                image = self._crop(image)(image)
            if self.rotate:
                image = v2.RandomRotation(self.rotate, _MODES["bilinear"])(image)
            if self.flip and not names_a_side(caption):
                image = v2.RandomHorizontalFlip()(image)
            if self.jitter:
                strength = self.jitter
                image = v2.ColorJitter(strength, strength, strength)(image)
        return np.asarray(image, dtype=np.uint8)

    def _crop(self, image: Image.Image) -> v2.Transform:
        """A crop of about the shape that the model sees: its own; with `squash` the picture's. Its
        area is a share of the largest such one, which lies anywhere in a long picture."""
        spec = self.spec
        own = image.width / image.height
        shape = own if spec.fit == "squash" else spec.width / spec.height
        largest = min(shape / own, own / shape)
        return v2.RandomResizedCrop(
            (spec.height, spec.width),
            (self.crop * largest, largest),
            (shape * 3 / 4, shape * 4 / 3),
            _MODES[spec.interpolation],
            antialias=True,
        )


def names_a_side(caption: str) -> bool:
    """Whether a caption says left or right, so that it is not true of the mirrored picture."""
    return bool(_SIDES.search(caption))


def drop_tokens(
    tokens: NDArray[np.int32], share: float, spec: TextSpec, rng: np.random.Generator
) -> NDArray[np.int32]:
    """Leaves out each token of a caption [L] with probability `share`, but for its start and end,
    and never all; the rest closes up."""
    special = [i for i in (spec.start_id, spec.end_id) if i is not None]
    words = np.flatnonzero(~np.isin(tokens, [*special, spec.pad_id]))
    dropped = words[rng.random(len(words)) < share]
    if len(dropped) == len(words):
        return tokens
    kept = np.delete(tokens, dropped)
    return np.concatenate([kept, np.full(len(dropped), spec.pad_id, tokens.dtype)])
