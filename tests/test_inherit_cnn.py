"""What a narrower CNN of inverted residuals takes over from a wider one."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import COLORS, square, write_squares
from torch.nn.functional import cosine_similarity

from runtime.errors import DataError
from training import inherit_cnn
from training.distill import distill
from training.distill_options import DistillOptions
from training.inherit import inherit, is_family
from training.model import ClipModel, create, save


@pytest.fixture(autouse=True)
def _few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inherit_cnn, "PICTURES", 32)


def made(folder: Path, trunk: str, seed: int = 0, **changes: Any) -> ClipModel:
    """A CLIP with one of timm's trunks, random weights, and norms that have seen pictures."""
    file = folder / f"{trunk}.json"
    vision = {"timm_model_name": trunk, "timm_model_pretrained": False, "timm_pool": "avg"}
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1}
    vision |= {"timm_proj": "linear", "image_size": 32} | changes
    file.write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}))
    clip = create(str(file), seed=seed)
    clip.model.visual.train()
    with torch.no_grad():
        for _ in range(20):
            clip.model.visual(pictures(24))
    clip.model.visual.eval()
    return clip


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    """Squares of all colours, float32 [N, 3, 32, 32]."""
    rng = np.random.default_rng(seed)
    colors = list(COLORS.values())
    frames = np.stack([np.asarray(square(colors[n % len(colors)], rng)) for n in range(count)])
    resized = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 128 - 1
    return torch.nn.functional.interpolate(resized, (32, 32))


def taken(student: ClipModel, teacher: ClipModel) -> str:
    assert is_family(student, teacher)
    shares: list[float] = []
    said = inherit(student, teacher, pictures, shares.append)
    assert shares == sorted(shares) and shares[-1] == 1
    return said


@torch.no_grad()
def likeness(student: ClipModel, teacher: ClipModel) -> float:
    """Mean cosine of what both say, apart from what they say of everything; new pictures."""
    found = [clip.model.visual(pictures(48, seed=1)) for clip in (student, teacher)]
    one, other = (rows - rows.mean(0) for rows in found)
    return float(cosine_similarity(one, other).mean())


@torch.no_grad()
def widened(narrow: ClipModel, wide: ClipModel) -> ClipModel:
    """The wider model with the narrow one in some of its channels, all others dead."""
    given = narrow.model.visual.state_dict()
    for name, value in wide.model.visual.state_dict().items():
        value.fill_(1.0 if name.endswith("running_var") else 0.0)
        value[tuple(slice(0, size) for size in given[name].shape)] = given[name]
    return wide


@pytest.mark.parametrize("trunk", ["mobilenetv1_100", "mobilenetv2_050", "semnasnet_075"])
def test_an_equal_tower_becomes_its_teacher(trunk: str, tmp_path: Path) -> None:
    teacher, student = (made(tmp_path, trunk, seed) for seed in (0, 1))
    assert likeness(student, teacher) < 0.9
    assert "fitted on 32 pictures of " + trunk in taken(student, teacher)
    assert likeness(student, teacher) > 0.9999


def test_what_does_nothing_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a teacher whose further channels are dead nothing is lost."""
    monkeypatch.setattr(inherit_cnn, "PICTURES", 128)
    teacher = widened(made(tmp_path, "mobilenetv2_035"), made(tmp_path, "mobilenetv2_050"))
    student = made(tmp_path, "mobilenetv2_035", seed=1)
    taken(student, teacher)
    assert likeness(student, teacher) > 0.98


@pytest.mark.parametrize(
    ("small", "large"),
    [
        ("mobilenetv2_050", "mobilenetv2_035"),  # wider
        ("mobilenetv2_035", "test_resnet"),
        ("test_resnet", "test_resnet"),
        ("mobilenetv1_100", "mobilenetv2_100"),
        ("mobilenetv2_100", "mobilenetv2_110d"),  # deeper
        ("mixnet_s", "mixnet_s"),  # several kernels in one layer
        ("efficientnet_b0_gn", "efficientnet_b0_gn"),
    ],
)
def test_towers_of_other_families_are_told(small: str, large: str, tmp_path: Path) -> None:
    assert not is_family(made(tmp_path, small), made(tmp_path, large))


@pytest.mark.parametrize("count", [1, 8])
def test_pictures_that_are_all_alike_do_no_harm(count: int, tmp_path: Path) -> None:
    teacher, student = made(tmp_path, "mobilenetv2_050"), made(tmp_path, "mobilenetv2_035", 1)
    seen = pictures(1).expand(count, -1, -1, -1)
    said = inherit(student, teacher, lambda _: seen, lambda _: None)
    assert said.endswith("on 1 picture of mobilenetv2_050" if count == 1 else "mobilenetv2_050")
    found, expected = (clip.model.visual(seen) for clip in (student, teacher))
    assert cosine_similarity(found, expected).min() > 0.99


def test_another_projection_is_another_family(tmp_path: Path) -> None:
    teacher = made(tmp_path, "mobilenetv2_050")
    assert not is_family(made(tmp_path, "mobilenetv2_035", timm_proj="mlp"), teacher)
    assert not is_family(made(tmp_path, "mobilenetv2_035", timm_pool="abs_attn"), teacher)


def test_a_distillation_begins_with_it(tiny_config: Path, tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "vit").mkdir()
    save(create(str(tiny_config)), tmp_path / "vit", {})
    save(made(tmp_path, "mobilenetv2_050"), tmp_path / "teacher", {})
    student = made(tmp_path, "mobilenetv2_035", 1)
    assert student.source == "random weights"
    images = write_squares(tmp_path / "images", each=8, seed=0)
    (images / "broken.png").write_bytes(b"no picture")
    options = DistillOptions(
        teacher=str(tmp_path / "teacher"), student=str(tmp_path / "mobilenetv2_035.json"),
        images=(images,), out=tmp_path / "out", epochs=1, batch_size=8, lr=1e-6, views=1, workers=0,
        max_bad=0.1, held_out=0.2,
    )  # fmt: skip
    record = distill(options, quiet=True)
    assert "fitted on 19 pictures of teacher" in record["start"]
    (tmp_path / "between").mkdir()
    save(made(tmp_path, "mobilenetv2_050", 2), tmp_path / "between", {})
    again = dataclasses.replace(options, inherit_from=str(tmp_path / "between"), force=True)
    assert "fitted on 19 pictures of between" in distill(again, quiet=True)["start"]
    for wrong, message in (("nowhere", "is no checkpoint folder"), ("vit", "is neither a smaller")):
        with pytest.raises(DataError, match=f"--inherit-from.*{message}"):
            distill(dataclasses.replace(again, inherit_from=str(tmp_path / wrong)), quiet=True)
    with pytest.raises(DataError, match="leave out --no-inherit"):
        dataclasses.replace(again, inherit=False)
