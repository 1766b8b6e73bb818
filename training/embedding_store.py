"""Embeddings on disk, each computed once: shards of plain arrays with a manifest.

    folder/manifest.json         what the rows are of, and the shards that are whole
    folder/00000.rows.npy        float16 [n, D], unit rows
    folder/00000.index.npy       [n] of (digest 16 bytes, number uint32, about float32 [P])

A row is of a thing (a picture or text, by the digest of its content) and a number (of the view).
A shard is written beside, renamed, and then listed: whatever kills the process, what is listed is
whole, and what was lost is at most what came after it. When the writing ends neighbouring shards
become one, for each that is mapped holds a file open.
"""

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from runtime.errors import DataError

MANIFEST, LOCK = "manifest.json", ".lock"
FORMAT = 1
SHARD = 8192  # rows at most, as they are written
MERGED = 131072  # rows at most, in the end
WHOLE = 1 << 20  # bytes: smaller files are read, not mapped
SECONDS = 30.0  # a shard is also written after so long
DIGEST = 16  # bytes
Digests = NDArray[np.uint8]
Rows = NDArray[np.float16]


class EmbeddingStore:
    """The rows of width `width` in a folder, each with `about` numbers beside it.

    `what` says in words and hashes what they were computed by; it goes into the manifest. Where the
    folder holds something else, DataError is raised: name it by the hash of what matters. `notes`
    are for people who read the manifest.
    """

    def __init__(
        self,
        folder: Path,
        width: int,
        about: int,
        what: Mapping[str, Any],
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.width, self._notes = folder, width, dict(notes or {})
        own = {"format": FORMAT, "width": width, "about": about, **what}
        self._what = json.loads(json.dumps(own))  # as it is read back: tuples are lists
        self._type = np.dtype(
            [("digest", "u1", (DIGEST,)), ("number", "<u4"), ("about", "<f4", (about,))]
        )
        self._shards: list[dict[str, Any]] = []
        self._read()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_rows", "_index")}

    def __setstate__(self, state: dict[str, Any]) -> None:  # a worker maps the files by itself
        vars(self).update(state)
        self._read()  # shards may have been merged: places stay

    def find(self, digests: Digests, numbers: Sequence[int]) -> NDArray[np.int64]:
        """The row of each thing [N] in each number [V]: int64 [N, V], -1 where there is none."""
        keys = _keys(digests, numbers)
        if not len(self):
            return np.full(keys.shape, -1)
        own = np.concatenate([_keys(i["digest"], i["number"][:, None]) for i in self._index])
        own = own.ravel()
        order = np.argsort(own, kind="stable")
        place = np.searchsorted(own, keys, sorter=order).clip(max=len(own) - 1)
        found = order[place]
        return np.where(own[found] == keys, found, -1)

    def row(self, place: int) -> tuple[Rows, NDArray[np.float32]]:
        """One embedding float16 [D] and its numbers float32 [P], by what `find` gave."""
        shard = int(np.searchsorted(self._starts, place, side="right")) - 1
        at = place - int(self._starts[shard])
        return self._rows[shard][at], self._index[shard]["about"][at]

    def rows(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        """Embeddings float32 [n, D] of places [n]."""
        made = np.empty((len(places), self.width), np.float32)
        shards = np.searchsorted(self._starts, places, side="right") - 1
        for shard in np.unique(shards):
            own = shards == shard
            made[own] = self._rows[shard][places[own] - self._starts[shard]]
        return made

    @contextmanager
    def writing(self) -> Iterator["Writer"]:
        """Adds rows; they can be found when the block ends. One process at a time: raises DataError
        where another one is writing, or where the disk is full."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise DataError(f"another process is writing to {self.folder}") from error
            self._read()
            writer = Writer(self)
            try:
                yield writer
            finally:
                writer.flush()
                self._read()
            self._merge()

    def write(self, index: NDArray[Any], rows: Rows) -> None:
        """Writes one shard, then the manifest that lists it."""
        self._list([*self._shards, self._saved(index, rows)])

    def _saved(self, index: NDArray[Any], rows: Rows) -> dict[str, Any]:
        """Writes the files of a shard; what the manifest will say of it."""
        made = {"name": f"{self._next:05d}", "rows": len(rows)}
        self._next += 1
        with self._kept():
            for kind, values in (("rows", rows), ("index", index)):
                _save(self._file(made, kind), values)
        return made

    def _list(self, shards: list[dict[str, Any]]) -> None:
        """Writes the manifest."""
        text = json.dumps({**self._notes, **self._what, "shards": shards}, indent=1)
        with self._kept(), _beside(self.folder / MANIFEST) as stream:
            stream.write(text.encode() + b"\n")
        self._shards = shards

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"embeddings cannot be kept in {self.folder}: {error}") from error

    def _merge(self) -> None:
        """Makes one of neighbouring shards, up to `MERGED` rows; places stay as they are."""
        groups = _groups([shard["rows"] for shard in self._shards])
        if len(groups) == len(self._shards):
            return
        shards = [
            self._shards[own[0]]
            if len(own) == 1
            else self._saved(
                np.concatenate([self._index[n] for n in own]),
                np.concatenate([self._rows[n] for n in own]),
            )
            for own in groups
        ]
        old = [shard for shard in self._shards if shard not in shards]
        self._list(shards)
        self._open()
        for shard in old:
            for kind in ("rows", "index"):
                self._file(shard, kind).unlink(missing_ok=True)

    def _file(self, shard: Mapping[str, Any], kind: str) -> Path:
        return self.folder / f"{shard['name']}.{kind}.npy"

    def entries(
        self, digests: Digests, numbers: NDArray[np.integer], about: NDArray[np.float32]
    ) -> NDArray[Any]:
        """The index of new rows."""
        made = np.empty(len(digests), self._type)
        made["digest"], made["number"], made["about"] = digests, numbers, about
        return made

    def _read(self) -> None:
        """Opens what is listed; again where another process has merged it in between."""
        while True:
            self._shards = self._listed()
            try:
                return self._open()
            except FileNotFoundError as error:
                if self._listed() == self._shards:
                    raise _damaged(Path(error.filename), error) from error

    def _listed(self) -> list[dict[str, Any]]:
        file = self.folder / MANIFEST
        if not file.exists():
            return []
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            shards = [{"name": str(s["name"]), "rows": int(s["rows"])} for s in content["shards"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(file, error) from error
        different = [k for k, v in self._what.items() if content.get(k) != v]
        if different:
            raise DataError(f"{self.folder} holds other embeddings ({', '.join(different)} differ)")
        return shards

    def _open(self) -> None:
        self._rows: list[Rows] = []
        self._index: list[NDArray[Any]] = []
        for shard in self._shards:
            for kind, into, shape, dtype in (
                ("rows", self._rows, (shard["rows"], self.width), np.dtype(np.float16)),
                ("index", self._index, (shard["rows"],), self._type),
            ):
                into.append(_mapped(self._file(shard, kind), shape, dtype))
        self._next = max((int(shard["name"]) for shard in self._shards), default=-1) + 1
        self._starts = np.cumsum([0, *(shard["rows"] for shard in self._shards)])


class Writer:
    """Collects rows, and writes them shard by shard."""

    def __init__(self, store: EmbeddingStore) -> None:
        self._store = store
        self._index: list[NDArray[Any]] = []
        self._rows: list[Rows] = []
        self._since = time.monotonic()

    def add(
        self,
        digests: Digests,
        numbers: NDArray[np.integer],
        about: NDArray[np.float32],
        rows: NDArray[np.floating],
    ) -> None:
        """Takes in rows [n, D] of things (digests uint8 [n, 16]), numbers [n] and about [n, P].

        Raises DataError where one does not fit 16 bits.
        """
        with np.errstate(over="ignore"):
            small = rows.astype(np.float16)
        if not np.isfinite(small).all():
            raise DataError("the teacher gives embeddings that are not finite, or too large")
        self._index.append(self._store.entries(digests, numbers, about))
        self._rows.append(small)
        waited = time.monotonic() - self._since
        if sum(map(len, self._rows)) >= SHARD or waited > SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what there is, as a shard."""
        if self._rows:
            self._store.write(np.concatenate(self._index), np.concatenate(self._rows))
        self._index, self._rows, self._since = [], [], time.monotonic()


def _groups(sizes: Sequence[int]) -> list[list[int]]:
    """The numbers of neighbours that are at most `MERGED` together."""
    groups: list[list[int]] = []
    total = 0
    for number, size in enumerate(sizes):
        total += size
        if not groups or total > MERGED:
            groups.append([])
            total = size
        groups[-1].append(number)
    return groups


def _keys(digests: Digests, numbers: Any) -> NDArray[Any]:
    """Digest and number of each thing as one value that sorts: void20 [N, V]."""
    own = np.broadcast_to(np.asarray(numbers, np.uint32), (len(digests), np.shape(numbers)[-1]))
    made = np.empty((*own.shape, DIGEST + 4), np.uint8)
    made[..., :DIGEST] = digests[:, None]
    made[..., DIGEST:] = own[..., None].astype("<u4").view(np.uint8)
    return made.view(f"S{DIGEST + 4}")[..., 0]


def _save(file: Path, values: NDArray[Any]) -> None:
    with _beside(file) as stream:
        np.save(stream, values, allow_pickle=False)


@contextmanager
def _beside(file: Path) -> Iterator[BinaryIO]:
    """Writes beside `file`; it is replaced when all is on the disk."""
    beside = file.with_name(f".{file.name}")
    with beside.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(file)


def _damaged(file: Path, why: Exception) -> DataError:
    return DataError(f"{file} is damaged: {why}; delete its folder")


def _mapped(file: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    try:
        mode: Literal["r"] | None = None if file.stat().st_size < WHOLE else "r"
        found: NDArray[Any] = np.load(file, mmap_mode=mode, allow_pickle=False)
        if found.shape != shape:
            raise ValueError(f"its shape is {found.shape}, not {shape}")
        if found.dtype != dtype:
            raise ValueError(f"its type is {found.dtype}, not {dtype}")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise DataError(f"{file}: too many open files; raise that limit: ulimit -n") from error
        raise _damaged(file, error) from error
    return np.asarray(found)  # a plain array over the same pages: rows are taken faster
