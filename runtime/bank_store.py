"""Prompt banks of a bundle: which there are, and how one is put in or taken out.

A bank's file is named by its content, `prompts/<name>.<hash>.safetensors`, and written before the
manifest names it; the one that it replaces goes after that. So the manifest, which is replaced in
one step, always names files that are there and whole. What a crash may leave is a file that nothing
names: the next change removes it.
"""

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from . import manifest
from .bank_file import read_bank, save_bank
from .bundle import Bundle, describe
from .errors import BundleError, DataError
from .manifest import Manifest
from .prompts import PromptBank

FOLDER = "prompts"
_NEW = ".new-bank"
_OURS = re.compile(r"default\.safetensors|[\w-]+\.([0-9a-f]{8})\.safetensors")  # export's, ours


def banks_of(bundle: Bundle) -> dict[str, PromptBank]:
    """The prompt banks of a bundle by name, also those of another text encoder (see `is_bound`).

    Raises BundleError where a file is missing or damaged.
    """
    return {name: bank_of(bundle, name) for name in bundle.manifest.prompts}


def bank_of(bundle: Bundle, name: str) -> PromptBank:
    """A prompt bank of a bundle. Raises BundleError where there is none of that name."""
    made = bundle.manifest
    return read_bank(bundle.file(_file_of(bundle, name)), made.model.embedding_dim)


def is_bound(bank: PromptBank, made: Manifest) -> bool:
    """Whether the bank was made by the bundle's own text encoder: another one is refused."""
    return bank.text_encoder == made.files[made.text_encoder].sha256


def store_bank(
    folder: Path, name: str, bank: PromptBank, *, replace: bool = False, read: str | None = None
) -> None:
    """Puts a bank into the bundle in `folder`; with `replace` in the place of one of that name.

    `read` is the file that it was made from, where it was made from one: if the bundle has another
    one by now, that stays. Raises DataError then, and as `check_name`, BundleError where the bank
    was made by another text encoder.
    """
    with _alone(folder) as bundle:
        check_name(bundle, name, replace=replace)
        if read is not None and bundle.manifest.prompts.get(name) != read:
            raise DataError(f"the bank {name!r} of {folder} was replaced meanwhile; try again")
        if not is_bound(bank, bundle.manifest):
            raise BundleError(f"the bank was made by another text encoder than that of {folder}")
        file = _write(bank, name, bundle.folder)
        _publish(bundle, bundle.manifest.prompts | {name: file})


def check_name(bundle: Bundle, name: str, *, replace: bool = False) -> None:
    """Raises DataError where a bank's name is taken (but for `replace`), or cannot be a file's."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise DataError(
            f"{name!r} cannot be the name of a prompt bank: up to 64 of a-z, A-Z, 0-9, - and _"
        )
    if name in bundle.manifest.prompts and not replace:
        raise DataError(
            f"{bundle.folder} has a prompt bank {name!r} already; replace it with --force"
        )


def remove_bank(folder: Path, name: str) -> None:
    """Takes a bank out of the bundle in `folder`. Raises BundleError where there is none."""
    with _alone(folder) as bundle:
        _file_of(bundle, name)
        others = {n: file for n, file in bundle.manifest.prompts.items() if n != name}
        _publish(bundle, others)


def _file_of(bundle: Bundle, name: str) -> str:
    made = bundle.manifest
    if name not in made.prompts:
        have = ", ".join(made.prompts) or "none"
        raise BundleError(f"{bundle.folder} has no prompt bank {name!r}; it has: {have}")
    return made.prompts[name]


def _write(bank: PromptBank, name: str, folder: Path) -> str:
    """Writes a bank's file, for good; returns its name in the bundle."""
    (folder / FOLDER).mkdir(exist_ok=True)
    beside = folder / FOLDER / _NEW
    save_bank(bank, beside)
    file = f"{FOLDER}/{name}.{describe(beside).sha256[:8]}.safetensors"
    _sync(beside)
    beside.replace(folder / file)
    _sync(folder / FOLDER)
    return file


def _publish(bundle: Bundle, prompts: dict[str, str]) -> None:
    """Has the manifest name these banks, and removes the files of others."""
    made = bundle.manifest
    gone = {name for name in set(made.prompts.values()) - set(prompts.values()) if _is_ours(name)}
    files = {name: entry for name, entry in made.files.items() if name not in gone}
    new = set(prompts.values()) - set(files)
    files |= {name: describe(bundle.folder / name) for name in sorted(new)}
    changed = msgspec.structs.replace(made, prompts=prompts, files=files)
    manifest.write(bundle.folder, changed, bundle.raw)
    _sync(bundle.folder)
    for name in gone:
        (bundle.folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[Bundle]:
    """The bundle as it is now, for one change at a time; what a crash left before is gone."""
    Bundle(folder)  # or one clear error
    handle = os.open(Path(folder).expanduser(), os.O_RDONLY)
    try:
        _lock(handle, folder)
        bundle = Bundle(folder)
        for path in (bundle.folder / FOLDER).glob("*"):
            if f"{FOLDER}/{path.name}" not in bundle.manifest.files and _was_left(path):
                path.unlink()
        yield bundle
    finally:
        os.close(handle)


def _is_ours(name: str) -> bool:
    """Whether a name in a manifest, which anybody may have written, is that of a bank's file."""
    folder, _, file = name.rpartition("/")
    return folder == FOLDER and _OURS.fullmatch(file) is not None


def _was_left(path: Path) -> bool:
    """Whether a file that no manifest names is what a crash left, not the user's own."""
    ours = _OURS.fullmatch(path.name)
    if not path.is_file() or not ours:
        return path.name == _NEW
    return ours[1] is None or describe(path).sha256.startswith(ours[1])


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:  # some network file systems cannot
        raise DataError(f"{folder} cannot be locked for a change: {error.strerror}") from error


def _sync(path: Path) -> None:
    """Has the disk hold a file, or a folder's names, before what comes next."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
