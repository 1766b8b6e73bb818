"""The teacher of a distillation: what it says of every picture's views and of every text, kept."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch.utils.data import DataLoader, Dataset

from calibration.metrics import Floats
from calibration.pairs import Pairs
from runtime.errors import DataError, FrameError
from runtime.frames import Frame
from runtime.manifest import ImageSpec
from runtime.tokenizer import Tokenizer

from .augment import Augmentation
from .batches import begin_worker
from .coca import as_clip
from .distill_images import left_out, text_digests
from .embedding_store import Digests, EmbeddingStore
from .evaluate import autocast, normalise, text_encoder
from .fold import folded
from .model import ClipModel, create
from .options import Precision
from .pictures import PictureReader
from .text import text_side
from .views import FIELDS, PLAIN, apply_view, draw_view

BATCH = 32  # views at a time
ROUNDED = 0.01  # by which 16 bits change a length of 1 at most
_OF_TEXT = ("text_cfg", "embed_dim", "custom_text", "quick_gelu")


def open_teacher(name: str) -> ClipModel:
    """A checkpoint folder, or an open_clip model, MODEL or MODEL:TAG; of a CoCa the two towers.
    Raises DataError."""
    if Path(name).expanduser().is_dir():
        clip = create(name)
    else:
        model, _, tag = name.partition(":")
        clip = create(model, tag or None)
    if clip.source == "random weights":
        raise DataError(
            f"--teacher {name}: its weights are random, there is nothing to learn from it; name "
            "them as MODEL:TAG (open_clip's list_pretrained), or give a checkpoint folder"
        )
    return as_clip(clip)


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads pictures as some model is to see their views: `view` names which are drawn how."""

    view: Augmentation  # how strongly views differ, and the shape of their boxes
    spec: ImageSpec
    pictures: PictureReader
    plain: PictureReader

    @classmethod
    def of(cls, view: Augmentation, spec: ImageSpec) -> "Reader":
        """A reader for a model with the input `spec`."""
        changed = Augmentation(spec, view.crop, view.flip, view.rotate, view.jitter)
        return cls(view, spec, PictureReader(changed), PictureReader(Augmentation(spec)))


class Views(NamedTuple):
    """Some views of one picture: their numbers [n], frames uint8 [n, H, W, 3], and what was drawn,
    float32 [n, 9]."""

    picture: int
    numbers: NDArray[np.int64]
    frames: Frame
    drawn: NDArray[np.float32]


class Seen(NamedTuple):
    """Pictures, and what a teacher says of their views: `places` in `store`, int64 [N, V]."""

    pairs: Pairs
    store: EmbeddingStore
    places: NDArray[np.int64]

    @property
    def said(self) -> Floats:
        """The unit embeddings of all views, float32 [N, V, D]."""
        return _unit(self.store, self.places.ravel()).reshape(*self.places.shape, -1)


class _Missing(Dataset[Views | None]):
    """The views to be computed, picture by picture; None for one that cannot be read."""

    def __init__(
        self, files: Sequence[Path], digests: Digests, missing: NDArray[np.bool_],
        numbers: Sequence[int], reader: Reader, seed: int,
    ) -> None:  # fmt: skip
        self._files, self._digests, self._missing = files, digests, missing
        self._numbers, self._reader, self._seed = np.array(numbers), reader, seed
        self._pictures = reader.plain if PLAIN in numbers else reader.pictures
        self._rows = np.flatnonzero(missing.any(axis=1))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, item: int) -> Views | None:
        row = int(self._rows[item])
        numbers = self._numbers[self._missing[row]]
        try:
            stored = self._pictures.file(self._files[row])
        except (FrameError, OSError):
            return None
        frames, drawn = [], []
        for number in numbers.tolist():
            key = self._seed, self._digests[row].tobytes(), number
            size = stored.shape[1], stored.shape[0]
            drawn.append(draw_view(self._reader.view, size, key))
            frames.append(apply_view(stored, drawn[-1], self._reader.spec))
        return Views(row, numbers, np.stack(frames), np.stack(drawn))


