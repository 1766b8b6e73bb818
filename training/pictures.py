"""A training picture: decoded, reduced, kept in the cache, and changed at random."""

import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from runtime.frames import Frame, read_picture

from .augment import Augmentation
from .cache import FrameCache, key_of


@dataclass
class PictureReader:
    """Reads pictures as the augmentation stores them; from the cache, where there is one.

    New ones go into the cache in batches, by `flush`.
    """

    augmentation: Augmentation
    cache: FrameCache | None = None
    _new: dict[bytes, Frame] = field(default_factory=dict)

    def file(self, path: Path) -> Frame:
        """A picture file, uint8 RGB [h, w, 3]. Raises FrameError."""
        if self.cache is None:
            return self._reduce(path)
        stat = path.stat()
        return self._cached(
            lambda: self._reduce(path), os.path.realpath(path), stat.st_size, stat.st_mtime_ns
        )

    def member(self, content: bytes) -> Frame:
        """A picture from a shard, by its bytes. Raises FrameError."""
        if self.cache is None:
            return self._reduce(io.BytesIO(content))
        digest = hashlib.blake2b(content).digest()
        return self._cached(lambda: self._reduce(io.BytesIO(content)), digest)

    def flush(self) -> None:
        """Writes to the cache what was decoded since the last time."""
        if self.cache:
            self.cache.put(self._new)
            self._new.clear()

    def _cached(self, decode: Callable[[], Frame], *key: object) -> Frame:
        assert self.cache
        name = key_of(*key, self.augmentation.side, self.augmentation.spec)
        frame = self.cache.get(name)
        if frame is None:
            frame = self._new[name] = decode()
        return frame

    def _reduce(self, source: Path | io.BytesIO) -> Frame:
        return self.augmentation.store(read_picture(source, self.augmentation.side))
