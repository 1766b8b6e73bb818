"""Weights that a smaller ViT takes over from a larger one."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from training.inherit import is_family
from training.inherit_vit import inherit_vit
from training.model import ClipModel, create


def made(tiny: Path, folder: Path, seed: int = 0, **changes: Any) -> ClipModel:
    config = json.loads(tiny.read_text())
    config["vision_cfg"] |= {"layers": 4, "width": 64} | changes
    file = folder / "own.json"
    file.write_text(json.dumps(config))
    return create(str(file), seed=seed)


def inherit(student: ClipModel, teacher: ClipModel) -> str:
    assert is_family(student, teacher)
    return inherit_vit(student.model.visual, teacher.model.visual)


@torch.no_grad()
def output(clip: ClipModel, size: int = 32) -> torch.Tensor:
    torch.manual_seed(0)
    clip.model.eval()
    found: torch.Tensor = clip.model.encode_image(torch.randn(3, 3, size, size))
    return found


def test_an_equal_tower_becomes_its_teacher(tiny_config: Path, tmp_path: Path) -> None:
    teacher, student = (made(tiny_config, tmp_path, seed) for seed in (0, 1))
    assert not torch.allclose(output(teacher), output(student))
    assert "4 of 4 layers, 64 of 64 channels" in inherit(student, teacher)
    assert torch.equal(output(teacher), output(student))


def test_layers_are_taken_at_even_distances(tiny_config: Path, tmp_path: Path) -> None:
    teacher = made(tiny_config, tmp_path)
    student = made(tiny_config, tmp_path, 1, layers=2)
    inherit(student, teacher)
    expected = copy.deepcopy(teacher)
    blocks = expected.model.visual.transformer.resblocks
    del blocks[1:3]
    assert torch.equal(output(student), output(expected))


def test_what_does_nothing_is_left_out(tiny_config: Path, tmp_path: Path) -> None:
    """Of a teacher half of whose channels, heads and hidden units are dead nothing is lost."""
    teacher = made(tiny_config, tmp_path)
    student = made(tiny_config, tmp_path, 1, width=32)
    visual = teacher.model.visual
    dead = torch.arange(64) % 2 == 1
    with torch.no_grad():
        for name, value in visual.state_dict().items():
            if name.endswith(("out_proj.weight", "c_proj.weight", "out_proj.bias", "c_proj.bias")):
                value[dead] = 0
        visual.conv1.weight[dead] = 0
        visual.class_embedding[dead] = 0
        visual.positional_embedding[:, dead] = 0
        for layer in visual.transformer.resblocks:
            layer.attn.out_proj.weight[:, 16:48] = 0  # two of four heads
            layer.mlp.c_fc.weight[1::2] = 0
            layer.mlp.c_proj.weight[:, 1::2] = 0
    inherit(student, teacher)
    own = student.model.visual.state_dict()
    given = visual.state_dict()
    assert torch.equal(own["conv1.weight"], given["conv1.weight"][::2])
    assert torch.equal(own["proj"], given["proj"][::2])
    name = "transformer.resblocks.1."
    kept = torch.cat([torch.arange(16), torch.arange(48, 64)])
    heads = torch.cat([kept, kept + 64, kept + 128])
    weight = given[name + "attn.in_proj_weight"]
    assert torch.equal(own[name + "attn.in_proj_weight"], weight[heads][:, ::2])
    fc = given[name + "mlp.c_fc.weight"]
    assert torch.equal(own[name + "mlp.c_fc.weight"], fc[::2, ::2])


def test_positions_are_resized_to_other_pictures(tiny_config: Path, tmp_path: Path) -> None:
    teacher = made(tiny_config, tmp_path)
    student = made(tiny_config, tmp_path, 1, image_size=48)
    inherit(student, teacher)
    own, given = (c.model.visual.positional_embedding.detach() for c in (student, teacher))
    assert own.shape[0] == 37 and torch.equal(own[0], given[0])
    assert torch.allclose(own[1:].mean(dim=0), given[1:].mean(dim=0), atol=0.05)
    assert torch.isfinite(output(student, 48)).all()


@pytest.mark.parametrize("changes", [{"width": 80}, {"patch_size": 16}, {"head_width": 32}])
def test_towers_of_other_families_are_told(
    tiny_config: Path, tmp_path: Path, changes: dict[str, int]
) -> None:
    teacher = made(tiny_config, tmp_path)
    student = made(tiny_config, tmp_path, 1, **changes)
    assert not is_family(student, teacher)
    assert not is_family(create("nano"), teacher)


def test_a_tower_that_pools_by_attention_is_of_another_family(
    tiny_config: Path, tmp_path: Path
) -> None:
    pooled = {"attentional_pool": True, "attn_pooler_heads": 4}
    assert not is_family(*(made(tiny_config, tmp_path, seed, **pooled) for seed in (0, 1)))
