"""What a tower costs, against a count by hand."""

from pathlib import Path

from training.cost import multiply_adds, parameters
from training.model import create


def test_a_vit_is_counted_by_hand(tiny_config: Path) -> None:
    clip = create(str(tiny_config))
    tokens, width, layers, patch, embedding = 1 + 16, 48, 2, 8, 32
    stem = 16 * width * 3 * patch**2
    layer = tokens * width * (3 * width + width + 2 * 4 * width) + 2 * tokens**2 * width
    assert multiply_adds(clip) == stem + layers * layer + width * embedding
    assert parameters(clip.model.visual.conv1) == width * 3 * patch**2
    assert next(clip.model.parameters()).device.type == "cpu"  # the model itself is left alone


def test_convolutions_count_by_their_groups() -> None:
    found = multiply_adds(create("mobilenetv2"))
    assert 0.30e9 < found * (224 / 225) ** 2 < 0.36e9  # 0.30e9 in Sandler et al. 2018 at 224
