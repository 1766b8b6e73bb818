"""Views: drawn once, and seen alike by models of any size."""

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.manifest import ImageSpec
from training.augment import Augmentation
from training.views import FIELDS, PLAIN, apply_view, draw_view

DIGEST = bytes(range(16))


def spec(width: int, height: int, fit: str = "crop") -> ImageSpec:
    none = (0.0, 0.0, 0.0)
    return ImageSpec(height=height, width=width, mean=none, std=(1.0,) * 3,
                     interpolation="bicubic", fit=fit, fill=0)  # type: ignore[arg-type]  # fmt: skip


STRONG = Augmentation(spec(40, 40), crop=0.3, flip=True, rotate=10, jitter=0.3)


def picture(width: int, height: int) -> NDArray[np.uint8]:
    """Red grows to the right, green downwards: a colour says where it is from."""
    x, y = np.meshgrid(np.arange(width) / width, np.arange(height) / height)
    return np.stack([x * 255, y * 255, np.full_like(x, 99)], axis=-1).astype(np.uint8)


def test_a_view_is_drawn_by_its_key_alone() -> None:
    one = draw_view(STRONG, (80, 60), (0, DIGEST, 3))
    assert len(one) == len(FIELDS)
    assert np.array_equal(one, draw_view(STRONG, (80, 60), (0, DIGEST, 3)))
    for other in ((1, DIGEST, 3), (0, DIGEST[::-1], 3), (0, DIGEST, 4)):
        assert not np.array_equal(one, draw_view(STRONG, (80, 60), other))


def test_number_0_is_the_picture_itself() -> None:
    plain = draw_view(STRONG, (80, 60), (0, DIGEST, PLAIN))
    frame = picture(40, 40)
    assert np.array_equal(apply_view(frame, plain, spec(40, 40)), frame)


@pytest.mark.parametrize("size", [(80, 60), (300, 40), (40, 200)])
@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_boxes_lie_inside_and_have_the_shape_of_the_model(size: tuple[int, int], fit: str) -> None:
    strength = Augmentation(spec(60, 40, fit), crop=0.3)
    wanted = size[0] / size[1] if fit == "squash" else 60 / 40
    views = np.stack([draw_view(strength, size, (0, DIGEST, n)) for n in range(1, 200)])
    left, top, width, height = views[:, :4].T
    assert min(left.min(), top.min()) >= 0
    assert max((left + width).max(), (top + height).max()) <= 1 + 1e-6
    shapes = width * size[0] / (height * size[1])
    assert wanted * 0.74 < shapes.min() and shapes.max() < wanted * 1.34
    assert set(views[:, 4]) == {0} and set(views[:, 6:].ravel()) == {1}


def test_two_sizes_see_the_same_part_of_a_picture() -> None:
    strength = Augmentation(spec(40, 40), crop=0.3, flip=True)
    for number in range(1, 20):
        view = draw_view(strength, (80, 60), (0, DIGEST, number))
        small = apply_view(picture(80, 60), view, spec(20, 20)).astype(int)
        large = apply_view(picture(320, 240), view, spec(80, 80)).astype(int)
        assert np.abs(small - large.reshape(20, 4, 20, 4, 3).mean(axis=(1, 3))).max() < 9


def test_each_change_is_as_drawn() -> None:
    frame = picture(40, 40)
    view = draw_view(STRONG, (40, 40), (0, DIGEST, PLAIN))

    def changed(name: str, value: float) -> NDArray[np.uint8]:
        own = view.copy()
        own[FIELDS.index(name)] = value
        return apply_view(frame, own, spec(40, 40))

    assert np.array_equal(changed("mirrored", 1), frame[:, ::-1])
    assert np.array_equal(changed("brightness", 0.5), frame // 2)
    assert changed("contrast", 0).std() == 0
    gray = changed("saturation", 0)
    assert np.array_equal(gray[..., 0], gray[..., 1])
    half = changed("width", 0.5)
    assert half[..., 0].max() < 130 < frame[..., 0].max()
    turned = changed("angle", 90)
    assert np.abs(turned.astype(int) - np.rot90(frame)).max() < 9
