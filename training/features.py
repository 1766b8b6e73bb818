"""Locked towers run once: their features, computed before the training and kept on disk.

The image tower is cut behind its locked part. What comes out there is kept for every picture (for
several augmented views, if asked); each step then runs only the rest.
"""

import contextlib
import copy
import dataclasses
import hashlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from calibration.pairs import Bad, Pairs
from runtime.errors import DataError, FrameError
from runtime.frames import Frame

from .batches import begin_worker
from .evaluate import normalise
from .fold import folded
from .model import ClipModel
from .pictures import PictureReader

BATCH = 32


@dataclass(frozen=True, eq=False)
class Cut:
    """An image tower in two: `stem(pixels)` gives features, `rest(features)` the embeddings.

    `rest` shares the tower's own trainable weights; `fast` is the tower for inference alone.
    """

    tower: nn.Module
    last: str
    rest: nn.Module
    fast: nn.Module

    def stem(self, pixels: Tensor) -> Tensor:
        """The features [N, ...] of pixels [N, 3, H, W]."""
        hook = self.fast.get_submodule(self.last).register_forward_hook(_stop)
        try:
            self.fast(pixels)
        except _Reached as reached:
            return reached.output
        finally:
            hook.remove()
        raise AssertionError(f"{self.last!r} did not run")


class _Reached(Exception):
    """Ends a forward pass behind the last layer that is wanted."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


def _stop(_: nn.Module, __: Any, output: Tensor) -> None:
    raise _Reached(output)


def cut(clip: ClipModel) -> Cut | None:
    """Cuts the image tower behind its locked part; None where nothing is locked, or where the
    tower is no plain chain of layers (a partly unlocked ViT), so that it cannot be cut."""
    tower: nn.Module = clip.model.visual
    path = _last_locked(tower)
    if path is None:
        return None
    tower.eval()
    device = next(tower.parameters()).device
    pixels = torch.rand(2, 3, clip.image.height, clip.image.width, device=device)
    rest = _without(tower, path)
    for fast in (folded(tower, pixels), tower):
        found = Cut(tower, path, rest, fast)
        if _agrees(found, pixels):
            return found
    return None


@torch.inference_mode()
def _agrees(where: Cut, pixels: Tensor) -> bool:
    expected = where.tower(pixels)
    try:
        found = where.rest(where.stem(pixels))
    except Exception:  # whatever a tower that is no chain makes of the wrong shape
        return False
    return found.shape == expected.shape and torch.allclose(
        found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
    )


def _last_locked(tower: nn.Module) -> str | None:
    """The path of the last module of the tower's locked beginning ("" is the tower itself)."""
    last = None
    for path, module in _chain(tower, ""):
        if any(p.requires_grad for p in module.parameters()):
            break
        if next(module.parameters(), None) is not None or last is not None:
            last = path
    return last


def _chain(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The module's parts in their order: as large as they are all locked or all trained."""
    kinds = {p.requires_grad for p in module.parameters()}
    if len(kinds) < 2 or not list(module.children()):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _chain(child, f"{path}.{name}" if path else name)


def _without(module: nn.Module, last: str) -> nn.Module:
    """The module with everything up to `last` passing its input on; the rest is shared."""
    if not last:
        return nn.Identity()
    head, _, tail = last.partition(".")
    other = copy.copy(module)
    other._modules = dict(module._modules)
    for name, child in module._modules.items():
        assert child is not None
        other._modules[name] = _without(child, tail) if name == head else nn.Identity()
        if name == head:
            break
    return other


class _Views(Dataset[Frame | DataError | None]):
    """Every picture's views, uint8 [V, H, W, 3]; None for one that cannot be read."""

    def __init__(self, pairs: Pairs, reader: PictureReader, views: int, seed: int) -> None:
        self._pairs, self._reader, self._views, self._seed = pairs, reader, views, seed

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, row: int) -> Frame | DataError | None:
        try:
            stored = self._reader.file(self._pairs.files[row])
            self._reader.flush()
        except (FrameError, OSError):
            return None
        except DataError as error:
            return error  # raised here it would come from a worker with a traceback for its message
        captions = " ".join(self._pairs.texts[c] for c in self._pairs.captions[row])
        seeds = (np.random.default_rng((self._seed, row, view)) for view in range(self._views))
        change = self._reader.augmentation.apply
        return np.stack([change(stored, int(rng.integers(2**62)), captions) for rng in seeds])


