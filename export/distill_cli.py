"""`edgeclip distill`: from a teacher and unlabelled pictures to a student, and on to its bundle."""

from typing import Any

from training.cli import offer, signature
from training.distill_cli import distill as run
from training.distill_options import DistillOptions, is_offered


def distill(**chosen: Any) -> None:
    """Distil a large CLIP into a small one, on your own pictures, without labels."""
    run(**chosen)


offer(distill, signature(DistillOptions, is_offered))
