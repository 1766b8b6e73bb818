"""The weights that a training starts from: a checkpoint's, or a backbone's in its image tower."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import safetensors.torch
from torch import Tensor

from runtime.errors import DataError
from runtime.label_sets import DEFAULT_TEMPLATES
from runtime.manifest import ImageSpec

from .model import CONFIG, FIT, WEIGHTS, ClipModel, create, recorded
from .options import TrainOptions

_EXAMPLES = 4


def settled(options: TrainOptions) -> TrainOptions:
    """`options` with templates: where none are given, those of the checkpoint that it starts from,
    else the usual one."""
    starts = (Path(s).expanduser() for s in (options.model, options.init) if s)
    folder = next((s for s in starts if s.is_dir()), None)
    usual = recorded(folder)[1] if folder else DEFAULT_TEMPLATES
    return dataclasses.replace(options, templates=options.templates or usual)


def make_model(options: TrainOptions) -> ClipModel:
    """The model of a run, with the weights that it starts from. Raises DataError."""
    init = options.init
    folder = Path(init).expanduser() if init and Path(init).expanduser().is_dir() else None
    clip = create(options.model, None if folder else init, options.seed)
    if folder:
        clip = load_matching(clip, folder)
    return load_backbone(clip, options.init_image) if options.init_image else clip


def load_matching(clip: ClipModel, folder: Path) -> ClipModel:
    """Takes over from a checkpoint folder every weight whose name and shape fit; the others stay
    random, and are `fresh`. How pictures are prepared comes with the image tower's weights.
    Raises DataError where nothing fits, or where the weights would compute something else."""
    given = _read(folder / WEIGHTS)
    own = clip.model.state_dict()
    fit = {k: v for k, v in given.items() if k in own and v.shape == own[k].shape}
    layers = [name for name, tensor in fit.items() if tensor.ndim > 1]
    if not layers:  # scales and counts fit any model
        raise DataError(f"--init {folder}: none of its weights fits the model {clip.name}")
    clip.model.load_state_dict(fit, strict=False)
    source = f"{folder.name} ({len(fit)} of {len(own)} tensors)"
    fresh = {name for name, _ in clip.model.named_parameters() if name not in fit}
    image = clip.image
    _require_same_gelu(folder, clip)
    if any(name.startswith("visual.") for name in layers):
        image = _preprocessing(folder / CONFIG, image)
    return dataclasses.replace(clip, source=source, image=image, fresh=frozenset(fresh))


def load_backbone(clip: ClipModel, file: Path) -> ClipModel:
    """Puts a timm backbone's weights (.safetensors, under timm's names; a classifier is left out)
    into the image tower; the projection behind it stays random, and is `fresh`.

    Mean and standard deviation are taken from a `config.json` beside the file, as the Hugging Face
    hub has it, where there is one. Raises DataError where the weights are not of this backbone.
    """
    trunk: Any = getattr(clip.model.visual, "trunk", None)
    if trunk is None:
        raise DataError(f"--init-image goes with a timm image tower, which {clip.name} has not")
    given = {name: t.float() if t.is_floating_point() else t for name, t in _read(file).items()}
    own = {k: v for k, v in trunk.state_dict().items() if not k.startswith(_classifiers(trunk))}
    needed = [name for name in own if not name.endswith("num_batches_tracked")]  # of no effect
    missing = [k for k in needed if k not in given or given[k].shape != own[k].shape]
    if missing:
        some = ", ".join(missing[:_EXAMPLES])
        backbone = clip.config["vision_cfg"]["timm_model_name"]
        raise DataError(
            f"--init-image {file} is not a {backbone}: {len(missing)} of its {len(needed)} tensors "
            f"are missing or of another shape ({some}, ...)"
        )
    trunk.load_state_dict({k: given[k] for k in needed}, strict=False)
    fresh = clip.fresh - {f"visual.trunk.{name}" for name in own}
    image = _normalisation(file.with_name("config.json"), clip.image)
    source = f"{clip.source}, image backbone {file.name}"
    return dataclasses.replace(clip, source=source, image=image, fresh=fresh)


def _classifiers(trunk: Any) -> tuple[str, ...]:
    """What the names of a classifier begin with: where the trunk has one, it is the projection."""
    names = trunk.pretrained_cfg.get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return dict(safetensors.torch.load_file(file))
    except FileNotFoundError as error:
        raise DataError(f"there are no weights {file}") from error
    except Exception as error:  # SafetensorError and its kin
        raise DataError(f"{file} is not a sound safetensors file: {error}") from error


def _require_same_gelu(folder: Path, clip: ClipModel) -> None:
    """Raises DataError where the weights were trained with another activation than the model's."""
    quick = bool(_fields(folder / CONFIG).get("model_cfg", {}).get("quick_gelu"))
    if quick != bool(clip.config.get("quick_gelu")):
        raise DataError(
            f"--init {folder} was trained {'with' if quick else 'without'} quick_gelu, {clip.name} "
            f"is otherwise: begin with all of it (--model {folder}), or take another --model"
        )


def _preprocessing(config: Path, spec: ImageSpec) -> ImageSpec:
    """`spec` with all but the size of open_clip's config."""
    fields = _fields(config).get("preprocess_cfg", {})
    given: dict[str, Any] = {}
    if fields.get("resize_mode") in FIT:
        given["fit"] = FIT[fields["resize_mode"]]
    if fields.get("interpolation") in ("bilinear", "bicubic"):
        given["interpolation"] = fields["interpolation"]
    if isinstance(fields.get("fill_color"), int):
        given["fill"] = fields["fill_color"]
    return msgspec.structs.replace(_normalisation(config, spec), **given)


def _fields(config: Path) -> dict[str, Any]:
    """What a checkpoint's config holds; nothing where there is none."""
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _normalisation(config: Path, spec: ImageSpec) -> ImageSpec:
    """`spec` with the mean and standard deviation of timm's or open_clip's config."""
    if not config.is_file():
        return spec
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
        fields = fields.get("pretrained_cfg") or fields.get("preprocess_cfg") or fields
        given = {name: _channels(fields, name) for name in ("mean", "std") if name in fields}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{config}: mean and std cannot be read: {error}") from error
    return msgspec.structs.replace(spec, **given)


def _channels(fields: Mapping[str, Any], name: str) -> tuple[float, ...]:
    values = tuple(float(value) for value in fields[name])
    sound = all(map(math.isfinite, values)) and (name == "mean" or min(values, default=0) > 0)
    if len(values) != 3 or not sound:
        raise ValueError(f"{name} is {values}")
    return values
