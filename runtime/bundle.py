"""A bundle folder: finds its files, and checks each against the manifest before it is parsed."""

import hashlib
import os
from pathlib import Path

from . import manifest
from .errors import BundleError, ChecksumMismatch, MissingFile, UnsupportedFormat
from .manifest import FileEntry


def describe(path: Path) -> FileEntry:
    """Size and SHA-256 of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            size += len(block)
    return FileEntry(bytes=size, sha256=digest.hexdigest())


class Bundle:
    """Opens the bundle in `folder`. Raises BundleError where it is not one.

    `bundle.file("image.fp32.onnx")` returns the path of a file, hash checked (once).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if not os.path.isdir(self.folder):
            raise MissingFile(f"there is no bundle folder {self.folder}")
        self.manifest, self.raw = manifest.read(self.folder)
        self._checked: dict[str, Path] = {}

    def file(self, name: str) -> Path:
        """The path of the file that the manifest lists as `name`, checked against its hash.

        Raises MissingFile, ChecksumMismatch, or UnsupportedFormat for a name that leads out of
        the bundle.
        """
        if name not in self._checked:
            self._checked[name] = self._check(name)
        return self._checked[name]

    def _check(self, name: str) -> Path:
        entry = self.manifest.files.get(name)
        if entry is None:
            raise UnsupportedFormat(f"{self.folder}/manifest.json does not list the file {name!r}")
        path = self._inside(name)
        if not os.path.isfile(path):
            raise MissingFile(f"{path} is missing; copy the whole bundle again")
        try:
            found = describe(path)
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error}") from error
        if found.bytes != entry.bytes:
            raise ChecksumMismatch(
                f"{path} has {found.bytes} bytes, the manifest says {entry.bytes}; "
                "it was cut off or changed: copy the bundle again"
            )
        if found.sha256 != entry.sha256:
            raise ChecksumMismatch(
                f"{path} was changed since the export (its SHA-256 differs); copy the bundle again"
            )
        return path

    def _inside(self, name: str) -> Path:
        root = self.folder.resolve()
        try:
            path = (root / name).resolve()
        except (OSError, ValueError) as error:  # a NUL byte, a loop of links
            raise UnsupportedFormat(
                f"{self.folder}/manifest.json: {name!r} is no file name"
            ) from error
        if Path(name).is_absolute() or not path.is_relative_to(root):
            raise UnsupportedFormat(
                f"{self.folder}/manifest.json names {name!r}, which leads out of the bundle; "
                "do not trust this bundle"
            )
        return path
