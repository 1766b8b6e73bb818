"""Folders that appear whole or not at all: written beside the target, then renamed."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import DataError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)


def check_target(target: str | Path, marker: str, overwrite: bool) -> Path:
    """Returns `target` with `~` and links resolved, if a folder may be put there.

    Raises DataError where something would be lost. With `overwrite` a folder may be replaced, but
    only if it holds the file `marker`, that is, if it is of the same kind.
    """
    target = Path(os.path.realpath(Path(target).expanduser()))
    if os.path.ismount(target) or target == Path.cwd():
        raise DataError(f"{target} cannot be replaced as a whole; name a folder inside it")
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return target
    if not target.is_dir():
        raise DataError(f"{target} is a file; name a folder that does not exist yet")
    if not overwrite:
        raise DataError(f"{target} exists already; name another folder, or replace it with --force")
    if not (target / marker).is_file():
        raise DataError(
            f"{target} is not replaced, even with --force: it has no {marker}, so it holds "
            "something else; name another folder"
        )
    return target


@contextlib.contextmanager
def new_folder(target: str | Path, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `target`, which takes its place when the block succeeds.

    When the block fails, the folder goes and `target` is as it was. Raises DataError where the
    target may not be replaced (see `check_target`), also if it came into being meanwhile, or the
    disk is full.
    """
    target = check_target(target, marker, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
    beside.chmod(0o777 & ~_umask())
    try:
        yield beside
        check_target(target, marker, overwrite)
        _sync(beside)
        _swap(beside, target)
    except OSError as error:
        if error.errno in _FULL:
            raise DataError(f"no space left on the disk of {target.parent}") from error
        if error.errno in _TAKEN:
            raise DataError(f"{target} was made by somebody else meanwhile; it is kept") from error
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Has the disk hold every file before the folder gets its name: a power cut must not leave a
    whole folder of empty files."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def _swap(new: Path, target: Path) -> None:
    """Puts the folder `new` in the place of `target`; the old one is removed last."""
    old = new.with_suffix(".old")
    try:
        if target.is_dir() and any(target.iterdir()):
            target.rename(old)
        new.rename(target)  # the system refuses to replace a folder that is not empty
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