@dataclass(frozen=True)
class FeatureStore:
    """Computes features, and keeps them in a folder under what they were computed from.

    With one view the pictures are as the runtime will see them; with more, each is changed at
    random by the reader's augmentation.
    """

    folder: Path
    reader: PictureReader
    views: int
    seed: int
    workers: int

    def images(
        self, clip: ClipModel, where: Cut, pairs: Pairs, progress: Progress
    ) -> tuple[Pairs, NDArray[np.float16]]:
        """The features of every picture that can be read, float16 [N, views, ...], and its pairs.

        Raises DataError where none can be read, or where the disk is full.
        """
        file = self.folder / f"features-{self._key(clip, where, pairs)}"
        rows, values = file.with_suffix(".rows.npy"), file.with_suffix(".npy")
        try:
            if not _whole(rows, values) or self._may_be_read(pairs, rows):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._compute(clip, where, pairs, values, rows, progress)
            good = np.load(rows, allow_pickle=False).tolist()
            features = np.load(values, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise DataError(f"the features cannot be kept in {self.folder}: {error}") from error
        left_out = set(range(len(pairs))) - set(good)
        bad = tuple(Bad(str(pairs.files[i]), "unreadable picture") for i in sorted(left_out))
        kept = dataclasses.replace(pairs.keep(good), bad=pairs.bad + bad)
        return kept, features[: len(good)]

    def _may_be_read(self, pairs: Pairs, rows: Path) -> bool:
        """Whether any of the pictures that could not be read before can be read by now."""
        for row in set(range(len(pairs))) - set(np.load(rows, allow_pickle=False).tolist()):
            with contextlib.suppress(FrameError, OSError):
                self.reader.file(pairs.files[row])
                return True
        return False

    def _compute(
        self, clip: ClipModel, where: Cut, pairs: Pairs, values: Path, rows: Path, bar: Progress
    ) -> None:
        task = bar.add_task("Features of the locked layers", total=len(pairs))
        good: list[int] = []
        with _beside(values) as beside:
            made: Any = None
            for first, batch in self._batches(pairs):
                own = {first + i: views for i, views in enumerate(batch) if views is not None}
                if own:
                    found = _run(clip, where, np.stack(list(own.values())))
                    if made is None:
                        made = _allocate(beside, (len(pairs), *found.shape[1:]))
                    made[len(good) : len(good) + len(own)] = found
                good += own
                bar.advance(task, len(batch))
            if made is None:
                raise DataError(f"none of the {len(pairs)} pictures could be read")
            made.flush()
        with _beside(rows) as beside, beside.open("wb") as stream:
            np.save(stream, np.array(good))
        bar.remove_task(task)

    def _batches(self, pairs: Pairs) -> Iterator[tuple[int, list[Frame | None]]]:
        """Some pictures' views at a time, and the row of the first."""
        views = _Views(pairs, self.reader, self.views, self.seed)
        loader = DataLoader(
            views,
            batch_size=BATCH,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            worker_init_fn=begin_worker,
        )
        for number, batch in enumerate(loader):
            for item in batch:
                if isinstance(item, DataError):
                    raise item
            yield number * BATCH, batch

    def _key(self, clip: ClipModel, where: Cut, pairs: Pairs) -> str:
        """What features depend on: the pictures, how they are changed, and the tower."""
        digest = hashlib.sha256()
        for path, captions in zip(pairs.files, pairs.captions, strict=True):
            texts = [pairs.texts[c] for c in captions]
            digest.update(repr((os.path.abspath(path), _state(path), texts)).encode())
        for name, tensor in where.tower.state_dict().items():
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        model = clip.config["vision_cfg"], clip.config.get("quick_gelu"), clip.image, where.last
        digest.update(repr((model, self.reader.augmentation, self.views, self.seed)).encode())
        return digest.hexdigest()[:16]


def _state(path: Path) -> tuple[int, int] | None:
    """What changes when a file does."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _whole(*files: Path) -> bool:
    """Whether all these arrays are there, to their last byte."""
    try:
        for file in files:
            np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return False
    return True


@torch.inference_mode()
def _run(clip: ClipModel, where: Cut, frames: Frame) -> NDArray[np.float16]:
    """Features float16 [N, V, ...] of frames [N, V, H, W, 3]. Raises DataError if one overflows."""
    flat = torch.from_numpy(frames.reshape(-1, *frames.shape[2:]))
    pixels = normalise(flat.to(next(where.tower.parameters()).device), clip.image)
    found = where.stem(pixels).half().cpu()
    if not torch.isfinite(found).all():
        raise DataError("a locked layer's features do not fit 16 bits: train without --lock-image")
    return np.asarray(found.reshape(*frames.shape[:2], *found.shape[1:]).numpy())


def _allocate(file: Path, shape: tuple[int, ...]) -> Any:
    """An array in a file whose space is reserved: a full disk is an error at once, not a crash."""
    made = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=shape)
    if hasattr(os, "posix_fallocate"):  # not on a Mac
        with file.open("r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
    return made


@contextlib.contextmanager
def _beside(file: Path) -> Iterator[Path]:
    """A new file that takes the place of `file` when the block succeeds, and else goes."""
    beside = file.with_name(f".{secrets.token_hex(4)}-{file.name}")  # other machines write too
    try:
        yield beside
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def _as_it_is(batch: list[Frame | None]) -> list[Frame | None]:
    return batch
