"""The options of a training run, checked when they are made."""

import math
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import DataError
from runtime.prompts import check_templates

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Everything that `train` needs to know; recorded in the checkpoint's training.json."""

    # what is trained, on what, and where it goes
    data: Path
    out: Path
    val: Path | None = None
    model: str = "ViT-B-32"
    pretrained: str | None = None
    tokenizer: Path | None = None
    templates: tuple[str, ...] = ("a photo of a {}",)

    # optimisation
    epochs: int = 10
    batch_size: int = 128
    lr: float = 5e-4
    weight_decay: float = 0.1
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises from zero."""
    grad_clip: float = 1.0
    precision: str = "fp32"
    seed: int = 0

    # behaviour
    strict: bool = False
    """Stop at the first picture or row that cannot be used, instead of skipping it."""
    force: bool = False
    """Replace the checkpoint folder `out` if it exists."""

    def __post_init__(self) -> None:
        for name in ("data", "out", "val", "tokenizer"):
            if path := getattr(self, name):
                object.__setattr__(self, name, Path(path).expanduser())
        check_templates(self.templates)
        _positive("--epochs", self.epochs)
        _positive("--lr", self.lr)
        _positive("--grad-clip", self.grad_clip)
        if self.batch_size < 2:
            raise DataError("--batch-size must be at least 2: a contrast needs two pairs")
        if not 0 <= self.warmup <= 1:
            raise DataError(f"--warmup is a share of the steps, 0 to 1, not {self.warmup}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise DataError(f"--weight-decay must not be negative, it is {self.weight_decay}")
        if not 0 <= self.seed < 2**32:
            raise DataError(f"--seed must be from 0 to 2^32 - 1, it is {self.seed}")
        if self.precision not in PRECISIONS:
            raise DataError(f"--precision is {' or '.join(PRECISIONS)}, not {self.precision!r}")


def _positive(flag: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise DataError(f"{flag} must be greater than 0, it is {value}")
