"""A tower's layers in order: locked, trained at their own rates, and given a start."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from runtime.errors import DataError
from training.groups import image_groups, lock, parameter_groups, set_training, text_groups
from training.model import CONFIG, WEIGHTS, ClipModel, create, save
from training.options import TrainOptions
from training.start import load_backbone, load_matching, make_model

# isort: split
import open_clip

TIMM = {"timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": "linear"}
VISION: dict[str, dict[str, Any]] = {
    "vit": {"layers": 2, "width": 48, "head_width": 16, "patch_size": 8},
    "vit-pooled": {
        "layers": 2,
        "width": 48,
        "head_width": 16,
        "patch_size": 8,
        "attentional_pool": True,
        "attn_pooler_heads": 2,
        "attn_pooler_queries": 4,
    },
    "resnet": {"layers": [1, 1, 1, 1], "width": 8},
    **{
        name: {"timm_model_name": name, **TIMM}
        for name in ("test_resnet", "test_vit", "test_convnext", "test_efficientnet")
    },
}
FORMS = [*VISION, "custom vit", "custom test_resnet"]


def config(name: str, **more: Any) -> dict[str, Any]:
    custom, _, vision = name.rpartition(" ")
    text = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3}
    return {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, **VISION[vision]},
        "text_cfg": text,
        "custom_text": bool(custom),
        **more,
    }


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def made(name: str, **more: Any) -> ClipModel:
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(config(name, **more)))
        return create(str(file))

    return made


def parameters(clip: ClipModel) -> dict[str, nn.Parameter]:
    return dict(clip.model.named_parameters())


def locked(clip: ClipModel) -> set[str]:
    return {name for name, p in parameters(clip).items() if not p.requires_grad}


# The groups


@pytest.mark.parametrize("name", FORMS)
def test_every_parameter_is_in_one_group(make: Any, name: str) -> None:
    clip = make(name)
    kind = open_clip.CustomTextCLIP if "custom" in name else open_clip.CLIP
    assert isinstance(clip.model, kind)
    groups = image_groups(clip.model), text_groups(clip.model)
    named = [name for tower in groups for group in tower for name in group]
    assert sorted(named) == sorted(set(parameters(clip)) - {"logit_scale"})
    assert all(n.startswith("visual.") for group in groups[0] for n in group)
    assert not any(n.startswith("visual.") for group in groups[1] for n in group)
    assert all(group for tower in groups for group in tower)


@pytest.mark.parametrize("name", FORMS)
def test_groups_are_in_the_order_of_the_layers(make: Any, name: str) -> None:
    clip = make(name)
    text = text_groups(clip.model)
    assert len(text) == 2 + 3
    assert any(n.endswith("token_embedding.weight") for n in text[0])
    assert all(f"resblocks.{i}." in n for i in range(3) for n in text[i + 1])
    assert any(n.endswith("text_projection") for n in text[-1])
    order = executed(clip)
    runs = [[order.get(module_of(n), -1) for n in group] for group in image_groups(clip.model)]
    first = [min(n for n in numbers if n >= 0) for numbers in runs if max(numbers) >= 0]
    assert first == sorted(first) and len(first) >= 3


def module_of(name: str) -> str:
    return name.rpartition(".")[0]


def executed(clip: ClipModel) -> dict[str, int]:
    """When each module of the image tower runs."""
    names: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda _m, _i, name=name: names.append(name))
        for name, module in clip.model.named_modules()
        if name.startswith("visual.") and not list(module.children())
    ]
    with torch.inference_mode():
        clip.model.encode_image(torch.rand(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return {name: number for number, name in reversed(list(enumerate(names)))}


# Locking


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("unlocked", [0, 1, 3])
def test_all_but_the_last_groups_are_locked(make: Any, name: str, unlocked: int) -> None:
    clip = trained(make(name))
    groups = image_groups(clip.model)
    lock(clip, groups, unlocked, "--lock-image")
    kept = groups[: len(groups) - unlocked]
    assert locked(clip) == {n for group in kept for n in group}


def trained(clip: ClipModel) -> ClipModel:
    """The same, its weights given by some start: none is fresh."""
    return dataclasses.replace(clip, fresh=frozenset())


def test_what_no_start_has_given_is_trained(make: Any) -> None:
    clip = make("test_resnet")
    fresh = frozenset({"visual.head.proj.weight"})
    clip = dataclasses.replace(clip, fresh=fresh)
    lock(clip, image_groups(clip.model), 0, "--lock-image")
    assert not locked(clip) & fresh and len(locked(clip)) > 20


def test_what_cannot_be_locked(make: Any) -> None:
    clip = make("vit")
    with pytest.raises(DataError, match="--lock-text: that tower's weights are random: .*--init"):
        lock(clip, text_groups(clip.model), 1, "--lock-text")
    assert not locked(clip)
    with pytest.raises(DataError, match="--lock-image: 4 of the tower's 4 groups of layers leave"):
        lock(trained(clip), image_groups(clip.model), 4, "--lock-image")


@pytest.mark.parametrize("unlocked", [0, 2])
def test_locked_parts_stay_as_they_are_in_training(make: Any, unlocked: int) -> None:
    clip = trained(make("test_resnet"))
    lock(clip, image_groups(clip.model), unlocked, "--lock-image")
    before = {name: t.clone() for name, t in clip.model.state_dict().items()}
    set_training(clip.model)
    loss = clip.model.encode_image(torch.rand(8, 3, 32, 32)).square().sum()
    if unlocked:
        optimizer = torch.optim.SGD([p for p in clip.model.parameters() if p.requires_grad], 0.1)
        loss.backward()
        optimizer.step()
    after = clip.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not changed & locked(clip)
    statistics = {name for name in changed if "running" in name or "num_batches" in name}
    assert bool(statistics) == bool(unlocked)
    last = {f"visual.trunk.layer4.0.{n}" for n in ("bn1", "bn2", "downsample.2")}
    assert {module_of(name) for name in statistics} <= last


def test_set_training_is_by_part(make: Any) -> None:
    clip = trained(make("vit"))
    lock(clip, image_groups(clip.model), 2, "--lock-image")
    clip.model.eval()
    set_training(clip.model)
    blocks = clip.model.visual.transformer.resblocks
    assert [block.training for block in blocks] == [False, True]
    assert not blocks[0].mlp.training and blocks[1].mlp.training
    assert not clip.model.visual.conv1.training
    assert clip.model.training and clip.model.transformer.training
    clip.model.requires_grad_(True)
    set_training(clip.model)
    assert all(module.training for module in clip.model.modules())


# Rates


@pytest.mark.parametrize("name", FORMS)
def test_rates_fall_with_the_distance_to_the_output(make: Any, name: str) -> None:
    clip = make(name)
    groups = parameter_groups(clip, 1e-3, 0.2, image_lr=0.5, layer_decay=0.8)
    rates = {n: group["lr"] for group in groups for n in group["names"]}
    own = parameters(clip)
    assert rates.keys() == own.keys()
    assert all(own[n] is p for g in groups for n, p in zip(g["names"], g["params"], strict=True))
    for tower, factor in ((image_groups(clip.model), 0.5), (text_groups(clip.model), 1.0)):
        for depth, group in enumerate(reversed(tower)):
            expected = 1e-3 * factor * 0.8**depth
            assert all(rates[n] == pytest.approx(expected) for n in group)
    assert rates["logit_scale"] == 1e-3
    assert len(groups) == len({(g["lr"], g["weight_decay"]) for g in groups})


@pytest.mark.parametrize("name", FORMS)
def test_weight_decay_is_of_weights_alone(make: Any, name: str) -> None:
    clip = make(name)
    groups = parameter_groups(clip, 1e-3, 0.2, 1.0, 1.0)
    assert {g["weight_decay"] for g in groups} == {0.0, 0.2}
    plain = {n for g in groups if not g["weight_decay"] for n in g["names"]}
    own = parameters(clip)
    small = {n for n, p in own.items() if p.ndim < 2}
    places = {n for n in own if n.endswith(("positional_embedding", "pos_embed", "cls_token"))}
    assert plain == small | places
    assert "logit_scale" in plain


def test_locked_parameters_are_in_no_group(make: Any) -> None:
    clip = trained(make("vit"))
    lock(clip, image_groups(clip.model), 1, "--lock-image")
    groups = parameter_groups(clip, 1e-3, 0.2, 1.0, 1.0)
    named = {n for g in groups for n in g["names"]}
    assert named == set(parameters(clip)) - locked(clip)


# --init


def write(folder: Path, clip: ClipModel, state: Mapping[str, Tensor] | None = None) -> Path:
    folder.mkdir()
    save(clip, folder, {})
    if state is not None:
        safetensors.torch.save_file(dict(state), folder / WEIGHTS)
    return folder


def changed(clip: ClipModel) -> ClipModel:
    with torch.no_grad():
        for parameter in clip.model.parameters():
            parameter += 0.5
    return clip


def test_a_checkpoint_of_the_same_model_fits_wholly(make: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "start", changed(make("test_resnet")))
    given = safetensors.torch.load_file(folder / WEIGHTS)
    clip = load_matching(make("test_resnet"), folder)
    state = clip.model.state_dict()
    assert all(torch.equal(given[name], state[name]) for name in state)
    assert clip.fresh == frozenset()
    assert clip.source == f"start ({len(state)} of {len(state)} tensors)"


def test_what_fits_is_taken_over_and_the_rest_stays_fresh(make: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "start", changed(make("test_resnet")))
    text = config("vit")["text_cfg"] | {"layers": 4, "context_length": 20}
    before = {n: t.clone() for n, t in make("vit", text_cfg=text).model.state_dict().items()}
    clip = load_matching(make("vit", text_cfg=text), folder)
    after = clip.model.state_dict()
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert {n for n in kept if n in parameters(clip)} == clip.fresh
    assert "positional_embedding" in clip.fresh  # of another length
    assert any("resblocks.3." in n for n in clip.fresh)
    assert all(
        n.startswith("visual.") or "resblocks.3." in n or n == "positional_embedding"
        for n in clip.fresh
    )
    assert "transformer.resblocks.2.mlp.c_fc.weight" not in kept
    assert clip.folder is None and clip.source.startswith("start (")


def test_half_precision_weights_fit_too(make: Any, tmp_path: Path) -> None:
    start = changed(make("vit"))
    state = {n: t.half().clone() for n, t in start.model.state_dict().items()}
    clip = load_matching(make("vit"), write(tmp_path / "start", start, state))
    assert not clip.fresh
    assert {p.dtype for p in clip.model.parameters()} == {torch.float32}


def test_scales_and_counts_alone_are_no_fit(make: Any, tmp_path: Path) -> None:
    start = make("test_resnet")
    few = {n: t for n, t in start.model.state_dict().items() if t.ndim < 2}
    folder = write(tmp_path / "start", start, few)
    with pytest.raises(DataError, match="start: none of its weights fits the model vit"):
        load_matching(make("vit"), folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there are no weights"), (b"", "not a sound"), (b"\xff" * 100, "not a sound")],
)
def test_a_start_that_is_none(
    make: Any, tmp_path: Path, content: bytes | None, message: str
) -> None:
    (tmp_path / "start").mkdir()
    if content is not None:
        (tmp_path / "start" / WEIGHTS).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_matching(make("vit"), tmp_path / "start")


def test_a_start_of_another_activation_is_refused(make: Any, tmp_path: Path) -> None:
    start = make("vit")
    config = start.config | {"quick_gelu": not start.config.get("quick_gelu")}
    folder = write(tmp_path / "start", dataclasses.replace(start, config=config))
    with pytest.raises(DataError, match="quick_gelu, vit is otherwise: begin with all of it"):
        load_matching(make("vit"), folder)


def test_how_pictures_are_prepared_comes_with_the_image_tower(make: Any, tmp_path: Path) -> None:
    start = make("vit")
    image = msgspec.structs.replace(start.image, fit="pad", fill=7, interpolation="bilinear")
    folder = write(tmp_path / "start", dataclasses.replace(start, image=image))
    assert load_matching(make("vit"), folder).image == image


def test_the_normalisation_comes_with_the_image_towers_weights(make: Any, tmp_path: Path) -> None:
    start = make("test_resnet")
    image = msgspec.structs.replace(start.image, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    folder = write(tmp_path / "start", dataclasses.replace(start, image=image))
    assert load_matching(make("test_resnet"), folder).image == image
    other = make("vit")  # takes the text tower alone
    assert load_matching(other, folder).image == other.image
    (folder / CONFIG).write_text('{"preprocess_cfg": {"mean": "none"}}')
    with pytest.raises(DataError, match="mean and std cannot be read"):
        load_matching(make("test_resnet"), folder)


def test_options_name_the_start(make: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "start", changed(make("test_resnet")))
    common: dict[str, Any] = {"data": "x", "out": tmp_path / "out"}
    model = str(tmp_path / "test_resnet.json")
    random = make_model(TrainOptions(**common, model=model, seed=3))
    assert random.fresh == set(parameters(random))
    again = make_model(TrainOptions(**common, model=model, seed=3))
    other = make_model(TrainOptions(**common, model=model, seed=4))
    name = "visual.head.proj.weight"
    assert torch.equal(parameters(random)[name], parameters(again)[name])
    assert not torch.equal(parameters(random)[name], parameters(other)[name])
    started = make_model(TrainOptions(**common, model=model, init=str(folder)))
    assert not started.fresh
    with pytest.raises(DataError, match="has no weights 'nowhere'"):
        make_model(TrainOptions(**common, model=model, init="nowhere"))


# --init-image


@pytest.fixture
def backbone(make: Any, tmp_path: Path) -> Path:
    """A file of weights as the hub has them: with a classifier."""
    trunk = changed(make("test_resnet")).model.visual.trunk.state_dict()
    file = tmp_path / "hub" / "model.safetensors"
    file.parent.mkdir()
    state = {name: tensor.clone() for name, tensor in trunk.items()}
    safetensors.torch.save_file(state | {"fc.weight": torch.ones(10, 96)}, file)
    return file


def test_a_backbone_fills_the_image_tower(make: Any, backbone: Path) -> None:
    clip = load_backbone(make("test_resnet"), backbone)
    given = safetensors.torch.load_file(backbone)
    trunk = clip.model.visual.trunk.state_dict()
    assert all(torch.equal(given[name], trunk[name]) for name in trunk)
    assert "visual.head.proj.weight" in clip.fresh and "text_projection" in clip.fresh
    assert not any(name.startswith("visual.trunk.") for name in clip.fresh)
    assert clip.source == "random weights, image backbone model.safetensors"


def rewrite(file: Path, state: Mapping[str, Tensor]) -> None:
    safetensors.torch.save_file(dict(state), file)


def test_half_precision_and_no_counts(make: Any, backbone: Path) -> None:
    given = safetensors.torch.load_file(backbone)
    rewrite(backbone, {n: t.half() for n, t in given.items() if "num_batches" not in n})
    clip = load_backbone(make("test_resnet"), backbone)
    own = clip.model.visual.trunk.state_dict()
    assert own["conv1.0.weight"].dtype == torch.float32
    np.testing.assert_allclose(own["conv1.0.weight"], given["conv1.0.weight"], atol=1e-3)


@pytest.mark.parametrize("how", ["a layer less", "another shape", "another net", "cut off", "text"])
def test_a_file_that_is_not_of_this_backbone(make: Any, backbone: Path, how: str) -> None:
    state = safetensors.torch.load_file(backbone)
    message = "is not a test_resnet: 1 of its .* tensors are missing or of another shape .layer4"
    if how == "a layer less":
        rewrite(backbone, {n: t for n, t in state.items() if n != "layer4.0.conv2.weight"})
    elif how == "another shape":
        rewrite(backbone, state | {"layer4.0.conv2.weight": torch.zeros(3)})
    elif how == "another net":
        rewrite(backbone, make("test_vit").model.visual.trunk.state_dict())
        message = r"is not a test_resnet: 75 of its 75 tensors are missing .*\(conv1\.0\.weight, "
    elif how == "cut off":
        backbone.write_bytes(backbone.read_bytes()[:-100])
        message = "model.safetensors is not a sound safetensors file"
    else:
        backbone.write_text("version https://git-lfs.github.com/spec/v1")
        message = "model.safetensors is not a sound safetensors file"
    clip = make("test_resnet")
    before = {n: t.clone() for n, t in clip.model.state_dict().items()}
    with pytest.raises(DataError, match=message):
        load_backbone(clip, backbone)
    assert all(torch.equal(before[n], t) for n, t in clip.model.state_dict().items())


def test_a_backbone_needs_a_timm_tower_and_a_file(make: Any, backbone: Path) -> None:
    with pytest.raises(DataError, match="goes with a timm image tower, which vit has not"):
        load_backbone(make("vit"), backbone)
    with pytest.raises(DataError, match="there are no weights .*nowhere.safetensors"):
        load_backbone(make("test_resnet"), backbone.with_name("nowhere.safetensors"))
    with pytest.raises(DataError, match="not a sound safetensors file"):
        load_backbone(make("test_resnet"), backbone.parent)


@pytest.mark.parametrize("within", [None, "pretrained_cfg"])
def test_mean_and_std_come_from_the_config_beside(
    make: Any, backbone: Path, within: str | None
) -> None:
    fields: dict[str, Any] = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.9}
    fields = {within: fields, "architecture": "test_resnet"} if within else fields
    backbone.with_name("config.json").write_text(json.dumps(fields))
    plain = make("test_resnet")
    image = load_backbone(plain, backbone).image
    assert (image.mean, image.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (image.height, image.fit, image.interpolation) == (
        plain.image.height,
        plain.image.fit,
        plain.image.interpolation,
    )


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"mean": [1, 2]}',
        '{"mean": 0.5}',
        '{"std": [0.5, 0, 0.5]}',
        '{"std": [1, 1, -1]}',
        '{"mean": [NaN, 0, 0]}',
        '{"pretrained_cfg": {"mean": null}}',
        "\xff",
    ],
)
def test_a_config_beside_that_is_wrong(make: Any, backbone: Path, content: str) -> None:
    backbone.with_name("config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match="config.json: mean and std cannot be read"):
        load_backbone(make("test_resnet"), backbone)


def test_a_config_beside_without_them_changes_nothing(make: Any, backbone: Path) -> None:
    backbone.with_name("config.json").write_text('{"architecture": "test_resnet"}')
    clip = make("test_resnet")
    assert load_backbone(clip, backbone).image == clip.image


def test_a_real_backbone(data: Path, tmp_path: Path) -> None:
    fields = config("test_resnet")
    fields["vision_cfg"] |= {"timm_model_name": "mobilenetv2_100", "image_size": 64}
    (tmp_path / "mobile.json").write_text(json.dumps(fields))
    file = data / "weights" / "mobilenetv2_100" / "model_fp16.safetensors"
    clip = load_backbone(create(str(tmp_path / "mobile.json")), file)
    assert clip.image.mean == clip.image.std == (0.5, 0.5, 0.5)
    groups = image_groups(clip.model)
    assert sorted(n for g in groups for n in g) == sorted(
        n for n in parameters(clip) if n.startswith("visual.")
    )
    lock(clip, groups, 3, "--lock-image")
    assert "visual.trunk.conv_stem.weight" in locked(clip)


def test_a_config_does_not_change_the_model_whose_name_it_has(
    tiny_config: Path, tmp_path: Path
) -> None:
    file = tmp_path / "ViT-B-32.json"
    shutil.copy(tiny_config, file)
    clip = create(str(file))
    assert clip.name == "ViT-B-32"
    assert clip.config == json.loads(tiny_config.read_text())
    assert open_clip.get_model_config("ViT-B-32")["vision_cfg"]["layers"] == 12
