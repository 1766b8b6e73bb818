"""Trains a CLIP on Lightning and writes a checkpoint folder after every epoch."""

import contextlib
import dataclasses
import importlib.metadata
import logging
import platform
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import torchvision_ops as torchvision_ops  # before lightning, which imports torchvision

# isort: split
import lightning
import torch
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.progress import Progress

from runtime.errors import DataError
from runtime.folders import check_target, new_folder
from runtime.frames import Frame
from runtime.tokenizer import Tokenizer

from .batches import PairDataset, loader
from .data import Pairs, describe, read_pairs
from .evaluate import evaluate
from .images import decode
from .model import CONFIG, ClipModel, create, save
from .module import ClipTraining
from .options import TrainOptions
from .text import text_side

_LIGHTNING = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
_PACKAGES = ("edgeclip", "torch", "open_clip_torch", "timm", "lightning", "numpy")


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
    if options.precision == "fp16" and not torch.cuda.is_available():
        raise DataError("--precision fp16 needs a CUDA device; use bf16 or fp32 here")
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
        """Evaluates, and puts the checkpoint of this epoch in the place of the last."""
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
    with _plain_lightning():
        trainer = lightning.Trainer(
            accelerator="cuda" if torch.cuda.is_available() else "cpu",
            devices=1,
            max_epochs=options.epochs,
            precision=_LIGHTNING[options.precision],  # type: ignore[arg-type]
            gradient_clip_val=options.grad_clip,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=not quiet,
            callbacks=[] if quiet else [RichProgressBar(console_kwargs={"stderr": True})],
        )
        module.model.train()
        trainer.fit(module, loader(dataset, options.batch_size, options.seed))


@contextlib.contextmanager
def _plain_lightning() -> Iterator[None]:
    """Lightning without its advice on loader workers and products, and with an ordinary Ctrl-C:
    left alone it ends the process by sys.exit and leaves the signal switched off."""
    logger = logging.getLogger("lightning.pytorch")
    level, handler = logger.level, signal.getsignal(signal.SIGINT)
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    except SystemExit as error:
        if error.code == 1:
            raise KeyboardInterrupt from error
        raise
    finally:
        logger.setLevel(level)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _record(
    clip: ClipModel, options: TrainOptions, data: _Data, val: _Data | None
) -> dict[str, Any]:
    chosen = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    return {
        "model": clip.name,
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
