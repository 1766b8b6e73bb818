"""The store of embeddings: what it lists is whole, whatever happened to who wrote it."""

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.errors import DataError
from training import embedding_store
from training.embedding_store import EmbeddingStore

WIDTH = 6


def things(first: int, count: int) -> NDArray[np.uint8]:
    """Digests of things number `first` and on."""
    made = np.zeros((count, 16), np.uint8)
    made[:, 3] = np.arange(first, first + count)
    return made


def values(first: int, count: int) -> NDArray[np.float32]:
    return (np.arange(first, first + count)[:, None] * 8 + np.arange(WIDTH)).astype(np.float32)


def made(folder: Path, **what: Any) -> EmbeddingStore:
    return EmbeddingStore(folder, WIDTH, 2, {"teacher": "t", **what})


def fill(store: EmbeddingStore, first: int, count: int, number: int = 0) -> None:
    about = np.tile(np.arange(count, dtype=np.float32)[:, None], 2)
    with store.writing() as writer:
        numbers = np.full(count, number)
        writer.add(things(first, count), numbers, about, values(first, count))


def test_what_was_written_is_found_by_a_new_reader(tmp_path: Path) -> None:
    store = made(tmp_path / "s")
    assert len(store) == 0 and (store.find(things(0, 2), [0]) == -1).all()
    fill(store, 0, 5)
    fill(store, 3, 4, number=7)
    for reader in (store, made(tmp_path / "s"), pickle.loads(pickle.dumps(store))):
        places = reader.find(things(0, 8), [7, 0])
        assert (places >= 0).tolist() == [[3 <= i < 7, i < 5] for i in range(8)]
        assert np.array_equal(reader.rows(places[:5, 1]), values(0, 5))
        assert np.array_equal(reader.rows(places[[6, 3], 0]), values(0, 8)[[6, 3]])
        row, about = reader.row(int(places[4, 0]))
        assert np.array_equal(row, values(4, 1)[0]) and about.tolist() == [1, 1]


def test_shards_are_written_when_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_store, "SHARD", 4)
    monkeypatch.setattr(embedding_store, "MERGED", 4)
    store = made(tmp_path / "s")
    with store.writing() as writer:
        for first in range(0, 20, 2):
            none = np.zeros((2, 2), np.float32)
            writer.add(things(first, 2), np.zeros(2, int), none, values(first, 2))
    assert len(list((tmp_path / "s").glob("*.rows.npy"))) == 5
    assert np.array_equal(store.rows(store.find(things(0, 20), [0])[:, 0]), values(0, 20))


def test_small_shards_become_one_and_hold_no_file_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_store, "MERGED", 10)
    folder = tmp_path / "s"
    fill(made(folder), 0, 4)
    reader = pickle.dumps(made(folder))
    before = len(os.listdir("/proc/self/fd"))
    for first in range(4, 24, 4):
        fill(made(folder), first, 4)
    store = made(folder)
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    assert [shard["rows"] for shard in shards] == [8, 8, 8]
    assert len(list(folder.glob("*.npy"))) == 6  # and what they were made of is gone
    for own in (store, pickle.loads(reader)):
        assert np.array_equal(own.rows(own.find(things(0, 24), [0])[:, 0]), values(0, 24))
        assert np.array_equal(own.rows(np.arange(4)), values(0, 4))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_limit_on_files_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(made(tmp_path / "s"), 0, 4)

    def load(*_: object, **more: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(np, "load", load)
    with pytest.raises(DataError, match="ulimit -n"):
        made(tmp_path / "s")


KILLED = """
import os, signal, sys
from pathlib import Path
from training import embedding_store
from test_embedding_store import fill, made, things, values
import numpy as np

store = made(Path(sys.argv[1]))
save, calls = embedding_store._save, []
def dying(file, rows):
    save(file, rows)
    calls.append(file)
    if len(calls) == 3:  # the rows of the second shard are there, its index is not
        os.kill(os.getpid(), signal.SIGKILL)
embedding_store._save = dying
fill(store, 0, 3)
fill(store, 3, 3)
"""


def test_kill_9_loses_nothing_that_is_listed(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    environment = os.environ | {"PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", KILLED, str(folder)], env=environment)
    assert run.returncode == -9 and (folder / "00001.rows.npy").exists()
    store = made(folder)
    assert (store.find(things(0, 6), [0])[:, 0] >= 0).tolist() == [True] * 3 + [False] * 3
    fill(store, 3, 3)
    assert np.array_equal(store.rows(store.find(things(0, 6), [0])[:, 0]), values(0, 6))


def test_an_interrupted_writer_keeps_what_it_had(tmp_path: Path) -> None:
    store = made(tmp_path / "s")
    with pytest.raises(KeyboardInterrupt), store.writing() as writer:
        writer.add(things(0, 2), np.zeros(2, int), np.zeros((2, 2), np.float32), values(0, 2))
        raise KeyboardInterrupt
    assert len(made(tmp_path / "s")) == 2


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    store = made(tmp_path / "s")
    with store.writing(), pytest.raises(DataError, match="another process"):
        with made(tmp_path / "s").writing():
            pass


def test_what_is_not_its_own_or_damaged_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    fill(made(folder), 0, 3)
    with pytest.raises(DataError, match="other embeddings .teacher differ"):
        made(folder, teacher="another")
    rows = folder / "00000.rows.npy"
    content = rows.read_bytes()
    rows.write_bytes(content[:-2])
    with pytest.raises(DataError, match="00000.rows.npy is damaged"):
        made(folder)
    rows.write_bytes(content)
    index = folder / "00000.index.npy"
    np.save(index, np.zeros(3))
    with pytest.raises(DataError, match="00000.index.npy is damaged: its type is float64"):
        made(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="manifest.json is damaged"):
        made(folder)


def test_shards_that_another_process_merges_as_they_are_opened_are_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "s"
    fill(made(folder), 0, 3)
    listed, before = EmbeddingStore._listed, made(folder)._listed()
    fill(made(folder), 3, 3)
    answers = [before]
    monkeypatch.setattr(
        EmbeddingStore, "_listed", lambda self: answers.pop() if answers else listed(self)
    )
    (folder / "00000.rows.npy").unlink(missing_ok=True)
    assert len(made(folder)) == 6
    monkeypatch.undo()
    for file in folder.glob("*.rows.npy"):
        file.unlink()
    with pytest.raises(DataError, match="rows.npy is damaged"):
        made(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_what_does_not_fit_is_refused(tmp_path: Path, value: float) -> None:
    store = made(tmp_path / "s")
    with pytest.raises(DataError, match="not finite"), store.writing() as writer:
        rows = np.full((1, WIDTH), value, np.float32)
        writer.add(things(0, 1), np.zeros(1, int), np.zeros((1, 2), np.float32), rows)
    assert len(store) == 0
