"""From options to what a run works on: the model, what of it is locked, and the pairs."""

import hashlib
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from calibration.pairs import Pairs, check_bad, count
from calibration.pairs import describe as in_words
from runtime.errors import DataError
from runtime.tokenizer import Tokenizer

from .augment import Augmentation
from .cache import FrameCache
from .evaluate import text_encoder
from .features import Cut, FeatureStore, cut
from .groups import image_groups, lock, text_groups
from .model import ClipModel
from .options import TrainOptions
from .pictures import PictureReader
from .qat import require_trained
from .rows import Maker, TableRows
from .shards import Shards
from .sources import Plan, Source, make_plan, open_sources
from .start import make_model
from .text import text_side
from .towers import Towers


@dataclass(frozen=True, eq=False)
class Material:
    """The model and the data of a run, ready for its first step."""

    clip: ClipModel
    towers: Towers
    tokenizer_json: bytes
    tokenizer: Tokenizer
    maker: Maker
    sources: Sequence[TableRows | Shards]
    plan: Plan
    data: list[dict[str, Any]]
    """What training.json says of each source."""


def prepare(options: TrainOptions, fabric: Fabric, console: Console) -> Material:
    """Opens the data, makes the model, locks what is to be locked and computes its features.

    Raises DataError for what does not work, before anything is trained.
    """
    for data in (options.val, options.guard):
        if data is not None and not os.path.exists(data):
            raise DataError(f"there is no data file or folder {data}")
    clip = make_model(options)
    if options.qat:
        require_trained(clip, "--model or --init")
    content, spec = text_side(clip, options.tokenizer, options.templates)
    tokenizer = Tokenizer(content, spec)
    with Progress(console=console, transient=True, disable=console.quiet) as progress:
        sources = open_sources(options, progress)
        for source in sources:
            _announce(source, options.max_bad, console)
        _lock(clip, options, sources, console)
        if options.grad_checkpointing:
            clip.model.set_grad_checkpointing(True)
        if options.strategy != "fsdp":  # which shards a model that may be too large for one device
            clip.model.to(fabric.device)
        where = _cut(clip, options, sources, console)
        maker = _maker(options, clip, tokenizer, where)
        fixed = _text_is_locked(clip, sources)
        if fixed and options.token_drop:
            raise DataError("--token-drop goes with a text tower that is trained: --no-lock-text")
        opened = [_rows(s, clip, maker, where, fixed, options, progress) for s in sources]
    classes = _classes(options, opened)
    torch.manual_seed(options.seed)  # of the classifier's first weights
    towers = Towers(clip, where.rest if where else None, classes)
    kept = [_kept(s, o) for s, o in zip(sources, opened, strict=True)]
    plan = make_plan(kept, options, fabric.world_size)
    return Material(
        clip,
        towers,
        content,
        tokenizer,
        maker,
        opened,
        plan,
        [describe(s.name, s.data) | {"weight": s.weight} for s in kept],
    )


def _announce(source: Source, max_bad: float, console: Console) -> None:
    data = source.data
    if isinstance(data, Shards):
        console.print(f"{source.name}: {data.samples} pairs in {len(data.urls)} shards")
        return
    console.print(f"{source.name}: {len(data)} pictures, {len(data.texts)} captions")
    check_bad(data.bad, len(data) + len(data.bad), max_bad, source.name)
    if data.bad:
        console.print(f"[yellow]left out: {in_words(data.bad)}[/]")


def _lock(
    clip: ClipModel, options: TrainOptions, sources: Sequence[Source], console: Console
) -> None:
    """Locks what the options say; the text tower also where labels would wear it out: with a few
    class names for captions it would forget all other words."""
    if options.lock_image:
        lock(clip, image_groups(clip.model), options.unlock_image, "--lock-image")
    text = text_groups(clip.model)
    labels = all(isinstance(s.data, Pairs) and s.data.targets is not None for s in sources)
    trained = not {name for group in text for name in group} <= clip.fresh
    if options.lock_text or (options.lock_text is None and labels and trained):
        lock(clip, text, options.unlock_text, "--lock-text")
        if options.lock_text is None:
            console.print("labels: the text tower stays as it is (--no-lock-text trains it)")
    if not any(p.requires_grad for n, p in clip.model.named_parameters() if "logit" not in n):
        raise DataError("both towers are locked: nothing is left to train")


