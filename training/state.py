"""The state of a run, to go on from: one file, whole or as it was, read without running code."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from runtime.errors import DataError

NAME = "last.ckpt"
VERSION = 1
_FULL = (errno.ENOSPC, errno.EDQUOT)


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes `folder/last.ckpt` beside, then renames it. Raises DataError where the disk is full;
    the state before is then as it was."""
    file, beside = folder / NAME, folder / f".{NAME}.new"
    with _removed(beside):
        try:
            with beside.open("wb") as stream:
                torch.save({"version": VERSION, **state}, stream)
                stream.flush()
                os.fsync(stream.fileno())
            beside.replace(file)
        except (OSError, RuntimeError) as error:
            if not _is_full(error):
                raise
            way_out = (
                "the one before is intact: make room, and go on with --resume"
                if file.exists()
                else "there is none before it: make room, and start again"
            )
            raise DataError(
                f"no space left in {folder} for the state at step {state['step']}; {way_out}"
            ) from error


def load_state(folder: Path) -> dict[str, Any]:
    """Reads `folder/last.ckpt`. Raises DataError where it is damaged."""
    file = folder / NAME
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's, zipfile's and pickle's errors share no base
        raise DataError(f"{file} is damaged ({type(error).__name__}); start anew") from error
    if state.get("version") != VERSION:
        raise DataError(f"{file} is of another release; start anew without --resume")
    return state


def _is_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error: torch hides it behind one of its own."""
    while error:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        error = error.__context__
    return False


@contextmanager
def _removed(file: Path) -> Iterator[None]:
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
