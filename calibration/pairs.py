"""Image-caption pairs and labelled images, from a CSV or TSV file or a folder of class folders.

Either way the result is one `Pairs`: every image with all the captions that are true of it. A
label is turned into captions by the templates.
"""

import collections
import csv
import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from runtime.errors import DataError
from runtime.label_sets import check_templates
from runtime.sources import PICTURES

MAX_CAPTION = 2000  # longer ones are rows that have run together, or whole pages
EXAMPLES = 3
SECOND_LABEL = "second label of a picture (file,caption takes several)"
_TARS = (".tar", ".tgz", ".tar.gz")
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, or a byte that is no UTF-8


class Bad(NamedTuple):
    """What cannot be used: a row, a picture or a member of a shard, and why; or, lost with a whole
    shard, several `items`."""

    item: str
    reason: str
    items: int = 1


@dataclass(frozen=True, eq=False)
class Pairs:
    """Images and what is true of them.

    `captions[i]` are indices into `texts`: all captions of image `files[i]`. `classes` is empty
    and `targets` None for captions without labels. `bad` are the rows that were left out.
    """

    files: tuple[Path, ...]
    captions: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    classes: tuple[str, ...] = ()
    targets: tuple[int, ...] | None = None
    bad: tuple[Bad, ...] = ()

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


def read_pairs(source: Path, templates: Sequence[str]) -> Pairs:
    """Reads a CSV or TSV (columns `file,caption` or `file,label`; files relative to it) or a
    folder (`class name/picture.jpg`).

    A row without a file, or with no or an endless caption, is left out and listed in `bad`.
    Raises DataError for what cannot be used at all.
    """
    templates = check_templates(templates)
    if str(source).endswith(_TARS):
        raise DataError(f"{source}: shards are for training; here give a table or a folder")
    if os.path.isdir(source):
        return _labelled(_folder_rows(source), templates, ())
    if not os.path.isfile(source):
        raise DataError(f"there is no data file or folder {source}")
    rows, column, bad = _table_rows(source)
    if not rows:
        raise DataError(f"{source} has no usable row: {describe(bad) or 'it is empty'}")
    return _labelled(rows, templates, bad) if column == "label" else _captioned(rows, bad)


def describe(bad: Sequence[Bad]) -> str:
    """The counts as words: "3 missing file, 1 empty caption"."""
    counts = count(bad)
    return ", ".join(f"{number} {reason}" for reason, number in counts.items())


def count(bad: Sequence[Bad]) -> dict[str, int]:
    """How many items are bad for each reason."""
    return dict(sorted(collections.Counter(b.reason for b in bad).items()))


def check_bad(bad: Sequence[Bad], total: int, max_bad: float, where: object) -> None:
    """Raises DataError, with the first items and the way out, if more than the share `max_bad`
    of `total` items is bad."""
    lost = sum(b.items for b in bad)
    if lost > max_bad * total:
        first = "; ".join(f"{b.item}: {b.reason}" for b in bad[:EXAMPLES])
        raise DataError(
            f"{where}: {lost} of {total} items cannot be used ({describe(bad)}), more than "
            f"--max-bad {max_bad:g} allows. First: {first}. Mend them, or raise --max-bad"
        )


def _folder_rows(folder: Path) -> list[tuple[Path, str]]:
    try:
        rows = [
            (path, group.name)
            for group in _visible(folder)
            if group.is_dir()
            for path in _visible(group)
            if path.suffix.lower() in PICTURES and path.is_file()
        ]
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be read: {error}") from error
    faults = {label: caption_fault(label, "label") for _, label in rows}
    for label, fault in faults.items():
        if fault:
            raise DataError(f"{folder}: the class folder {label!r} is no label: {fault}")
    if not rows:
        raise DataError(
            f"{folder} has no pictures in class folders; expected {folder}/<class name>/<picture>"
        )
    return rows


def _visible(folder: Path) -> list[Path]:
    """What is in a folder, in order, but for what file managers and tools hide in it."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


class _Row(NamedTuple):
    """A row of a table: where it ends, its file and text, and whether there is still more in it."""

    line: int
    file: str
    text: str
    more: bool


def _table_rows(path: Path) -> tuple[list[tuple[Path, str]], str, tuple[Bad, ...]]:
    """Rows (file, text), the name of the text column, and what was left out."""
    rows: list[tuple[Path, str]] = []
    bad: list[Bad] = []
    exists: dict[str, bool] = {}
    column = ""
    for column, row in _records(path):
        file = path.parent / row.file
        if row.file and not exists.get(row.file, True):
            continue  # counted once, however many captions it has
        if row.file not in exists:
            exists[row.file] = bool(row.file) and os.path.isfile(file)
        reason = _fault(row, column) if exists[row.file] else "missing file"
        if reason:
            bad.append(Bad(f"{path.name}, line {row.line} ({row.file!r:.80})", reason))
        else:
            rows.append((file, row.text.strip()))
    return rows, column, tuple(bad)


def _fault(row: _Row, column: str) -> str:
    if row.more:
        return f"more columns than the header ({column}s with a comma go in quotes)"
    return caption_fault(row.text, column)


def caption_fault(text: str, column: str = "caption") -> str:
    """What is wrong with a caption, or the empty text."""
    if not text.strip():
        return f"empty {column}"
    if len(text) > MAX_CAPTION:
        return f"{column} over {MAX_CAPTION} characters"
    return f"{column} that is not valid Unicode" if _SURROGATE.search(text) else ""


def _records(path: Path) -> Iterator[tuple[str, _Row]]:
    """Yields each row, with the name of its text column."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    line = 0
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
            header = reader.fieldnames or []
            column = next((name for name in ("caption", "label") if name in header), "")
            if "file" not in header or not column:
                raise DataError(
                    f"{path} has the columns {', '.join(header) or '(none)'}; "
                    "expected file,caption or file,label (a .tsv is split at tabs)"
                )
            for row in reader:
                line = reader.line_num
                more = any(row.get(None) or ())
                yield column, _Row(line, row["file"] or "", row[column] or "", more)
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise DataError(
            f"{path} cannot be read as UTF-8 rows, after line {line}: {error}"
        ) from error


def _captioned(rows: list[tuple[Path, str]], bad: tuple[Bad, ...]) -> Pairs:
    ids: dict[str, int] = {}
    images: dict[Path, dict[int, None]] = {}
    for file, text in rows:
        images.setdefault(file, {})[ids.setdefault(text, len(ids))] = None
    captions = tuple(tuple(own) for own in images.values())
    return Pairs(tuple(images), captions, tuple(ids), bad=bad)


def _labelled(
    rows: list[tuple[Path, str]], templates: Sequence[str], bad: tuple[Bad, ...]
) -> Pairs:
    classes = tuple(sorted({label for _, label in rows}))
    index = {label: i for i, label in enumerate(classes)}
    label_of: dict[Path, str] = {}
    second = [row for row in rows if label_of.setdefault(row[0], row[1]) != row[1]]
    bad += tuple(Bad(f"{file} ({label!r:.80})", SECOND_LABEL) for file, label in second)
    rows = [row for row in rows if label_of[row[0]] == row[1]]
    targets = tuple(index[label] for _, label in rows)
    texts = tuple(t.replace("{}", label) for label in classes for t in templates)
    count = len(templates)
    captions = tuple(tuple(range(t * count, (t + 1) * count)) for t in targets)
    return Pairs(tuple(f for f, _ in rows), captions, texts, classes, targets, bad)
