"""The student: an image tower of its own, with all the rest of its teacher."""

import copy
import dataclasses
from pathlib import Path

import msgspec

from runtime.errors import DataError

from .distill_options import DistillOptions
from .inherit import is_family
from .model import ClipModel, create, create_from
from .start import load_backbone
from .student_text import fill_text, has_own_text, text_config

_IMAGE = "visual."


def make_student(options: DistillOptions, teacher: ClipModel) -> ClipModel:
    """The student's image tower, of the teacher's embedding width, behind a copy of its text tower
    and its scale, both locked: a whole CLIP. With `--student-text` the text tower is smaller, and
    left to be unlocked. Raises DataError for what does not go together.

    Its first weights are a checkpoint's, where `--student` is one; those of `--init-image`; or
    random, and then it sees pictures normalised as the teacher does.
    """
    own = _chosen(options)
    if options.student_text is None and has_own_text(options.student):
        raise DataError(
            f"--student {options.student} has a text tower of its own: add --student-text "
            f"{options.student} to go on with it"
        )
    clip = _locked(_take_over(_behind(own, teacher, options), own))
    if options.init_image:
        return load_backbone(clip, options.init_image)
    if own.source != "random weights":
        return clip
    image = msgspec.structs.replace(clip.image, mean=teacher.image.mean, std=teacher.image.std)
    return dataclasses.replace(clip, image=image)


def open_source(options: DistillOptions, teacher: ClipModel) -> ClipModel:
    """Whose weights the student may begin with: those of `--inherit-from`, else the teacher's.
    Raises DataError."""
    if options.inherit_from is None:
        return teacher
    if not Path(options.inherit_from).expanduser().is_dir():
        raise DataError(f"--inherit-from {options.inherit_from} is no checkpoint folder")
    return create(options.inherit_from)


def is_heir(options: DistillOptions, student: ClipModel, source: ClipModel) -> bool:
    """Whether the student is to begin with the weights of `source`. Raises DataError where it
    cannot, and `--inherit` or `--inherit-from` says that it must."""
    if options.inherit is False:
        return False
    flag = "--inherit-from" if options.inherit_from else "--inherit"
    asked = options.inherit_from or options.inherit
    if student.source != "random weights":
        if asked:
            raise DataError(
                f"{flag} begins with the weights of {source.name}, but {student.name} has others "
                f"({student.source}): leave out {flag}, or take an architecture without weights"
            )
        return False
    if is_family(student, source):
        return True
    if asked:
        raise DataError(
            f"{flag}: {student.name} is neither a smaller ViT of the kind of {source.name} "
            "(open_clip's own, with the same patches and head width) nor a narrower CNN of the "
            "same layers (a MobileNet, EfficientNet, MNASNet)"
        )
    return False


def _chosen(options: DistillOptions) -> ClipModel:
    """The model that `--student` names: MODEL, MODEL:TAG, a preset, a config or a folder."""
    name = options.student
    if Path(name).expanduser().exists() or ":" not in name:
        return create(name, seed=options.seed)
    model, _, tag = name.partition(":")
    return create(model, tag, options.seed)


def _behind(own: ClipModel, teacher: ClipModel, options: DistillOptions) -> ClipModel:
    """A model with the image tower's configuration of `own` and the rest of the teacher's."""
    config = copy.deepcopy(teacher.config) | {
        "vision_cfg": copy.deepcopy(own.config["vision_cfg"]),
        "text_cfg": text_config(options.student_text, teacher),
    }
    quick = [bool(clip.config.get("quick_gelu")) for clip in (own, teacher)]
    if quick[0] != quick[1] and own.source != "random weights" and _has_gelu(own):
        raise DataError(
            f"--student {own.name} was trained {'with' if quick[0] else 'without'} quick_gelu, its "
            "teacher otherwise: take another student or its architecture alone"
        )
    made = create_from(config, f"{own.name}-of-{teacher.name}", options.seed)
    kept = "logit_" if options.student_text else ""
    rest = {
        k: v
        for k, v in teacher.model.state_dict().items()
        if not k.startswith(_IMAGE) and k.startswith(kept)
    }
    made.model.load_state_dict(rest, strict=False)
    if options.student_text:
        fill_text(made, options.student_text, teacher)
    fresh = frozenset(name for name in made.fresh if name.startswith(_IMAGE))
    # Pictures are cut to the model's shape as the teacher's are: it saw the same view of them.
    image = msgspec.structs.replace(own.image, fit=teacher.image.fit, fill=teacher.image.fill)
    return dataclasses.replace(made, image=image, fresh=fresh, templates=teacher.templates)


def _has_gelu(clip: ClipModel) -> bool:
    """Whether `quick_gelu` counts in the image tower: in open_clip's own ViTs, not in its ResNets
    or in timm's towers."""
    vision = clip.config["vision_cfg"]
    return not vision.get("timm_model_name") and isinstance(vision.get("layers"), int)


def _take_over(clip: ClipModel, own: ClipModel) -> ClipModel:
    """The model with the trained weights of `own` in its image tower, where it has some: all but a
    projection into another width."""
    if own.source == "random weights":
        return clip
    state = clip.model.state_dict()
    fit = {
        k: v
        for k, v in own.model.state_dict().items()
        if k.startswith(_IMAGE) and v.shape == state[k].shape
    }
    clip.model.load_state_dict(fit, strict=False)
    return dataclasses.replace(clip, fresh=clip.fresh - set(fit), source=own.source)


def _locked(clip: ClipModel) -> ClipModel:
    for name, parameter in clip.model.named_parameters():
        parameter.requires_grad_(name.startswith(_IMAGE))
    return clip
