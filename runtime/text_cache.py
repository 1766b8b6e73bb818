"""Text embeddings that this machine has computed before: for known labels the text encoder need
not be opened at all.

A row is found by the SHA-256 of all that it depends on: the text encoder's file and its backend,
the tokenizer's file, how texts become tokens, and the text. It is kept in memory for the process,
and in a file for the machine, both bounded: what was not used for longest goes first. The texts
themselves are not kept.
"""

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from .cache_folder import cache_folder
from .manifest import Manifest

if TYPE_CHECKING:
    from .row_file import RowFile

NAME = "texts-1.sqlite"  # another number for another table
IN_MEMORY = 16 << 20  # bytes
TOKENIZER = 1  # the version of tokenizer.py: another number where it gives texts other tokens
DAY = 24 * 3600  # seconds; that a row was used is written once a day, to spare flash memory

_HOMELESS = (
    "text embeddings are not kept for the next start: there is no home folder; name a folder by "
    "EDGECLIP_CACHE"
)

Rows = NDArray[np.float32]


class TextCache:
    """Unit rows of texts, in memory and in the file `path`. Safe for threads and processes.

    Where the file cannot be used, or there is no folder for it (None), `problem` says why and how
    to mend it; memory is used all the same.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.problem: str | None = None if path else _HOMELESS
        self._readable = self._writable = path is not None
        self._memory: OrderedDict[bytes, Rows] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def embed(
        self,
        texts: Sequence[str],
        made_by: bytes,
        dim: int,
        embed_anew: Callable[[Sequence[str]], Rows],
    ) -> Rows:
        """The unit rows of texts, float32 [N, D]. Those that are not known are made by
        `embed_anew`, each distinct text once, and kept. `made_by` is `maker_of` the bundle."""
        keys = [hashlib.sha256(made_by + _bytes_of(text)).digest() for text in texts]
        found = self._remembered(keys)
        from_file = self._read([key for key in dict.fromkeys(keys) if key not in found], dim)
        found |= from_file
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in found}
        made = dict(zip(new, embed_anew(list(new.values())), strict=True)) if new else {}
        sound = {key: row for key, row in made.items() if _is_unit(row)}
        self._write(sound)
        self._remember(from_file | sound)
        found |= made
        return np.stack([found[key] for key in keys]) if keys else np.empty((0, dim), np.float32)

    def _remembered(self, keys: Sequence[bytes]) -> dict[bytes, Rows]:
        with self._lock:
            found = {key: self._memory[key] for key in keys if key in self._memory}
            for key in found:
                self._memory.move_to_end(key)
        return found

    def _remember(self, rows: Mapping[bytes, Rows]) -> None:
        with self._lock:
            for key, row in rows.items():
                if key not in self._memory:
                    self._memory[key] = row.copy()  # not a view, which would keep its whole batch
                    self._bytes += row.nbytes
            while self._bytes > IN_MEMORY:
                self._bytes -= self._memory.popitem(last=False)[1].nbytes

    def _read(self, keys: Sequence[bytes], dim: int) -> dict[bytes, Rows]:
        """What the file has of these; what is not a unit row of this length counts as missing."""
        if not keys or not self._readable:
            return {}
        try:
            held = self._file().read(keys)
        except Exception as error:  # SQLite's, the system's, or that Python was built without it
            self._readable = self._writable = False
            self._explain(error)
            return {}
        rows = {
            key: np.frombuffer(content, np.float32)
            for key, (content, _) in held.items()
            if len(content) == 4 * dim
        }
        now = int(time.time())
        if stale := [key for key in rows if held[key][1] < now - DAY]:
            self._change(lambda file: file.touch(stale, now))
        return {key: row for key, row in rows.items() if _is_unit(row)}

    def _write(self, rows: Mapping[bytes, Rows]) -> None:
        content = {key: row.astype(np.float32).tobytes() for key, row in rows.items()}
        if content:
            self._change(lambda file: file.write(content, int(time.time())))

    def _change(self, change: Callable[["RowFile"], None]) -> None:
        if not self._writable:
            return
        try:
            change(self._file())
        except Exception as error:  # as above; the file may also be one to read only
            self._writable = False
            self._explain(error)

    def _file(self) -> "RowFile":
        from .row_file import RowFile

        assert self.path is not None
        return RowFile(self.path)

    def _explain(self, error: Exception) -> None:
        mend = "delete it, or name another folder by EDGECLIP_CACHE"
        if "locked" in str(error):  # SQLite's codes are to be had from Python 3.11 only
            mend = "another process holds it: it is asked again at the next start"
        self.problem = (
            f"text embeddings are not kept for the next start: {self.path} cannot be used "
            f"({error}); {mend}"
        )


def machine_cache() -> TextCache:
    """The cache of this machine: one for all classifiers of the process."""
    try:
        return _at(cache_folder() / NAME)
    except RuntimeError:  # pathlib's
        return _at(None)


def maker_of(manifest: Manifest, text_file: str, backend: str) -> bytes:
    """The hash of what turns a text into its embedding: the text encoder's file of this name, the
    backend, the tokenizer's file and code, and the manifest's `text` but for its templates, which
    are in the texts."""
    spec = msgspec.structs.replace(manifest.text, templates=("{}",))
    files = [manifest.files[name].sha256 for name in (text_file, manifest.tokenizer)]
    return hashlib.sha256(msgspec.json.encode([*files, backend, TOKENIZER, spec])).digest()


@cache
def _at(path: Path | None) -> TextCache:
    return TextCache(path)


def _is_unit(row: Rows) -> bool:
    return bool(abs(np.linalg.norm(row) - 1) < 1e-3)  # neither is nan


def _bytes_of(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
