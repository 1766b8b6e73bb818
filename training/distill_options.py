"""The options of a distillation: some of a training run's, and what it needs beside."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from runtime.errors import DataError
from runtime.label_sets import LabelSet, read_labels

from .distill_texts import read_lines
from .options import DATA, MODEL, STEPS, TrainOptions, option

VIEWS, LOSSES = "The teacher's views", "Losses"
# What a distillation has of the options of TrainOptions; the others keep their defaults.
SHARED = (
    "out", "val", "templates", "cache", "workers", "max_bad", "crop", "flip", "rotate", "jitter",
    "views", "captions", "init_image", "freeze_bn", "tokenizer",
    "epochs", "batch_size", "micro_batch", "lr", "layer_decay", "weight_decay", "warmup",
    "grad_clip", "grad_checkpointing", "ema", "precision", "qat", "qat_bits",
    "seed", "checkpoint_every", "resume", "devices", "nodes", "force",
)  # fmt: skip
WEIGHTS = ("embedding", "affinity", "soft_labels", "contrast")


@dataclass(frozen=True, kw_only=True)
class DistillOptions(TrainOptions):
    """Everything that `distill` needs to know; recorded in the checkpoint's training.json.

    It is a training run whose targets are a teacher's embeddings: `data` and `model` of
    TrainOptions are made from `images` and `student`. Raises DataError, naming the option, for a
    value that cannot work.
    """

    data: str = ""
    model: str = ""
    teacher: Annotated[
        str, option(MODEL, "Whom to learn from: open_clip MODEL:TAG, or a checkpoint folder.")
    ]
    student: Annotated[
        str,
        option(MODEL, "open_clip model (MODEL or MODEL:TAG), preset, config (.json) or folder."),
    ] = ""
    inherit: Annotated[
        bool | None,
        option(
            MODEL,
            "Begin with the teacher's weights (default: where the student is a smaller ViT or a "
            "narrower CNN of its kind).",
            "--inherit/--no-inherit",
        ),
    ] = None
    inherit_from: Annotated[
        str | None,
        option(
            MODEL,
            "Begin with the weights of this checkpoint instead: of a student that is less narrow.",
        ),
    ] = None
    student_text: Annotated[
        str | None,
        option(
            MODEL,
            "Give the student a smaller text tower of its own: LAYERS or LAYERSxWIDTH of its "
            "teacher's (2x256), or a student's folder (default: the teacher's, as it is).",
        ),
    ] = None
    images: Annotated[
        tuple[Path, ...],
        option(
            DATA,
            "Folder, picture, video or table (its captions are used, labels are not); repeatable.",
        ),
    ]
    labels: Annotated[
        str | None,
        option(DATA, "Labels of the prompt bank, for soft labels: a,b,c or a file."),
    ] = None
    texts: Annotated[
        Path | None,
        option(
            DATA,
            "With --student-text: words or sentences that it learns beside --labels and captions, "
            "one a line; each as it is and in the templates.",
        ),
    ] = None
    fps: Annotated[float, option(DATA, "Frames a second that are taken of a video.")] = 1.0
    held_out: Annotated[
        float, option(DATA, "Without --val: share of the pictures to compare the two on.")
    ] = 0.1

    views: Annotated[
        int, option(VIEWS, "Random views of each picture that the teacher is asked about.")
    ] = 4
    crop: Annotated[
        float, option(VIEWS, "Smallest share of a picture that a view keeps; 1 is no crop.")
    ] = 0.5
    flip: Annotated[bool, option(VIEWS, "Mirror half of the views.")] = True
    rotate: Annotated[float, option(VIEWS, "Largest random rotation, degrees.")] = 0.0
    jitter: Annotated[float, option(VIEWS, "Random brightness, contrast, saturation: 0 to 1.")] = (
        0.2
    )

    embedding: Annotated[
        float, option(LOSSES, "Weight of the cosine with the teacher's embedding.")
    ] = 1.0
    affinity: Annotated[
        float, option(LOSSES, "Weight of affinity mimicking: what is like what.")
    ] = 1.0
    soft_labels: Annotated[
        float, option(LOSSES, "Weight of the teacher's scores over --labels.")
    ] = 1.0
    contrast: Annotated[
        float, option(LOSSES, "Weight of the contrast with captions, where there are any.")
    ] = 0.2
    temperature: Annotated[
        float, option(LOSSES, "By which the scores over --labels are softened.")
    ] = 1.0

    epochs: Annotated[int, option(STEPS, "Passes over the pictures.")] = 20
    lr: Annotated[float, option(STEPS, "Largest learning rate.")] = 1e-3

    def __post_init__(self) -> None:
        images = tuple(Path(source).expanduser() for source in self.images)
        if not images:
            raise DataError("--images: name at least one folder, video or table")
        if not self.student:
            raise DataError("--student: name a preset or model, or have one found by --budget-ms")
        object.__setattr__(self, "images", images)
        object.__setattr__(self, "data", ", ".join(map(str, images)))
        object.__setattr__(self, "model", self.student)
        super().__post_init__()
        if self.captions < 1:
            raise DataError("--captions must be at least 1")
        _ = self.label_set  # a fault in it is found before the pictures are gone through

    def _check_ranges(self) -> None:
        super()._check_ranges()
        for name in WEIGHTS:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise DataError(f"--{name.replace('_', '-')} must not be negative, it is {value}")
        if not any(getattr(self, name) for name in WEIGHTS):
            raise DataError("all weights of losses are 0: nothing would be learned")
        for name in ("fps", "temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise DataError(f"--{name} must be greater than 0, it is {value}")
        if self.student_text and not (self.embedding or self.affinity):
            raise DataError(
                "--student-text learns by --embedding and --affinity: one must not be 0"
            )
        if not 0 <= self.held_out < 1:
            raise DataError(f"--held-out is a share, from 0 to below 1, not {self.held_out}")

    def _check_combinations(self) -> None:
        if self.batch_size % (self.devices * self.nodes) or self.batch_size < 2:
            raise DataError(
                f"--batch-size {self.batch_size} is over all devices: a multiple of "
                f"{self.devices * self.nodes}, and at least 2"
            )
        if self.inherit_from and self.inherit is False:
            raise DataError("--inherit-from begins with other weights: leave out --no-inherit")
        if self.texts and not self.student_text:
            raise DataError("--texts are for a text tower of the student's own: add --student-text")
        if self.texts:
            read_lines(self.texts)  # before the pictures are gone through

    @property
    def is_compared(self) -> bool:
        """Whether each epoch is measured on held-out data."""
        return self.val is not None or self.held_out > 0

    @property
    def label_set(self) -> LabelSet | None:
        """The labels of the prompt bank. Raises DataError for a file that cannot be read."""
        return None if self.labels is None else read_labels(self.labels)

    def describe(self) -> dict[str, Any]:
        """The options of a distillation as JSON values."""
        own = {f.name for f in dataclasses.fields(self)} - {
            f.name for f in dataclasses.fields(TrainOptions)
        }
        return {k: v for k, v in super().describe().items() if k in own or k in SHARED}


def is_offered(name: str) -> bool:
    """Whether a field is an option of the command."""
    return name in SHARED or name not in {f.name for f in dataclasses.fields(TrainOptions)}
