"""Trains a CLIP on Lightning and writes a checkpoint folder after every epoch."""

import dataclasses
import importlib.metadata
import math
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import torchvision_ops as torchvision_ops  # before lightning, which imports torchvision

# isort: split
import lightning
import torch
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from runtime.errors import DataError
from runtime.folders import check_target, new_folder
from runtime.frames import Frame
from runtime.tokenizer import Tokenizer

from .batches import Batch, PairDataset, loader
from .data import Pairs, describe, read_pairs
from .evaluate import evaluate, normalise
from .images import decode
from .loss import clamp_scale, clip_loss, sigmoid_loss
from .model import CONFIG, ClipModel, create, save
from .options import TrainOptions
from .text import text_side

_LIGHTNING = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
_PACKAGES = ("edgeclip", "torch", "open_clip_torch", "timm", "lightning", "numpy")


class ClipTraining(lightning.LightningModule):
    """Contrastive training of one model: the loss, AdamW, and a warm-up followed by a cosine."""

    def __init__(
        self, clip: ClipModel, options: TrainOptions, end_epoch: Callable[[int, float], None]
    ) -> None:
        super().__init__()
        self.clip, self.model, self.options = clip, clip.model, options
        self._end_epoch = end_epoch
        self._losses: list[Tensor] = []

    def training_step(self, batch: Batch, _: int) -> Tensor:
        model = self.model
        image = model.encode_image(normalise(batch.frames, self.clip.image), normalize=True)
        text = model.encode_text(batch.tokens, normalize=True)
        scale = model.logit_scale.exp()
        if model.logit_bias is None:
            loss = clip_loss(image, text, scale, batch.positives)
        else:
            loss = sigmoid_loss(image, text, scale, model.logit_bias, batch.positives)
        self._losses.append(loss.detach())
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        clamp_scale(self.model.logit_scale)

    def on_train_epoch_end(self) -> None:
        loss = torch.stack(self._losses).mean().item()
        self._losses.clear()
        if not math.isfinite(loss):
            raise DataError(f"the loss became {loss}: try a smaller --lr, or --precision fp32")
        self.model.eval()
        self._end_epoch(self.current_epoch, loss)
        self.model.train()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, self.options.weight_decay),
            lr=self.options.lr,
            betas=(0.9, 0.98),
            eps=1e-6,
        )
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = max(1, round(steps * self.options.warmup))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate(step, warmup, steps)
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def learning_rate(step: int, warmup: int, steps: int) -> float:
    """The factor on the learning rate: linear to 1 over `warmup` steps, then a half cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1, (step - warmup) / max(1, steps - warmup))))


def parameter_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices and kernels; none on biases, norms, embeddings and scales."""
    exempt = model.no_weight_decay()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = [p for n, p in named if p.ndim < 2 or n in exempt]
    decayed = [p for n, p in named if not (p.ndim < 2 or n in exempt)]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class _Data:
    """One set, ready for the model."""

    pairs: Pairs
    frames: Frame


def train(options: TrainOptions, quiet: bool = False) -> dict[str, Any]:
    """Trains and writes the checkpoint folder `options.out`; returns what training.json holds.

    After each epoch the folder is whole and of that epoch. Raises DataError for data or options
    that do not work.
    """
    console = Console(stderr=True, quiet=quiet)
    check_target(options.out, CONFIG, options.force)
    clip = create(options.model, options.pretrained, options.seed)
    content, text = text_side(clip, options.tokenizer, options.templates)
    tokenizer = Tokenizer(content, text)
    data = _load(options.data, clip, options, console)
    val = _load(options.val, clip, options, console) if options.val else None
    if len(data.pairs) < 2:
        raise DataError(f"{options.data}: at least 2 pictures are needed to train")
    record = _record(clip, options, data, val)
    start = time.perf_counter()

    def end_epoch(epoch: int, loss: float) -> None:
        metrics = {"epoch": epoch + 1, "loss": loss, "logit_scale": _scale(clip)}
        if val:
            metrics |= evaluate(
                clip.model, tokenizer, val.pairs, val.frames, clip.image, options.templates
            )
        record["epochs"].append(metrics)
        record["seconds"] = round(time.perf_counter() - start, 1)
        with new_folder(options.out, CONFIG, options.force or epoch > 0) as folder:
            save(clip, folder, record)
            if clip.config["text_cfg"].get("hf_tokenizer_name"):
                (folder / "tokenizer.json").write_bytes(content)
        console.print("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))

    dataset = PairDataset(data.pairs, data.frames, tokenizer(data.pairs.texts))
    _fit(ClipTraining(clip, options, end_epoch), dataset, options, quiet)
    clip.model.eval()
    return record


def _load(source: Path, clip: ClipModel, options: TrainOptions, console: Console) -> _Data:
    pairs = read_pairs(source, options.templates, options.strict)
    options.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with Progress(console=console, transient=True, disable=console.quiet) as progress:
        pairs, frames = decode(
            pairs, clip.image, options.out.absolute().parent, progress, options.strict
        )
    console.print(f"{source}: {len(pairs)} pictures, {len(pairs.texts)} captions")
    if pairs.skipped:
        console.print(f"[yellow]skipped: {describe(pairs.skipped)}[/] (--strict stops instead)")
    return _Data(pairs, frames)


def _fit(module: ClipTraining, dataset: PairDataset, options: TrainOptions, quiet: bool) -> None:
    lightning.seed_everything(options.seed, verbose=False)
    cuda = torch.cuda.is_available()
    if options.precision == "fp16" and not cuda:
        raise DataError("--precision fp16 needs a CUDA device; use bf16 or fp32 here")
    with warnings.catch_warnings():
        # Lightning advises loader workers and litlogger; pixels are decoded already
        warnings.filterwarnings("ignore", module="lightning")
        trainer = lightning.Trainer(
            accelerator="cuda" if cuda else "cpu",
            devices=1,
            max_epochs=options.epochs,
            precision=_LIGHTNING[options.precision],  # type: ignore[arg-type]
            gradient_clip_val=options.grad_clip,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=not quiet,
            callbacks=[] if quiet else [RichProgressBar(leave=False)],
        )
        module.model.train()
        trainer.fit(module, loader(dataset, options.batch_size, options.seed))
    if trainer.interrupted:
        raise KeyboardInterrupt


def _record(
    clip: ClipModel, options: TrainOptions, data: _Data, val: _Data | None
) -> dict[str, Any]:
    chosen = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    return {
        "options": chosen,
        "start": clip.source,
        "data": _describe(data),
        "val": _describe(val) if val else None,
        "versions": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "epochs": [],
    }


def _describe(data: _Data) -> dict[str, Any]:
    return {
        "images": len(data.pairs),
        "captions": len(data.pairs.texts),
        "classes": list(data.pairs.classes),
        "skipped": data.pairs.skipped,
        "fingerprint": data.pairs.fingerprint(),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _scale(clip: ClipModel) -> float:
    return float(clip.model.logit_scale.detach().exp())
