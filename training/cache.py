"""Resized pictures on disk, so that each is decoded once: an LMDB database of raw pixels.

Any number of processes read and write it at once, on one machine. A process that is killed loses
what it had not committed, and nothing else.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from weakref import WeakValueDictionary

import lmdb
import numpy as np

from runtime.errors import DataError
from runtime.frames import Frame

ADDRESS_SPACE = 1 << 40  # room in the address space, not on the disk: the file grows as it fills
_environments: WeakValueDictionary[tuple[int, Path], lmdb.Environment] = WeakValueDictionary()
"""The open databases: a process may open each but once, and not use one that it inherited."""


class FrameCache:
    """uint8 RGB frames of any size by key. Each process that it is handed to opens the file by
    itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._environment: lmdb.Environment | None = None
        self._process = 0

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "_environment": None, "_process": 0}

    def get(self, key: bytes) -> Frame | None:
        """The frame [H, W, 3], or None."""
        try:
            with self._open().begin(buffers=True) as transaction:
                value = transaction.get(key)
                if value is None:
                    return None
                height, width = np.frombuffer(value, np.uint32, 2).tolist()
                return np.frombuffer(value, np.uint8, offset=8).reshape(height, width, 3).copy()
        except (lmdb.Error, ValueError) as error:
            raise DataError(
                f"--cache {self.folder} cannot be read: {error}; delete it, and it is made anew"
            ) from error

    def put(self, frames: Mapping[bytes, Frame]) -> None:
        """Adds frames, all or none. Raises DataError where the disk is full."""
        if not frames:
            return
        try:
            with self._open().begin(write=True) as transaction:
                for key, frame in frames.items():
                    size = np.array(frame.shape[:2], np.uint32).tobytes()
                    transaction.put(key, size + frame.tobytes())
        except lmdb.Error as error:
            raise DataError(f"--cache {self.folder} cannot be written: {error}") from error

    def _open(self) -> lmdb.Environment:
        if self._environment is None or self._process != os.getpid():
            if self._environment:
                self._environment.close()  # this process's copy: it was forked
            self._process = os.getpid()
            self._environment = _opened(self.folder)
        return self._environment


def _opened(folder: Path) -> lmdb.Environment:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = os.getpid(), folder.resolve()
        environment = _environments.get(place)
        if environment is None:
            environment = _environments[place] = lmdb.open(
                str(folder),
                map_size=ADDRESS_SPACE,
                sync=False,  # after a power cut the pictures can be decoded again
                readahead=False,
                max_readers=1024,
            )
        return environment
    except (lmdb.Error, OSError) as error:
        raise DataError(f"--cache {folder} cannot be opened: {error}") from error


def key_of(*parts: object) -> bytes:
    """A key for what a frame was made from: file, size, time, and how it was reduced."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