class Teacher:
    """A model whose embeddings are computed once, and kept in `folder`.

    What they depend on is in the folders' names, so that another teacher, preprocessing or change
    of the pictures computes them anew: a teacher has a folder for its plain views and one for each
    kind of drawn views; a text tower has one. Within a folder a picture is known by its content, a
    view by its number: what is new is computed, and nothing else. See `EmbeddingStore` for the
    files.
    """

    def __init__(
        self, clip: ClipModel, folder: Path, view: Augmentation, seed: int, workers: int,
        tokenizer: Path | None = None, precision: Precision = "fp32", asked: bool = True,
    ) -> None:  # fmt: skip
        """With `asked` False it takes what is there: another process has asked for all."""
        self._asked = asked
        self.clip, self._seed, self._workers, self._precision = clip, seed, workers, precision
        content, spec = text_side(clip, tokenizer, clip.templates)
        self.tokenizer_json, self.tokenizer = content, Tokenizer(content, spec)
        self.reader = Reader.of(view, clip.image)
        self._width = int(clip.config["embed_dim"])
        image = {
            "weights": _hash_of(clip, image=True),
            "input": msgspec.to_builtins(clip.image),
        }
        drawn = image | {"views": _of_views(view) | {"seed": seed}}
        if precision != "fp32":
            image["precision"] = drawn["precision"] = precision
        text = {
            "weights": _hash_of(clip, image=False),
            "tokenizer": hashlib.sha256(content + repr(spec).encode()).hexdigest(),
        }
        self.plain = self._store(folder, "plain", image, len(FIELDS))
        self.drawn = self._store(folder, "views", drawn, len(FIELDS))
        self._texts = self._store(folder, "texts", text, 0)

    @property
    def _device(self) -> torch.device:
        found: torch.device = self.clip.model.logit_scale.device
        return found

    def _store(self, folder: Path, kind: str, what: dict[str, Any], about: int) -> EmbeddingStore:
        key = hashlib.sha256(msgspec.json.encode(what)).hexdigest()[:16]
        what = {"kind": kind, "columns": list(FIELDS[:about]), **what}
        notes = {"teacher": self.clip.name}
        return EmbeddingStore(folder / f"{kind}-{key}", self._width, about, what, notes)

    def see(
        self, pairs: Pairs, digests: Digests, numbers: Sequence[int], progress: Progress
    ) -> Seen:
        """What it says of the pictures' views of these numbers: the plain one, or drawn ones. What
        is not kept is computed. Pictures that cannot be read are left out, and listed in `bad`.

        Raises DataError where no picture can be read, or the disk is full.
        """
        store = self.plain if PLAIN in numbers else self.drawn
        places = store.find(digests, numbers)
        if self._asked and (places < 0).any():
            self._compute(store, pairs.files, digests, numbers, progress)
            places = store.find(digests, numbers)
        good = np.flatnonzero((places >= 0).all(axis=1))
        if not len(good):
            raise DataError(f"none of the {len(pairs)} pictures can be read")
        return Seen(left_out(pairs, good.tolist(), "unreadable picture"), store, places[good])

    def _compute(
        self,
        store: EmbeddingStore,
        files: Sequence[Path],
        digests: Digests,
        numbers: Sequence[int],
        progress: Progress,
    ) -> None:
        task = progress.add_task("The teacher looks at the pictures", total=None)
        encode = self._encoder()
        # Equal pictures are one: only the first of them is computed.
        _, first = np.unique(digests, axis=0, return_index=True)
        with store.writing() as writer:  # nobody else writes: what is missing now, stays so
            missing = store.find(digests, numbers) < 0
            missing &= np.isin(np.arange(len(missing)), first)[:, None]
            progress.update(task, total=int(missing.sum()))
            views = _Missing(files, digests, missing, numbers, self.reader, self._seed)
            for batch in _batches(views, self._workers):
                frames = np.concatenate([own.frames for own in batch])
                rows = [own.picture for own in batch for _ in own.numbers]
                own_numbers = np.concatenate([own.numbers for own in batch])
                drawn = np.concatenate([own.drawn for own in batch])
                writer.add(digests[rows], own_numbers, drawn, encode(frames))
                progress.advance(task, len(frames))
        progress.remove_task(task)

    def _encoder(self) -> Any:
        """The image tower as a function from frames uint8 [n, H, W, 3] to float32 [n, D]; batch
        normalisation is folded where that leaves the embeddings as they are."""
        spec, visual = self.clip.image, self.clip.model.visual.eval()
        pixels = torch.rand(2, 3, spec.height, spec.width, device=self._device)
        fast = folded(visual, pixels)
        with torch.inference_mode():
            same = torch.allclose(fast(pixels), visual(pixels), rtol=1e-3, atol=1e-3)
        tower = fast if same else visual

        @torch.inference_mode()
        def encode(frames: Frame) -> Floats:
            pixels = normalise(torch.from_numpy(frames).to(self._device), spec)
            with autocast(self._device, self._precision):
                found = tower(pixels)
            return np.asarray(torch.nn.functional.normalize(found.float(), dim=-1).cpu().numpy())

        return encode

    def read(self, texts: Sequence[str]) -> Floats:
        """The unit embeddings of texts, float32 [T, D]; what is not there is computed."""
        if not texts:
            return np.empty((0, self._width), np.float32)
        digests = text_digests(texts)
        places = self._texts.find(digests, [0])[:, 0]
        missing = np.flatnonzero(places < 0)
        if len(missing):
            _, first = np.unique(digests[missing], axis=0, return_index=True)
            missing = missing[first]
            encode = text_encoder(self.clip, self.tokenizer)
            with self._texts.writing() as store:
                for start in range(0, len(missing), 1024):
                    rows = missing[start : start + 1024]
                    found = encode([texts[i] for i in rows])
                    none = np.empty((len(rows), 0), np.float32)
                    store.add(digests[rows], np.zeros(len(rows), np.int64), none, found)
            places = self._texts.find(digests, [0])[:, 0]
        return _unit(self._texts, places)


