"""The options of a training run: the command line is made from these fields; checked here."""

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

from runtime.errors import DataError
from runtime.label_sets import DEFAULT_TEMPLATES, check_templates

Precision = Literal["fp32", "bf16", "fp16"]
LossName = Literal["auto", "clip", "siglip", "itc", "triplet", "margin"]
Mining = Literal["hardest", "semi-hard"]
Strategy = Literal["ddp", "fsdp"]
DATA, MODEL, LOSS, STEPS, TUNING, QAT, RUN = (
    "Data",
    "Model",
    "Loss",
    "Optimisation",
    "Fine-tuning",
    "Quantisation",
    "The run",
)
_LEAST = {
    "epochs": 1, "workers": 0, "epoch_size": 2, "captions": 1, "unlock_image": 0, "unlock_text": 0,
    "views": 1, "queue": 0, "micro_batch": 0, "checkpoint_every": 1, "devices": 1, "nodes": 1,
}  # fmt: skip
# What may differ between a run and its continuation by --resume.
FREE_ON_RESUME = ("force", "resume", "workers", "checkpoint_every", "cache")


def option(panel: str, text: str, *names: str, **more: Any) -> Any:
    """An option of the command line, under the heading `panel` of its help."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Everything that `train` needs to know; recorded in the checkpoint's training.json.

    Raises DataError, naming the option, for a value that cannot work.
    """

    data: Annotated[
        str,
        typer.Argument(
            help="CSV or TSV (file,caption or file,label), a folder <class>/<picture>, or "
            "WebDataset shards: pairs-{000..099}.tar, also by https."
        ),
    ]
    out: Annotated[Path, typer.Argument(help="Checkpoint folder to write.")]

    mix: Annotated[
        tuple[str, ...],
        option(
            DATA,
            "SOURCE=WEIGHT: further data. Pairs are drawn by weight, whatever the sizes; DATA's "
            "is 1.",
        ),
    ] = ()
    val: Annotated[Path | None, option(DATA, "Validation data, a table or a folder.")] = None
    templates: Annotated[
        tuple[str, ...],
        option(
            DATA,
            "Text with {}, or a file of them; repeatable (default: the model's own, else "
            f"{DEFAULT_TEMPLATES[0]!r}).",
            "--template",
        ),
    ] = ()
    cache: Annotated[
        Path | None, option(DATA, "Folder that keeps resized pictures: decode once.")
    ] = None
    workers: Annotated[int, option(DATA, "Processes that decode pictures.")] = 2
    epoch_size: Annotated[
        int | None, option(DATA, "Pairs an epoch, for shards (default: all of them).")
    ] = None
    resampled: Annotated[
        bool, option(DATA, "Draw shards with replacement instead of each once an epoch.")
    ] = False
    max_bad: Annotated[float, option(DATA, "Stop if more than this share is unusable.")] = 0.01
    crop: Annotated[
        float,
        option(DATA, "Smallest random crop, as a share of the largest that fits; 1 is no crop."),
    ] = 0.9
    flip: Annotated[
        bool, option(DATA, "Mirror half of the pictures, but for captions with left or right.")
    ] = False
    rotate: Annotated[float, option(DATA, "Largest random rotation, degrees.")] = 0.0
    jitter: Annotated[float, option(DATA, "Random brightness, contrast, saturation: 0 to 1.")] = 0.0
    captions: Annotated[int, option(DATA, "Captions of a picture in each step.")] = 1
    token_drop: Annotated[float, option(DATA, "Share of caption tokens left out at random.")] = 0.0

    model: Annotated[
        str, option(MODEL, "open_clip model, a preset, a config (.json), or a checkpoint folder.")
    ] = "ViT-B-32"
    init: Annotated[
        str | None, option(MODEL, "Weights to start from: an open_clip tag, or a folder.")
    ] = None
    init_image: Annotated[
        Path | None, option(MODEL, "Weights of the timm image backbone (.safetensors).")
    ] = None
    tokenizer: Annotated[
        Path | None, option(MODEL, "tokenizer.json, for models that need their own.")
    ] = None
    lock_image: Annotated[bool, option(MODEL, "Keep the image tower as it is.")] = False
    unlock_image: Annotated[
        int, option(MODEL, "With --lock-image: train its last N groups of layers.")
    ] = 0
    lock_text: Annotated[
        bool | None,
        option(
            MODEL,
            "Keep the text tower as it is (default: for labels and a trained start).",
            "--lock-text/--no-lock-text",
        ),
    ] = None
    unlock_text: Annotated[
        int, option(MODEL, "With --lock-text: train its last N groups of layers.")
    ] = 0
    freeze_bn: Annotated[
        bool, option(MODEL, "Keep the statistics of batch normalisation as they are.")
    ] = False
    views: Annotated[
        int,
        option(MODEL, "Augmented views of a picture whose locked features are cached."),
    ] = 1

    loss: Annotated[LossName, option(LOSS, "auto: siglip for models with a bias, else clip.")] = (
        "auto"
    )
    margin: Annotated[
        float | None, option(LOSS, "Of triplet: in cosine (0.2); of margin: a distance (1.2).")
    ] = None
    mining: Annotated[Mining, option(LOSS, "Negatives of the triplet loss.")] = "hardest"
    alpha: Annotated[float, option(LOSS, "Share of itc's soft targets.")] = 0.4
    queue: Annotated[int, option(LOSS, "Length of itc's feature queue.")] = 4096
    momentum: Annotated[float, option(LOSS, "Of itc's momentum encoders.")] = 0.995
    label_weight: Annotated[
        float, option(LOSS, "Weight of a classification of the labels beside the contrast.")
    ] = 0.0

    epochs: Annotated[int, option(STEPS, "Passes over the data.")] = 10
    batch_size: Annotated[int, option(STEPS, "Pictures a step, over all devices.")] = 128
    micro_batch: Annotated[
        int, option(STEPS, "Pictures at a time on a device; the step stays exact (0: all).")
    ] = 0
    lr: Annotated[float, option(STEPS, "Largest learning rate.")] = 5e-4
    image_lr: Annotated[float, option(STEPS, "Factor on it for the image tower.")] = 1.0
    layer_decay: Annotated[
        float, option(STEPS, "Factor on it for each group of layers further from the output.")
    ] = 1.0
    weight_decay: Annotated[float, option(STEPS, "AdamW's weight decay.")] = 0.1
    warmup: Annotated[float, option(STEPS, "Share of the steps with rising rate.")] = 0.1
    grad_clip: Annotated[float, option(STEPS, "Largest gradient norm.")] = 1.0
    grad_checkpointing: Annotated[
        bool, option(STEPS, "Recompute activations: less memory, slower.")
    ] = False
    ema: Annotated[float, option(STEPS, "Decay of the averaged weights, 0.999 say; 0: off.")] = 0.0
    precision: Annotated[Precision, option(STEPS, "Of the arithmetic; weights stay fp32.")] = "fp32"

    guard: Annotated[
        Path | None, option(TUNING, "Labelled data whose zero-shot accuracy must not fall.")
    ] = None
    guard_drop: Annotated[float, option(TUNING, "Points of top-1 that it may fall, 0 to 1.")] = 0.02
    wise_ft: Annotated[
        float | None,
        option(TUNING, "Mix of start (0) and trained (1) weights to write: WiSE-FT's alpha."),
    ] = None

    qat: Annotated[
        bool,
        option(
            QAT,
            "Train the image tower as the int8 that export writes, from a trained start: a tenth "
            "of its --lr and a few epochs are enough; batch statistics stay as they are.",
            "--qat",
        ),
    ] = False
    qat_bits: Annotated[
        int, option(QAT, "Of weights and inputs; export writes 8, less is for research.")
    ] = 8

    seed: Annotated[int, option(RUN, "Seed of weights, order and captions.")] = 0
    checkpoint_every: Annotated[int, option(RUN, "Steps between states to resume from.")] = 500
    resume: Annotated[
        bool, option(RUN, "Go on from OUT.run/last.ckpt, as if nothing had happened.", "--resume")
    ] = False
    devices: Annotated[int, option(RUN, "GPUs (or processes) on this machine.")] = 1
    nodes: Annotated[int, option(RUN, "Machines, started by torchrun.")] = 1
    strategy: Annotated[Strategy, option(RUN, "How several devices share the work.")] = "ddp"
    force: Annotated[bool, option(RUN, "Replace the output if it exists.", "--force")] = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Path):
                object.__setattr__(self, field.name, value.expanduser())
        object.__setattr__(self, "data", str(self.data))
        out = Path(self.out).expanduser()
        object.__setattr__(self, "out", out if out.name else out.resolve())
        if self.templates:
            check_templates(self.templates)
        self._check_choices()
        self._check_ranges()
        self._check_combinations()
        self._check_qat()

    def _check_choices(self) -> None:
        for name, choices in (
            ("precision", Precision), ("loss", LossName), ("mining", Mining), ("strategy", Strategy)
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in get_args(choices):
                raise DataError(f"--{name} is {' or '.join(get_args(choices))}, not {value!r}")

    def _check_ranges(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise DataError(f"{_flag(name)} must be at least {least}, it is {value}")
        if self.margin is not None and not (math.isfinite(self.margin) and self.margin > 0):
            raise DataError(f"--margin must be greater than 0, it is {self.margin}")
        for name in ("lr", "image_lr", "layer_decay", "grad_clip", "crop"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise DataError(f"{_flag(name)} must be greater than 0, it is {value}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise DataError(f"--weight-decay must not be negative, it is {self.weight_decay}")
        for name in ("warmup", "max_bad", "crop", "jitter", "alpha", "guard_drop", "layer_decay"):
            _check_share(name, getattr(self, name))
        for name in ("ema", "momentum", "token_drop"):
            _check_share(name, getattr(self, name), below_one=True)
        if self.wise_ft is not None:
            _check_share("wise_ft", self.wise_ft)
        if not 0 <= self.rotate <= 180:
            raise DataError(f"--rotate is 0 to 180 degrees, not {self.rotate}")
        if not 0 <= self.seed < 2**32:
            raise DataError(f"--seed must be from 0 to 2^32 - 1, it is {self.seed}")
        if not (math.isfinite(self.label_weight) and self.label_weight >= 0):
            raise DataError(f"--label-weight must not be negative, it is {self.label_weight}")

    def _check_combinations(self) -> None:
        if self.batch_size < 2:
            raise DataError("--batch-size must be at least 2: a contrast needs two pairs")
        if self.batch_size % (self.devices * self.nodes):
            raise DataError(
                f"--batch-size {self.batch_size} is over all devices: a multiple of "
                f"{self.devices * self.nodes}"
            )
        if self.unlock_image and not self.lock_image:
            raise DataError("--unlock-image goes with --lock-image: without it all is trained")
        if self.unlock_text and not self.lock_text:
            raise DataError("--unlock-text goes with --lock-text: without it all is trained")
        if self.strategy == "fsdp" and (self.ema or self.loss == "itc"):
            raise DataError("--strategy fsdp goes neither with --ema nor with --loss itc: use ddp")
        if self.strategy == "fsdp" and self.precision == "fp16":
            raise DataError("--strategy fsdp goes with --precision fp32 or bf16")
        starts = [os.path.realpath(Path(s).expanduser()) for s in (self.model, self.init) if s]
        if self.wise_ft is not None and os.path.realpath(self.out) in starts:
            raise DataError("--wise-ft mixes with the start: write to another folder than that")
        if self.views > 1 and not self.lock_image:
            raise DataError("--views are of a locked image tower's features: add --lock-image")

    def _check_qat(self) -> None:
        if not 2 <= self.qat_bits <= 8:
            raise DataError(f"--qat-bits is 2 to 8, not {self.qat_bits}")
        if self.qat and (self.lock_image or self.wise_ft is not None or self.strategy == "fsdp"):
            raise DataError(
                "--qat trains the whole image tower as it will be: it goes with none of "
                "--lock-image, --wise-ft and --strategy fsdp"
            )

    @property
    def is_compared(self) -> bool:
        """Whether each epoch is measured on held-out data."""
        return self.val is not None

    @property
    def run(self) -> Path:
        """The folder beside `out` for what belongs to the run: its state and its logs."""
        return self.out.with_name(self.out.name + ".run")

    def describe(self) -> dict[str, Any]:
        """The options as JSON values."""
        return {k: _plain(v) for k, v in vars(self).items()}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_share(name: str, value: float, below_one: bool = False) -> None:
    if not 0 <= value <= 1 or (below_one and value == 1):
        raise DataError(f"{_flag(name)} is a share, from 0 to 1, not {value}")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    several = isinstance(value, Sequence) and not isinstance(value, str)
    return [_plain(item) for item in value] if several else value
