"""From a frame of any size to the image encoder's input, the pixels that the model was trained on.

The reference is the models' own transform (torchvision's Resize and CenterCrop on a Pillow image,
open_clip's for `pad`): antialiased bicubic or bilinear. The result is equal to it, bit for bit.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from .frames import Color, Frame, read_picture, to_image
from .manifest import ImageSpec

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}


def preprocess(frame: Frame | str | Path, spec: ImageSpec, color: Color = "bgr") -> Frame:
    """Returns uint8 RGB [spec.height, spec.width, 3].

    `frame` is an array in the given `color` order (see `frames.check_frame`), or the path of a
    picture. Raises FrameError.
    """
    if isinstance(frame, str | Path):
        frame, color = read_picture(frame), "rgb"
    image, is_bgr = to_image(frame, color)
    small = np.asarray(_fit(image, spec), dtype=np.uint8)
    if small.ndim == 2:
        return np.repeat(small[..., None], 3, axis=2)
    return np.ascontiguousarray(small[..., ::-1]) if is_bgr else small


def _fit(image: Image.Image, spec: ImageSpec) -> Image.Image:
    width, height = resized_size(image.width, image.height, spec)
    resized = image.resize((width, height), _FILTERS[spec.interpolation])
    if spec.fit == "pad":
        canvas = Image.new(image.mode, (spec.width, spec.height), _gray(image.mode, spec.fill))
        canvas.paste(resized, ((spec.width - width) // 2, (spec.height - height) // 2))
        return canvas
    left, top = round((width - spec.width) / 2), round((height - spec.height) / 2)
    return resized.crop((left, top, left + spec.width, top + spec.height))


def _gray(mode: str, level: int) -> int | tuple[int, int, int]:
    return level if mode == "L" else (level, level, level)


def resized_size(width: int, height: int, spec: ImageSpec) -> tuple[int, int]:
    """Width and height after the resize and before the crop or the padding."""
    if spec.fit == "squash":
        return spec.width, spec.height
    if spec.fit == "crop" and spec.width == spec.height:  # torchvision truncates the long side
        if width <= height:
            return spec.width, int(spec.width * height / width)
        return int(spec.height * width / height), spec.height
    ratios = width / spec.width, height / spec.height
    ratio = max(ratios) if spec.fit == "pad" else min(ratios)
    return max(1, round(width / ratio)), max(1, round(height / ratio))