def _maker(
    options: TrainOptions, clip: ClipModel, tokenizer: Tokenizer, where: Cut | None
) -> Maker:
    augmentation = Augmentation(
        clip.image, options.crop, options.flip, options.rotate, options.jitter
    )
    if where and options.views == 1:  # one cached view is the picture as the runtime sees it
        if options.flip or options.rotate or options.jitter:
            raise DataError(
                "--flip, --rotate and --jitter of a locked image tower need --views 2 or more: so "
                "many changed views of each picture are kept"
            )
        augmentation = Augmentation(clip.image)
    # The database does not work over a network: each machine has its own.
    name = f"pictures-{platform.node()}" if options.nodes > 1 else "pictures"
    cache = FrameCache(options.cache / name) if options.cache else None
    return Maker(
        PictureReader(augmentation, cache), tokenizer, options.captions, options.token_drop
    )


def _cut(
    clip: ClipModel, options: TrainOptions, sources: Sequence[Source], console: Console
) -> Cut | None:
    """Where the image tower is cut, if its locked part can be run once for all."""
    if not options.lock_image:
        return None
    tables = all(isinstance(source.data, Pairs) for source in sources)
    where = cut(clip) if tables and options.strategy != "fsdp" else None
    if where is None:
        reason = "of this tower" if tables else "of shards"
        console.print(f"the locked layers' features {reason} are not cached: they run every step")
    return where


def _rows(
    source: Source,
    clip: ClipModel,
    maker: Maker,
    where: Cut | None,
    text_is_locked: bool,
    options: TrainOptions,
    progress: Progress,
) -> TableRows | Shards:
    data = source.data
    if isinstance(data, Shards):
        return data
    features: NDArray[np.float16] | None = None
    if where:
        folder = options.cache or options.run
        store = FeatureStore(folder, maker.reader, options.views, options.seed, options.workers)
        data, features = store.images(clip, where, data, progress)
        check_bad(data.bad, len(data) + len(data.bad), options.max_bad, source.name)
    embeddings = None
    if text_is_locked:
        task = progress.add_task("Embedding the captions", total=None)
        embeddings = text_encoder(clip, maker.tokenizer)(data.texts)
        progress.remove_task(task)
    return TableRows(data, maker, features, embeddings)


def _text_is_locked(clip: ClipModel, sources: Sequence[Source]) -> bool:
    """Whether the captions can be embedded once for all: those of shards are not known before."""
    names = {name for group in text_groups(clip.model) for name in group}
    trained = any(p.requires_grad for n, p in clip.model.named_parameters() if n in names)
    return not trained and all(isinstance(source.data, Pairs) for source in sources)


def _classes(options: TrainOptions, sources: Sequence[TableRows | Shards]) -> int:
    """How many classes the training's own classifier has: 0 without --label-weight."""
    if not options.label_weight:
        return 0
    labels = [s.pairs.classes for s in sources if isinstance(s, TableRows) and s.pairs.classes]
    if not labels or len(set(labels)) > 1:
        raise DataError("--label-weight needs data with labels, the same classes in every source")
    return len(labels[0])


def _kept(source: Source, opened: TableRows | Shards) -> Source:
    data = opened.pairs if isinstance(opened, TableRows) else opened
    return Source(source.name, data, source.weight)


def describe(name: str, data: Pairs | Shards) -> dict[str, Any]:
    """What training.json says of a source of pairs."""
    about: dict[str, Any] = {"source": name}
    if isinstance(data, Shards):
        names = "\n".join([*data.urls, str(data.samples)])
        digest = hashlib.sha256(names.encode()).hexdigest()
        return about | {"pairs": data.samples, "shards": len(data.urls), "fingerprint": digest}
    return about | {
        "images": len(data),
        "captions": len(data.texts),
        "classes": list(data.classes),
        "bad": count(data.bad),
        "fingerprint": data.fingerprint(),
    }
