"""CLIP models through open_clip: made by name, config or folder; saved as a folder it loads."""

import difflib
import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import torchvision_ops as torchvision_ops  # before open_clip, which imports torchvision

# isort: split
import open_clip
import safetensors.torch
import torch

from runtime.errors import DataError
from runtime.label_sets import DEFAULT_TEMPLATES, check_templates
from runtime.manifest import ImageSpec

from .fake_quant import RANGE, fake_layers
from .quantization import FORMAT, Quantization, write_quantization

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
RECORD = "training.json"
PRESETS = Path(__file__).parent / "presets"
FIT = {"shortest": "crop", "squash": "squash", "longest": "pad"}


@dataclass(frozen=True, eq=False)
class ClipModel:
    """A model with what is needed to save it, export it and feed it.

    `source` says in words where the weights came from; `folder` is the checkpoint folder they
    were read from, if any. `fresh` names the parameters that no start has given; `templates` are
    those that labels were put into in its training.
    """

    model: Any  # open_clip.CLIP or CustomTextCLIP: open_clip is not typed
    name: str
    config: dict[str, Any]
    image: ImageSpec
    source: str
    folder: Path | None = None
    fresh: frozenset[str] = frozenset()
    templates: tuple[str, ...] = DEFAULT_TEMPLATES

    @property
    def context_length(self) -> int:
        """The number of tokens that the text encoder takes."""
        return int(self.model.context_length)


def create(name: str, pretrained: str | None = None, seed: int = 0) -> ClipModel:
    """Makes a model: an open_clip name (with a `pretrained` tag, or random weights from `seed`),
    one of our presets or a model config (`.json`) with random weights, or a checkpoint folder.

    Raises DataError, saying what there is, for a name, tag, config or folder that does not work.
    """
    torch.manual_seed(seed)
    path = Path(name).expanduser()
    if path.is_dir():
        if pretrained:
            raise DataError(
                f"{name} is a checkpoint folder: no other weights ({pretrained}) with it"
            )
        return _from_folder(path)
    if (PRESETS / f"{name}.json").is_file():
        path = PRESETS / f"{name}.json"
    if path.suffix == ".json":
        return _from_name(_register_config(path), pretrained, path.stem)
    return _from_name(name, pretrained)


def create_from(config: Mapping[str, Any], name: str, seed: int = 0) -> ClipModel:
    """Makes a model of an open_clip config, with random weights. Raises DataError."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name.replace('/', '-')}.json"
        file.write_text(json.dumps(config), encoding="utf-8")
        return create(str(file), seed=seed)


def _from_folder(folder: Path) -> ClipModel:
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        names = " and no ".join(missing)
        raise DataError(f"{folder} is not a checkpoint folder: it has no {names}")
    try:
        model = _quietly(f"local-dir:{folder}")
        spec = image_spec(model)
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_cfg"]
    except Exception as error:  # any field of the config, any tensor of the weights
        raise DataError(f"the checkpoint {folder} does not load: {error}") from error
    name, templates = recorded(folder)
    return ClipModel(model, name, config, spec, "checkpoint", folder, templates=templates)


def recorded(folder: Path) -> tuple[str, tuple[str, ...]]:
    """The name of a checkpoint's architecture and its templates, where our own training wrote them
    down; else the folder's name and the usual template."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return str(record["model"]), check_templates(record["options"]["templates"])
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return folder.resolve().name, DEFAULT_TEMPLATES


def _register_config(path: Path) -> str:
    """Makes a config known to open_clip; returns the name that it has there, which is no other
    model's."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"the model config {path} cannot be read: {error}") from error
    needed = ("embed_dim", "vision_cfg", "text_cfg")
    missing = [key for key in needed if not isinstance(config, dict) or key not in config]
    if missing:
        raise DataError(f"the model config {path} lacks {', '.join(missing)}")
    content = json.dumps(config, sort_keys=True).encode()
    name = f"{path.stem}-{hashlib.sha256(content).hexdigest()[:16]}"
    if name not in open_clip.list_models():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{name}.json"
            file.write_bytes(content)
            open_clip.add_model_config(file)
    return name


def _from_name(name: str, pretrained: str | None, shown: str = "") -> ClipModel:
    """A model by the name that open_clip has for it; `shown` is what people call it."""
    shown = shown or name
    if name not in open_clip.list_models():
        close = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise DataError(f"{name!r} is neither a folder, a .json nor an open_clip model{hint}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained and pretrained not in tags and not Path(pretrained).is_file():
        have = ", ".join(tags) or "none"
        raise DataError(f"{shown} has no weights {pretrained!r}; it has: {have}")
    config = open_clip.get_model_config(name)
    if pretrained and (open_clip.get_pretrained_cfg(name, pretrained) or {}).get("quick_gelu"):
        config["quick_gelu"] = True  # these weights were trained with it; open_clip only warns
    try:
        quick = bool(config.get("quick_gelu"))
        model = _quietly(name, pretrained=pretrained, force_quick_gelu=quick)
    except Exception as error:  # downloads, config fields, tensor shapes: all end here
        raise DataError(f"the model {shown} cannot be made: {error}") from error
    if pretrained:
        return ClipModel(model, shown, config, image_spec(model), f"open_clip {pretrained}")
    fresh = frozenset(own for own, _ in model.named_parameters())
    return ClipModel(model, shown, config, image_spec(model), "random weights", fresh=fresh)


def _quietly(name: str, **options: Any) -> Any:
    """open_clip logs a warning for random weights, which were asked for here."""
    logger, level = logging.getLogger(), logging.getLogger().level
    logger.setLevel(logging.ERROR)
    try:
        return open_clip.create_model(name, **options).eval()
    finally:
        logger.setLevel(level)


def image_spec(model: Any) -> ImageSpec:
    """The preprocessing that open_clip attached to a model."""
    config = open_clip.get_model_preprocess_cfg(model)
    size = config["size"]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return ImageSpec(
        height=int(height),
        width=int(width),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
        fit=FIT[config["resize_mode"]],  # type: ignore[arg-type]
        fill=int(config["fill_color"]),
    )


def preprocess_config(spec: ImageSpec) -> dict[str, Any]:
    """The inverse of `image_spec`: open_clip's `preprocess_cfg`."""
    back = {fit: mode for mode, fit in FIT.items()}
    return {
        "size": [spec.height, spec.width],
        "mode": "RGB",
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": spec.interpolation,
        "resize_mode": back[spec.fit],
        "fill_color": spec.fill,
    }


def save(clip: ClipModel, folder: Path, record: Mapping[str, Any]) -> None:
    """Writes the checkpoint folder: config and weights for open_clip, `record` as training.json;
    of a fake-quantised model also its quantization.json."""
    config = {"model_cfg": clip.config, "preprocess_cfg": preprocess_config(clip.image)}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    plain = {k: v for k, v in clip.model.state_dict().items() if not k.endswith(RANGE)}
    state = {k: v.detach().cpu().contiguous().clone() for k, v in plain.items()}
    weights = safetensors.torch.save(state)
    (folder / WEIGHTS).write_bytes(weights)
    if layers := fake_layers(clip.model):
        write_quantization(
            folder,
            Quantization(
                format=FORMAT,
                bits=next(iter(layers.values())).quantizer.bits,
                weights_sha256=hashlib.sha256(weights).hexdigest(),
                input_steps={name: layer.quantizer.step.item() for name, layer in layers.items()},
            ),
        )
    text = json.dumps(record, indent=2, ensure_ascii=False)
    path = folder / RECORD
    path.write_text(text + "\n", encoding="utf-8", errors="replace")  # a path may be no UTF-8
