"""A student that begins as its teacher, where their image towers are of one family."""

from collections.abc import Callable

from torch import Tensor

from . import inherit_cnn, inherit_vit
from .inherit_cnn import Told
from .model import ClipModel


def is_family(student: ClipModel, teacher: ClipModel) -> bool:
    """Whether the student's image tower can begin as its teacher's."""
    towers = student.model.visual, teacher.model.visual
    return inherit_vit.is_smaller(*towers) or inherit_cnn.is_narrower(*towers)


def inherit(
    student: ClipModel, teacher: ClipModel, pictures: Callable[[int], Tensor], told: Told
) -> str:
    """Fills the image tower of a student of its teacher's family and says in words with what.

    A CNN looks at `pictures`, of which it asks for so many: float32 [n, 3, H, W], the student's
    input. `told` hears the share that is done.
    """
    towers = student.model.visual, teacher.model.visual
    if inherit_vit.is_smaller(*towers):
        return f"{inherit_vit.inherit_vit(*towers)} of {teacher.name}"
    seen = pictures(inherit_cnn.PICTURES)
    return f"{inherit_cnn.inherit_cnn(*towers, seen, told)} of {teacher.name}"
