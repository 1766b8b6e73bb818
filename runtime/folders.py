"""Folders that appear whole or not at all: written beside the target, then renamed."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import DataError


def check_target(target: Path, marker: str, overwrite: bool) -> None:
    """Raises DataError where `target` exists and holds something that must not be lost.

    With `overwrite` it may be replaced, but only if it holds the file `marker`, that is, if it is
    a folder of the same kind.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise DataError(f"{target} is a file; name a folder that does not exist yet")
    if not overwrite:
        raise DataError(f"{target} exists already; name another folder, or replace it with --force")
    if not (target / marker).is_file():
        raise DataError(
            f"{target} is not replaced, even with --force: it has no {marker}, so it holds "
            "something else; name another folder"
        )


@contextlib.contextmanager
def new_folder(target: str | Path, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `target`, which takes its place when the block succeeds.

    When the block fails, the folder goes and `target` is as it was. Raises DataError where the
    target may not be replaced (see `check_target`), or the disk is full.
    """
    target = Path(target).expanduser().absolute()
    check_target(target, marker, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".new", dir=target.parent))
    try:
        yield beside
        _share(beside)
        swap(beside, target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DataError(f"no space left on the disk of {target.parent}") from error
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _share(folder: Path) -> None:
    """Gives files the mode that the user's umask asks for; some writers make them private."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def swap(new: Path, target: Path) -> None:
    """Puts the folder `new` in the place of `target`; the old one is removed last."""
    old = new.with_suffix(".old")
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
