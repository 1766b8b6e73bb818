"""A text tower of the student's own: its teacher's with fewer layers and channels.

It keeps the tokenizer, the context length and the shape of a head, and begins with the teacher's
weights, chosen as TinyCLIP does (see `inherit_vit`).
"""

import copy
import json
import re
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from runtime.errors import DataError

from .groups import text_groups
from .inherit_vit import Weights, even_layers, largest, take_layer, written
from .model import RECORD, WEIGHTS, ClipModel, create

_SIZE = re.compile(r"(\d+)(?:x(\d+))?")
_LAYER = "transformer.resblocks."
_SAME = ("context_length", "vocab_size", "hf_tokenizer_name")
# Where each tensor outside of the layers has the channels.
_AXIS = {
    "token_embedding.weight": 1, "positional_embedding": 1,
    "ln_final.weight": 0, "ln_final.bias": 0,
    "text_projection": 0, "text_projection.weight": 1,
}  # fmt: skip


def text_config(wanted: str | None, teacher: ClipModel) -> dict[str, Any]:
    """The text_cfg of a student: its teacher's, or the one that `--student-text` says: LAYERS,
    LAYERSxWIDTH, or a student's folder. Raises DataError where the teacher has no such part."""
    config = copy.deepcopy(teacher.config["text_cfg"])
    if wanted is None:
        return dict(config)
    if config.get("hf_model_name"):
        raise DataError(
            f"--student-text: {teacher.name} has a text tower of Hugging Face's, only open_clip's "
            "own can be made smaller: leave --student-text out"
        )
    if Path(wanted).expanduser().is_dir():
        return _of_folder(wanted, teacher)
    layers, width = _size(wanted, teacher)
    heads = width * _heads(teacher) // _width(teacher)
    sizes = {"layers": layers, "width": width, "heads": heads}
    return {**config, **sizes, "embed_cls": False}  # CoCa's class token cannot be exported


def _size(wanted: str, teacher: ClipModel) -> tuple[int, int]:
    """Layers and width. Raises DataError."""
    found = _SIZE.fullmatch(wanted)
    if not found:
        raise DataError(
            f"--student-text is LAYERS, LAYERSxWIDTH (2x256) or a student's folder, not {wanted!r}"
        )
    most, whole = len(_tower(teacher).transformer.resblocks), _width(teacher)
    layers, width = int(found[1]), int(found[2] or whole)
    if not 1 <= layers <= most:
        raise DataError(
            f"--student-text {wanted}: the text tower of {teacher.name} has 1 to {most} layers to "
            f"take, not {layers}"
        )
    head = whole // _heads(teacher)
    if width % head or not head <= width <= whole:
        raise DataError(
            f"--student-text {wanted}: a width is a multiple of {head}, the width of a head of "
            f"{teacher.name}, and at most {whole}"
        )
    return layers, width


def _of_folder(folder: str, teacher: ClipModel) -> dict[str, Any]:
    own, other = create(folder).config, teacher.config
    differ = [n for n in _SAME if own["text_cfg"].get(n) != other["text_cfg"].get(n)]
    differ += [n for n in ("embed_dim", "quick_gelu") if own.get(n, 0) != other.get(n, 0)]
    if differ:
        raise DataError(
            f"--student-text {folder} does not go with {teacher.name}: {', '.join(differ)} differ"
        )
    return dict(own["text_cfg"])


def fill_text(clip: ClipModel, wanted: str, teacher: ClipModel) -> None:
    """Gives the text tower of `clip`, made by `text_config`, its first weights: a folder's, or the
    teacher's. Raises DataError where a folder's do not fit."""
    own, folder = _tower(clip), Path(wanted).expanduser()
    if folder.is_dir():
        _load(clip, folder)
        return
    given = {k: v.detach().cpu().float() for k, v in _tower(teacher).state_dict().items()}
    made = _chosen(given, own, len(_tower(teacher).transformer.resblocks))
    prefix = "" if own is clip.model else "text."
    names = {name.removeprefix(prefix) for group in text_groups(clip.model) for name in group}
    if lacking := sorted(names - made.keys()):
        raise DataError(
            f"--student-text: the text tower of {teacher.name} has parts that cannot be made "
            f"smaller: {', '.join(lacking)}"
        )
    own.load_state_dict(made, strict=False)


def _load(clip: ClipModel, folder: Path) -> None:
    names = {name for group in text_groups(clip.model) for name in group}
    given = safetensors.torch.load_file(folder / WEIGHTS)
    state = clip.model.state_dict()
    unfit = [n for n in names if n not in given or given[n].shape != state[n].shape]
    if unfit:
        raise DataError(f"--student-text {folder}: {len(unfit)} of its tensors do not fit")
    clip.model.load_state_dict({n: given[n] for n in names}, strict=False)


@torch.no_grad()
def _chosen(given: Weights, own: Any, most: int) -> Weights:
    """The weights of a tower `own`, of those given: layers at even distances, and the channels
    that are written to most."""
    text = {k: v for k, v in given.items() if k.startswith(_LAYER) or k in _AXIS}
    length, width = own.positional_embedding.shape
    channels = largest(written(text), width)
    made = {
        name: value.index_select(_AXIS[name], channels)
        for name, value in text.items()
        if name in _AXIS
    }
    made["positional_embedding"] = made["positional_embedding"][:length]
    if "text_projection.bias" in given:
        made["text_projection.bias"] = given["text_projection.bias"]
    for number, old in enumerate(even_layers(most, len(own.transformer.resblocks))):
        made |= take_layer(text, old, number, own, channels)
    return made


def has_own_text(student: str) -> bool:
    """Whether `--student` is a folder whose text tower was learned with `--student-text`."""
    try:
        record = json.loads((Path(student).expanduser() / RECORD).read_text(encoding="utf-8"))
        return bool(record["options"].get("student_text"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def unlock_text(clip: ClipModel) -> None:
    """Has the text tower learn as well."""
    parameters = dict(clip.model.named_parameters())
    for name in (name for group in text_groups(clip.model) for name in group):
        parameters[name].requires_grad_(True)


def _tower(clip: ClipModel) -> Any:
    """The text tower: of a CLIP without a part of its own for texts, the model itself."""
    return getattr(clip.model, "text", clip.model)


def _width(clip: ClipModel) -> int:
    return int(_tower(clip).positional_embedding.shape[1])


def _heads(clip: ClipModel) -> int:
    return int(_tower(clip).transformer.resblocks[0].attn.num_heads)
