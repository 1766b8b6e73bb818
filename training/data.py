"""Image-caption pairs and labelled images, from a CSV or a folder of class folders.

Either way the result is one `Pairs`: every image with all the captions that are true of it. A
label is turned into captions by the templates.
"""

import csv
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runtime.errors import DataError
from runtime.prompts import check_templates
from runtime.sources import PICTURES

MAX_FIELD = 1 << 20


@dataclass(frozen=True, eq=False)
class Pairs:
    """Images and what is true of them.

    `captions[i]` are indices into `texts`: all captions of image `files[i]`. `classes` is empty
    and `targets` None for captions without labels. `skipped` counts rows by reason.
    """

    files: tuple[Path, ...]
    captions: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    classes: tuple[str, ...] = ()
    targets: tuple[int, ...] | None = None
    skipped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.files)

    def keep(self, rows: Sequence[int]) -> "Pairs":
        """The same data with only these images."""
        targets = self.targets
        return dataclasses.replace(
            self,
            files=tuple(self.files[i] for i in rows),
            captions=tuple(self.captions[i] for i in rows),
            targets=None if targets is None else tuple(targets[i] for i in rows),
        )

    def fingerprint(self) -> str:
        """SHA-256 of names, sizes and captions: tells whether two runs saw the same data."""
        digest = hashlib.sha256()
        for path, captions in zip(self.files, self.captions, strict=True):
            texts = [self.texts[c] for c in captions]
            digest.update(repr((path.name, path.stat().st_size, texts)).encode())
        return digest.hexdigest()


def read_pairs(source: Path, templates: Sequence[str], strict: bool = False) -> Pairs:
    """Reads a CSV (columns `file,caption` or `file,label`; files relative to it) or a folder
    (`class name/picture.jpg`).

    A row without a file or caption is skipped and counted; with `strict` it is an error. Raises
    DataError for what cannot be used at all.
    """
    templates = check_templates(templates)
    if source.is_dir():
        return _labelled(_folder_rows(source), templates, {})
    if not source.is_file():
        raise DataError(f"there is no data file or folder {source}")
    rows, column, skipped = _csv_rows(source, strict)
    if not rows:
        raise DataError(f"{source} has no usable row: {describe(skipped) or 'it is empty'}")
    return _labelled(rows, templates, skipped) if column == "label" else _captioned(rows, skipped)


def describe(skipped: dict[str, int]) -> str:
    """The counts as words: "3 missing file, 1 empty caption"."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))


def _folder_rows(folder: Path) -> list[tuple[Path, str]]:
    rows = [
        (path, group.name)
        for group in sorted(p for p in folder.iterdir() if p.is_dir())
        for path in sorted(group.iterdir())
        if path.suffix.lower() in PICTURES and path.is_file()
    ]
    if not rows:
        raise DataError(
            f"{folder} has no pictures in class folders; expected {folder}/<class name>/<picture>"
        )
    return rows


def _csv_rows(path: Path, strict: bool) -> tuple[list[tuple[Path, str]], str, dict[str, int]]:
    """Rows (file, text), the name of the text column, and what was skipped."""
    rows: list[tuple[Path, str]] = []
    skipped: dict[str, int] = {}
    exists: dict[str, bool] = {}
    reader = _records(path)
    column = next(reader)[1][0]
    for line, (name, text) in reader:
        file = path.parent / name
        if name not in exists:
            exists[name] = bool(name) and os.path.isfile(file)
        reason = "" if exists[name] else "missing file"
        reason = reason or ("" if text.strip() else f"empty {column}")
        if reason and strict:
            raise DataError(f"{path}, line {line}: {reason}: {name!r}")
        if reason:
            skipped[reason] = skipped.get(reason, 0) + 1
        else:
            rows.append((file, text.strip()))
    return rows, column, skipped


def _records(path: Path) -> Iterator[tuple[int, tuple[str, str]]]:
    """Yields (0, (text column, "")), then each row as (line number, (file, text))."""
    csv.field_size_limit(MAX_FIELD)
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            header = reader.fieldnames or []
            column = next((name for name in ("caption", "label") if name in header), "")
            if "file" not in header or not column:
                raise DataError(
                    f"{path} has the columns {', '.join(header) or '(none)'}; "
                    "expected file,caption or file,label"
                )
            yield 0, (column, "")
            for row in reader:
                yield reader.line_num, (row["file"] or "", row[column] or "")
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} cannot be read as a UTF-8 CSV file: {error}") from error


def _captioned(rows: list[tuple[Path, str]], skipped: dict[str, int]) -> Pairs:
    ids: dict[str, int] = {}
    images: dict[Path, dict[int, None]] = {}
    for file, text in rows:
        images.setdefault(file, {})[ids.setdefault(text, len(ids))] = None
    captions = tuple(tuple(own) for own in images.values())
    return Pairs(tuple(images), captions, tuple(ids), skipped=skipped)


def _labelled(
    rows: list[tuple[Path, str]], templates: Sequence[str], skipped: dict[str, int]
) -> Pairs:
    classes = tuple(sorted({label for _, label in rows}))
    index = {label: i for i, label in enumerate(classes)}
    targets = tuple(index[label] for _, label in rows)
    texts = tuple(t.replace("{}", label) for label in classes for t in templates)
    count = len(templates)
    captions = tuple(tuple(range(t * count, (t + 1) * count)) for t in targets)
    return Pairs(tuple(f for f, _ in rows), captions, texts, classes, targets, skipped)