def _unit(store: EmbeddingStore, places: NDArray[np.int64]) -> Floats:
    """Rows that 16 bits have rounded, of length 1 again. Raises DataError where one was none."""
    rows = store.rows(places)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (abs(lengths - 1) < ROUNDED).all():
        raise DataError(f"{store.folder} is damaged: it has rows that are no embeddings; delete it")
    return np.asarray(rows / lengths, np.float32)


def _batches(views: _Missing, workers: int) -> Iterator[list[Views]]:
    """The views of as many pictures as make a batch; what cannot be read is not among them."""
    loader = DataLoader(
        views,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=begin_worker,
    )
    batch: list[Views] = []
    for own in loader:
        if own is not None:
            batch.append(own)
        if sum(len(v.numbers) for v in batch) >= BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _as_it_is(item: Any) -> Any:
    return item


def _of_views(view: Augmentation) -> dict[str, Any]:
    """What the drawing of views depends on: of the model that they are for, the shape alone."""
    shape = view.spec.width / view.spec.height
    strength = {name: getattr(view, name) for name in ("crop", "flip", "rotate", "jitter")}
    return {**strength, "fit": view.spec.fit, "shape": round(shape, 6)}


def _hash_of(clip: ClipModel, image: bool) -> str:
    """SHA-256 of one tower's weights, and of the configuration that says how they are used."""
    digest = hashlib.sha256()
    for name, tensor in sorted(clip.model.state_dict().items()):
        if name.startswith("visual.") == image and not name.startswith("logit_"):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    names = ("vision_cfg", "embed_dim", "quick_gelu") if image else _OF_TEXT
    digest.update(repr([clip.config.get(name) for name in names]).encode())
    return digest.hexdigest()
