"""A bounded SQLite file of binary rows by key, which several processes may use at once."""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path

MOST = 64 << 20  # bytes
WAIT = 2.0  # seconds for another process to be done
_AT_ONCE = 500  # rows in one question: SQLite takes 999 variables, and room is made in between
_PAGE = 16384  # bytes: of rows of 2 KiB, SQLite's own pages of 4 KiB would hold one each
_TABLE = "CREATE TABLE IF NOT EXISTS rows (key BLOB PRIMARY KEY, used INTEGER, row BLOB)"
_SOUND = "typeof(row) = 'blob' AND typeof(used) = 'integer'"


class RowFile:
    """Rows by key; those that were not used for longest make room for new ones. A connection is
    opened for each call, as it may be used by one thread and one process only.

    Raises sqlite3.Error or OSError where the file is damaged, locked or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, keys: Sequence[bytes]) -> dict[bytes, tuple[bytes, int]]:
        """The rows of these keys, as far as there are any, and when they were used (seconds). What
        is of another type than `write` writes counts as missing: SQLite holds columns to none."""
        found: dict[bytes, tuple[bytes, int]] = {}
        if not keys or not self.path.exists():
            return found
        with self._opened() as file:
            for start in range(0, len(keys), _AT_ONCE):
                some = keys[start : start + _AT_ONCE]
                marks = ",".join("?" * len(some))
                asked = f"SELECT key, row, used FROM rows WHERE key IN ({marks}) AND {_SOUND}"
                found |= {key: (row, used) for key, row, used in file.execute(asked, some)}
        return found

    def touch(self, keys: Sequence[bytes], now: int) -> None:
        """Notes that these were used now."""
        with self._opened() as file, file:
            file.executemany("UPDATE rows SET used = ? WHERE key = ?", [(now, k) for k in keys])

    def write(self, rows: Mapping[bytes, bytes], now: int) -> None:
        """Adds rows, or replaces them."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = iter([(key, now, row) for key, row in rows.items()])
        with self._opened() as file, file:
            while some := list(islice(new, _AT_ONCE)):
                file.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?, ?)", some)
                _make_room(file)

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=WAIT)) as file:
            file.execute(f"PRAGMA page_size = {_PAGE}")  # of a new file
            file.execute(_TABLE)
            yield file


def _make_room(file: sqlite3.Connection) -> None:
    """Removes the rows that were not used for longest until the file is a fifth below its bound.
    Their pages are filled again: the file itself does not shrink."""
    pages, free, size = (
        file.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    taken = (pages - free) * size
    if taken <= MOST:
        return
    (count,) = file.execute("SELECT count(*) FROM rows").fetchone()
    oldest = "SELECT rowid FROM rows ORDER BY used, rowid LIMIT ?"
    surplus = int(count * (1 - 0.8 * MOST / taken)) + 1
    file.execute(f"DELETE FROM rows WHERE rowid IN ({oldest})", (surplus,))
