"""Pictures decoded once, through the runtime's own preprocessing, into one array on disk."""

import dataclasses
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.progress import Progress

from runtime.errors import DataError, FrameError
from runtime.frames import Frame
from runtime.manifest import ImageSpec
from runtime.preprocess import preprocess

from .data import Pairs


def decode(
    pairs: Pairs, spec: ImageSpec, scratch: Path, progress: Progress, strict: bool = False
) -> tuple[Pairs, Frame]:
    """Decodes every picture; returns the pairs whose picture could be read, and uint8 RGB
    [N, H, W, 3] in their order, held in an unnamed file in the folder `scratch`.

    Every epoch then reads pixels at memory speed, whatever the pictures' size was. A picture that
    cannot be read is skipped and counted; with `strict`, or where none is left, DataError.
    """
    frames = _allocate((len(pairs), spec.height, spec.width, 3), scratch)
    good: list[int] = []
    skipped = dict(pairs.skipped)
    task = progress.add_task("Decoding pictures", total=len(pairs))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow lets go of the interpreter lock
        results = pool.map(lambda path: _try(path, spec), pairs.files)
        for row, result in enumerate(results):
            if isinstance(result, FrameError):
                if strict:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise DataError(f"{result} (--strict)") from result
                skipped["unreadable picture"] = skipped.get("unreadable picture", 0) + 1
            else:
                frames[len(good)] = result
                good.append(row)
            progress.advance(task)
    progress.remove_task(task)
    if not good:
        reason = _try(pairs.files[0], spec)
        raise DataError(f"none of the {len(pairs)} pictures could be read: {reason}")
    return dataclasses.replace(pairs.keep(good), skipped=skipped), frames[: len(good)]


def _try(path: Path, spec: ImageSpec) -> Frame | FrameError:
    try:
        return preprocess(path, spec)
    except FrameError as error:
        return error


def _allocate(shape: tuple[int, ...], scratch: Path) -> Frame:
    """An array in an unnamed file, whose space is reserved: a full disk is an error at once."""
    size = int(np.prod(shape, dtype=np.int64))
    with tempfile.TemporaryFile(dir=scratch) as stream:
        try:
            os.posix_fallocate(stream.fileno(), 0, size)
        except OSError as error:
            raise DataError(
                f"no room for {size / 2**20:.0f} MiB of decoded pictures in {scratch}: {error}"
            ) from error
        return np.memmap(stream, dtype=np.uint8, mode="r+", shape=shape)
