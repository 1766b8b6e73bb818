"""Shards: found, counted, read whole or broken, and split over processes."""

import collections
import contextlib
import gzip
import http.server
import io
import itertools
import json
import os
import tarfile
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import solid, write_tar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calibration.pairs import Bad
from runtime.errors import DataError
from training import samples, shards
from training.samples import MAX_CAPTIONS, Sample, read_shard
from training.shards import Shards, is_shards, open_shards

TEMPLATES = ("a {}", "{}")
BROKEN = "unreadable or cut-off shard"


def pair(name: str, caption: str | None = None) -> dict[str, bytes | str]:
    return {f"{name}.jpg": name.encode(), f"{name}.txt": caption or f"caption {name}"}


def shard(path: Path, *names: str, mode: str = "w") -> Path:
    """A shard in which each picture holds its own name for bytes."""
    return write_tar(path, {k: v for name in names for k, v in pair(name).items()}, mode)


def three(folder: Path) -> str:
    """Shards of 3, 4 and 5 samples."""
    for number in range(3):
        names = [f"{number}{letter}" for letter in "abcde"[: number + 3]]
        shard(folder / f"{number}.tar", *names)
    return f"{folder}/{{0..2}}.tar"


ALL = {"0a", "0b", "0c", "1a", "1b", "1c", "1d", "2a", "2b", "2c", "2d", "2e"}


def usable(path: Path | str, templates: Sequence[str] = TEMPLATES) -> list[Sample]:
    found = list(read_shard(str(path), templates))
    assert all(isinstance(item, Sample) for item in found), found
    return [item for item in found if isinstance(item, Sample)]


def test_of_an_unknown_number_a_damaged_file_has_lost_one(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "a.tar").write_bytes(b"")
    assert open_shards(str(folder), TEMPLATES, samples=1_000_000).expected == 1


def bad(path: Path | str, expected: int = 1) -> list[Bad]:
    return [item for item in read_shard(str(path), TEMPLATES, expected) if isinstance(item, Bad)]


def taken(
    source: Shards,
    count: int,
    reader: int = 0,
    readers: int = 1,
    seed: tuple[int, ...] = (0, 0),
    known_bad: frozenset[str] = frozenset(),
) -> list[str]:
    """The first samples of a stream by the bytes of their pictures; and what is bad, by name."""
    stream = source.stream(seed, reader, readers, known_bad)
    return [
        item.picture.decode() if isinstance(item, Sample) else f"bad {item.item.rpartition('/')[2]}"
        for item in itertools.islice(stream, count)
    ]


# A shard's samples


def test_a_sample_is_the_members_of_one_name(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {
        "in/b.txt": " of a dog\n",
        "in/b.JPG": b"dog",
        "in/b.npy": b"what is not read",
        "in/a.webp": b"cat",
        "in/a.json": '{"caption": "of a cat", "width": 3}',
    }
    path = write_tar(tmp_path / "x.tar", members | pair("é"))
    first, second, third = (item for item in read_shard(str(path), ()) if isinstance(item, Sample))
    assert first == Sample(f"{path}:in/b", b"dog", ("of a dog",))
    assert second == Sample(f"{path}:in/a", b"cat", ("of a cat",))
    assert third.texts == ("caption é",)


@pytest.mark.parametrize(
    ("member", "texts"),
    [
        ({"x.txt": "one, two"}, ("one, two",)),
        ({"x.txt": "\ufeffone\r\n"}, ("one",)),
        ({"x.json": '{"caption": "one"}'}, ("one",)),
        ({"x.json": '{"caption": ["one", "two "]}'}, ("one", "two")),
        ({"x.json": '{"caption": ["one", "", "' + "x" * 10_000 + '"]}'}, ("one",)),
        ({"x.json": '{"label": "cat"}'}, ("a cat", "cat")),
        ({"x.json": '{"label": "cat", "caption": null}'}, ("a cat", "cat")),
        ({"x.json": '{"label": "cat", "caption": "one"}'}, ("one",)),
        ({"x.txt": "one", "x.json": '{"caption": "two"}'}, ("one",)),
    ],
)
def test_captions(tmp_path: Path, member: dict[str, bytes | str], texts: tuple[str, ...]) -> None:
    (sample,) = usable(write_tar(tmp_path / "x.tar", {"x.png": b"picture"} | member))
    assert sample.texts == texts


def test_captions_have_an_end(tmp_path: Path) -> None:
    many = json.dumps({"caption": [str(n) for n in range(100)]})
    (sample,) = usable(write_tar(tmp_path / "x.tar", {"x.png": b"", "x.json": many}))
    assert sample.texts == tuple(str(n) for n in range(MAX_CAPTIONS))


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"x.jpg": b""}, "no caption"),
        ({"x.txt": "one"}, "no picture (.jpg, .jpeg, .png, .webp)"),
        ({"x.avif": b"", "x.txt": "one"}, "no picture (.jpg, .jpeg, .png, .webp)"),
        ({"x.2.jpg": b"", "x.2.txt": "one", "x.json": "{}"}, "no picture (.jpg, .jpeg, .png, "),
        ({"x.jpg": b"", "x.txt": " \n"}, "empty caption"),
        ({"x.jpg": b"", "x.txt": "x" * 10_000}, "caption over 2000 characters"),
        ({"x.jpg": b"", "x.txt": "caf\xe9".encode("latin-1")}, "unreadable caption (Unicode"),
        ({"x.jpg": b"", "x.json": "{"}, "unreadable caption (JSONDecodeError)"),
        ({"x.jpg": b"", "x.json": "[" * 100_000}, "unreadable caption (RecursionError)"),
        ({"x.jpg": b"", "x.json": "{}"}, "no caption"),
        ({"x.jpg": b"", "x.json": "[]"}, "unreadable caption"),
        ({"x.jpg": b"", "x.json": '{"caption": 3}'}, "unreadable caption (TypeError)"),
        ({"x.jpg": b"", "x.json": '{"caption": [null]}'}, "unreadable caption (TypeError)"),
        ({"x.jpg": b"", "x.json": '{"caption": {"en": "one"}}'}, "unreadable caption (TypeError)"),
        ({"x.jpg": b"", "x.json": '{"caption": []}'}, "no caption"),
        ({"x.jpg": b"", "x.json": '{"caption": "\\ud800"}'}, "caption that is not valid Unicode"),
        ({"x.jpg": b"", "x.json": '{"label": 3}'}, "unreadable caption (TypeError)"),
    ],
)
def test_bad_samples(tmp_path: Path, members: dict[str, bytes | str], reason: str) -> None:
    path = write_tar(tmp_path / "x.tar", members | pair("y"))
    first, second = read_shard(str(path), TEMPLATES)
    assert isinstance(first, Bad) and first.item == f"{path}:x"
    assert first.reason.startswith(reason)
    assert isinstance(second, Sample) and second.picture == b"y"


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar"])
def test_compressed_shards(tmp_path: Path, name: str) -> None:
    path = shard(tmp_path / name, "a", "b", mode="w:gz")
    assert [s.picture for s in usable(path)] == [b"a", b"b"]
    assert open_shards(str(path), TEMPLATES).samples == 2


def test_only_regular_members_of_a_sane_size_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shard(tmp_path / "x.tar", "a")
    secret = tmp_path / "secret.txt"
    secret.write_text("the host's own")
    with tarfile.open(path, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            link = tarfile.TarInfo("b.txt")
            link.type, link.linkname = kind, str(secret)
            archive.addfile(link)
        large = tarfile.TarInfo("../../../c.jpg")
        large.size = 2000
        archive.addfile(large, io.BytesIO(bytes(2000)))
    monkeypatch.setattr(samples, "MAX_MEMBER", 1000)
    assert [s.picture for s in usable(path)] == [b"a"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["secret.txt", "x.tar"]


def test_the_first_of_two_members_of_one_name_is_taken(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {"x.jpg": b"1", "x.JPG": b"2", "x.txt": "one"}
    first, second = usable(write_tar(tmp_path / "x.tar", members | pair("y")))
    assert first.picture == b"1" and second.picture == b"y"


# Broken shards


def broken(folder: Path, how: str) -> Path:
    path = shard(folder / "x.tar", *(f"{n}" for n in range(10)))
    content = path.read_bytes()
    if how == "half":
        content = content[: 512 * 21 + 100]
    elif how == "half of a gzip":
        content = gzip.compress(content, mtime=0)[:-40]
    elif how == "damaged in the middle":
        content = content[: 512 * 20] + b"\xff" * 512 + content[512 * 21 :]
    elif how == "text":
        content = b"this is no tar file, whatever it is called\n" * 100
    elif how == "empty":
        content = b""
    else:
        path.unlink()
        return path
    path.write_bytes(content)
    return path


def test_a_header_that_would_fill_the_memory_is_damage(tmp_path: Path) -> None:
    """Of zeros without end only some kilobytes are in the file."""
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 33
    path = tmp_path / "x.tgz"
    with gzip.open(path, "wb") as stream:
        stream.write(header.tobuf(tarfile.GNU_FORMAT))
        stream.write(bytes(1 << 22))
    tracemalloc.start()
    (last,) = read_shard(str(path), TEMPLATES)
    assert isinstance(last, Bad) and tracemalloc.get_traced_memory()[1] < 1 << 21
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("how", "left"),
    [
        ("half", range(4, 7)),
        ("half of a gzip", range(0, 11)),
        ("damaged in the middle", range(4, 7)),
        ("text", range(0, 1)),
        ("empty", range(0, 1)),
        ("missing", range(0, 1)),
    ],
)
def test_a_broken_shard_gives_what_it_holds_up_to_there(
    tmp_path: Path, how: str, left: range
) -> None:
    path = broken(tmp_path, how)
    *found, last = read_shard(str(path), TEMPLATES, expected=10)
    assert isinstance(last, Bad) and last.item == str(path)
    assert last.reason.startswith(f"{BROKEN} (")
    good = [item.picture for item in found if isinstance(item, Sample)]
    assert len(good) in left and good == [b"%d" % n for n in range(len(good))]
    assert last.items == max(1, 10 - len(found))


def test_a_shard_that_ends_too_soon_has_lost_one_at_least(tmp_path: Path) -> None:
    (last,) = bad(broken(tmp_path, "half"))[-1:]
    assert last.items == 1


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(at=st.integers(0, 4095), value=st.binary(min_size=1, max_size=40), gz=st.booleans())
def test_whatever_is_in_a_shard_comes_as_samples_or_bad(
    tmp_path: Path, at: int, value: bytes, gz: bool
) -> None:
    path = shard(tmp_path / "x.tar", "a", "b", mode="w:gz" if gz else "w")
    content = bytearray(path.read_bytes())
    at %= len(content)
    content[at : at + len(value)] = value
    path.write_bytes(content)
    assert all(isinstance(item, Sample | Bad) for item in read_shard(str(path), TEMPLATES))
    with contextlib.suppress(DataError):
        open_shards(str(path), TEMPLATES)


# Finding and counting


def test_ways_to_name_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a folder"
    three(folder)
    (folder / "._0.tar").write_bytes(b"what macOS writes beside a file")
    monkeypatch.chdir(tmp_path)
    found = []
    for source in ("{0..2}.tar", "*.tar", "?.tar", "[0-2].tar", "{0,1,2}.tar", ""):
        name = str(folder / source)
        assert is_shards(name)
        found.append(open_shards(name, TEMPLATES))
    found.append(open_shards("a folder/*.tar", TEMPLATES))
    assert {tuple(map(os.path.realpath, f.urls)) for f in found} == {
        tuple(str(folder.resolve() / f"{n}.tar") for n in range(3))
    }
    assert {f.samples for f in found} == {12}


def test_a_file_may_have_marks_in_its_name(tmp_path: Path) -> None:
    path = shard(tmp_path / "{a,b}[1]*.tar", "x")
    assert open_shards(str(path), TEMPLATES).urls == (str(path),)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{0..3}.tar", r"there is no shard .*/3\.tar$"),
        ("none-*.tar", r"there is no shard .*/none-\*\.tar$"),
        ("{0..2.tar", "{0..2.tar: Unbalanced"),
        ("x" * 5000 + ".tar", "there is no shard"),
    ],
)
def test_shards_that_are_not_there(tmp_path: Path, source: str, message: str) -> None:
    three(tmp_path)
    with pytest.raises(DataError, match=message):
        open_shards(str(tmp_path / source), TEMPLATES)


@pytest.mark.parametrize("scheme", ["pipe:touch {}/ran #", "file://{}", "ftp://{}", "s3://{}"])
def test_nothing_but_files_and_http_is_opened(tmp_path: Path, scheme: str) -> None:
    shard(tmp_path / "x.tar", "a")
    source = scheme.format(tmp_path) + "/x.tar"
    with pytest.raises(DataError, match="there is no shard"):
        open_shards(source, TEMPLATES)
    (item,) = read_shard(source, TEMPLATES)
    assert isinstance(item, Bad)
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_tar_files_is_none_of_shards(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "y.csv").write_text("")
    assert not is_shards(str(tmp_path / "x"))
    assert not is_shards(str(tmp_path / "x" / "y.csv"))
    assert not is_shards("https://example.org/y.csv")


def test_pictures_are_counted(tmp_path: Path) -> None:
    source = three(tmp_path)
    write_tar(tmp_path / "1.tar", {"x.jpg": b"", "x.txt": "1", "y.png": b"", "notes.txt": "2"})
    (tmp_path / "2.tar").write_text("damaged")
    ticks: list[None] = []
    found = open_shards(source, TEMPLATES, advance=lambda: ticks.append(None))
    assert found.samples == 3 + 2 + 0 and len(ticks) == 3


def test_sizes_are_taken_from_sizes_json(tmp_path: Path) -> None:
    three(tmp_path / "a")
    three(tmp_path / "b")
    sizes = {"0.tar": 100, "1.tar": 10, "2.tar": 1, "9.tar": 7}
    (tmp_path / "a" / "sizes.json").write_text(json.dumps(sizes))
    assert open_shards(f"{tmp_path}/a/{{0..2}}.tar", TEMPLATES).samples == 111
    assert open_shards(f"{tmp_path}/{{a,b}}/0.tar", TEMPLATES).samples == 6  # b has no list
    assert open_shards(f"{tmp_path}/a/0.tar", TEMPLATES, samples=5).samples == 5


@pytest.mark.parametrize("content", ["{}", "[1, 2]", "3", "{", '{"0.tar": null}', "\xff"])
def test_a_list_of_sizes_that_is_of_no_use(tmp_path: Path, content: str) -> None:
    three(tmp_path)
    (tmp_path / "sizes.json").write_bytes(content.encode("latin-1"))
    assert open_shards(str(tmp_path / "0.tar"), TEMPLATES).samples == 3


@pytest.mark.parametrize("how", ["text", "empty"])
def test_shards_without_samples(tmp_path: Path, how: str) -> None:
    with pytest.raises(DataError, match="holds no samples"):
        open_shards(str(broken(tmp_path, how)), TEMPLATES)


# The stream


def test_every_sample_comes_once_a_pass(tmp_path: Path) -> None:
    source = open_shards(three(tmp_path), TEMPLATES)
    for begin in (0, 12, 24):
        assert set(taken(source, 36)[begin : begin + 12]) == ALL


@pytest.mark.parametrize("readers", [2, 3, 4])
def test_readers_share_the_shards(tmp_path: Path, readers: int) -> None:
    names = [f"{number}{letter}" for number in range(12) for letter in "ab"]
    for number in range(12):
        shard(tmp_path / f"{number}.tar", *names[2 * number : 2 * number + 2])
    source = open_shards(str(tmp_path), TEMPLATES)
    own = [taken(source, 24 // readers, reader, readers) for reader in range(readers)]
    assert sorted(itertools.chain(*own)) == sorted(names)
    assert all(len({name[:-1] for name in found}) == 12 // readers for found in own)


@pytest.mark.parametrize("readers", [4, 5, 16])
def test_more_readers_than_shards_share_the_samples(tmp_path: Path, readers: int) -> None:
    source = open_shards(three(tmp_path), TEMPLATES)
    own = [set(taken(source, 12 // readers, reader, readers)) for reader in range(readers)]
    assert sum(map(len, own)) == len(set().union(*own)) == 12 // readers * readers


def test_one_sample_is_enough_for_any_number_of_readers(tmp_path: Path) -> None:
    source = open_shards(str(shard(tmp_path / "x.tar", "a")), TEMPLATES)
    assert [taken(source, 2, reader, 3) for reader in range(3)] == [["a", "a"]] * 3


def test_resampled_readers_draw_shards_of_their_own(tmp_path: Path) -> None:
    source = open_shards(three(tmp_path), TEMPLATES, resampled=True)
    first, second = (taken(source, 3000, reader, 2) for reader in (0, 1))
    assert first != second
    counts = collections.Counter(name[0] for name in first)  # shards of 3, 4 and 5
    assert counts.keys() == {"0", "1", "2"}
    assert all(abs(counts[str(n)] - 3000 * (n + 3) / 12) < 200 for n in range(3))


@pytest.mark.parametrize("resampled", [False, True])
@pytest.mark.parametrize("readers", [1, 2, 5])
def test_the_seed_fixes_the_order(tmp_path: Path, resampled: bool, readers: int) -> None:
    source = open_shards(three(tmp_path), TEMPLATES, resampled)
    for reader in range(readers):
        first = taken(source, 40, reader, readers)
        assert first == taken(source, 40, reader, readers)
        assert first != taken(source, 40, reader, readers, seed=(1, 0))
        assert first != taken(source, 40, reader, readers, seed=(0, 1))


def test_neighbours_are_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shard(tmp_path / "x.tar", *(f"{n:03}" for n in range(200)))
    source = open_shards(str(path), TEMPLATES)
    held = {}
    for name, value in (("SHUFFLE", 20), ("SHUFFLE_BYTES", 20 * 3)):
        with monkeypatch.context() as patch:
            patch.setattr(shards, name, value)
            found = [int(n) for n in taken(source, 200)]
        assert sorted(found) == list(range(200)) and found != sorted(found)
        held[name] = max(n - at for at, n in enumerate(found))
    assert held == {"SHUFFLE": 20, "SHUFFLE_BYTES": 20}  # none comes earlier than is held


def test_known_bad_samples_are_passed_over_and_change_nothing_else(tmp_path: Path) -> None:
    source = open_shards(three(tmp_path), TEMPLATES)
    known = frozenset({f"{tmp_path}/1.tar:1b", f"{tmp_path}/2.tar:2a", "1.tar:1c"})
    plain = taken(source, 36)
    assert [n for n in plain if n not in ("1b", "2a")] == taken(source, 30, known_bad=known)


def test_bad_samples_and_shards_come_between_the_good(tmp_path: Path) -> None:
    source = three(tmp_path)
    write_tar(tmp_path / "0.tar", pair("0a") | {"0b.jpg": b""})
    (tmp_path / "1.tar").write_text("damaged")
    found = taken(open_shards(source, TEMPLATES, samples=12), 16)
    assert set(found) == {"0a", "bad 0.tar:0b", "bad 1.tar", *(f"2{c}" for c in "abcde")}
    assert len(set(found[:8])) == len(found[:8])


def test_a_lost_shard_counts_as_its_share_of_the_samples(tmp_path: Path) -> None:
    source = three(tmp_path)
    opened = open_shards(source, TEMPLATES)
    (tmp_path / "1.tar").unlink()
    stream = opened.stream((0,), 0, 1, frozenset())
    (lost,) = (i for i in itertools.islice(stream, 9) if isinstance(i, Bad))
    assert lost == Bad(f"{tmp_path}/1.tar", f"{BROKEN} (FileNotFoundError)", opened.samples // 3)


@pytest.mark.parametrize("readers", [1, 2, 4])
@pytest.mark.parametrize("resampled", [False, True])
def test_shards_of_which_none_can_be_used(tmp_path: Path, readers: int, resampled: bool) -> None:
    opened = open_shards(three(tmp_path), TEMPLATES, resampled)
    for path in tmp_path.iterdir():
        write_tar(path, {"x.jpg": b"", "y.jpg": b""})
    with pytest.raises(DataError, match="no shard has a usable sample; the last was .*tar"):
        taken(opened, 1000, 0, readers)


def test_one_good_shard_is_enough(tmp_path: Path) -> None:
    opened = open_shards(three(tmp_path), TEMPLATES)
    for name in "01":
        (tmp_path / f"{name}.tar").write_text("damaged")
    for reader in range(2):
        found = taken(opened, 300, reader, 2)
        assert {"2a", "2b", "2c", "2d", "2e"} < set(found)


# Shards from the net


class Served:
    """A web server on the loopback. `answer` may answer a path by itself."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        self.answer: Callable[[str, Any], bool] = lambda path, handler: False
        served = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args, directory=str(folder))

            def do_GET(self) -> None:
                served.asked.append(self.path)
                if not served.answer(self.path, self):
                    super().do_GET()

            def log_message(self, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("training.samples.time.sleep", lambda seconds: None)
    (tmp_path / "web").mkdir()
    served = Served(tmp_path / "web")
    thread = threading.Thread(target=served.server.serve_forever, args=(0.01,))
    thread.start()
    yield served
    served.server.shutdown()
    thread.join()
    served.server.server_close()


def test_shards_come_by_http(tmp_path: Path, web: Served) -> None:
    three(tmp_path / "web")
    sizes = {"0.tar": 3, "1.tar": 4, "2.tar": 5}
    (tmp_path / "web" / "sizes.json").write_text(json.dumps(sizes))
    source = f"{web.url}/{{0..2}}.tar"
    assert is_shards(source)
    opened = open_shards(source, TEMPLATES)
    assert opened.samples == 12 and len(opened.urls) == 3
    assert set(taken(opened, 12)) == ALL
    assert sorted(web.asked) == ["/0.tar", "/1.tar", "/2.tar", "/sizes.json"]


def test_shards_from_the_net_are_not_counted(tmp_path: Path, web: Served) -> None:
    three(tmp_path / "web")
    with pytest.raises(DataError, match=r"not counted: give --epoch-size, or .* sizes\.json"):
        open_shards(f"{web.url}/{{0..2}}.tar", TEMPLATES)
    assert web.asked == ["/sizes.json"]  # what is not there is asked for but once
    assert open_shards(f"{web.url}/{{0..2}}.tar", TEMPLATES, samples=12).samples == 12


def test_a_server_that_fails_is_asked_again(tmp_path: Path, web: Served) -> None:
    shard(tmp_path / "web" / "x.tar", "a")

    def unavailable(path: str, handler: Any) -> bool:
        if len(web.asked) < 3:
            handler.send_error(503)
        return len(web.asked) < 3

    web.answer = unavailable
    assert [s.picture for s in usable(f"{web.url}/x.tar")] == [b"a"]
    assert len(web.asked) == 3


@pytest.mark.parametrize(("status", "times"), [(503, 3), (429, 3), (404, 1), (403, 1)])
def test_a_shard_that_does_not_come_is_bad(web: Served, status: int, times: int) -> None:
    web.answer = lambda path, handler: handler.send_error(status) is None
    assert bad(f"{web.url}/x.tar") == [Bad(f"{web.url}/x.tar", f"{BROKEN} (HTTPError)")]
    assert len(web.asked) == times


@pytest.mark.parametrize("chunked", [False, True])
def test_a_download_that_breaks_off(tmp_path: Path, web: Served, chunked: bool) -> None:
    content = shard(tmp_path / "x.tar", *"abcdefghij").read_bytes()

    def breaks_off(path: str, handler: Any) -> bool:
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        if chunked:
            handler.send_header("Transfer-Encoding", "chunked")
        else:
            handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        half = content[: 512 * 21 + 100]
        handler.wfile.write(b"%x\r\n" % (len(content) * 2) + half if chunked else half)
        handler.close_connection = True
        return True

    web.answer = breaks_off
    *found, last = read_shard(f"{web.url}/x.tar", TEMPLATES, expected=10)
    assert len(found) in (4, 5, 6)
    assert isinstance(last, Bad) and last.items == 10 - len(found)


@pytest.mark.parametrize("target", ["file://{}/secret.tar", "ftp://127.0.0.1/x.tar", "pipe:ls"])
def test_redirects_leave_http_for_nothing_else(tmp_path: Path, web: Served, target: str) -> None:
    shard(tmp_path / "secret.tar", "a")

    def redirect(path: str, handler: Any) -> bool:
        handler.send_response(302)
        handler.send_header("Location", target.format(tmp_path))
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    web.answer = redirect
    (item,) = read_shard(f"{web.url}/x.tar", TEMPLATES)
    assert isinstance(item, Bad)


def test_a_redirect_within_http_is_followed(tmp_path: Path, web: Served) -> None:
    shard(tmp_path / "web" / "y.tar", "a")

    def redirect(path: str, handler: Any) -> bool:
        if path == "/x.tar":
            handler.send_response(302)
            handler.send_header("Location", "/y.tar")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
        return path == "/x.tar"

    web.answer = redirect
    assert [s.picture for s in usable(f"{web.url}/x.tar")] == [b"a"]


@pytest.mark.parametrize("place", ["/x.tar", "127.0.0.1:x/x.tar", "127.0.0.1:1/a b.tar"])
def test_addresses_that_are_none(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://{place}"
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("training.samples.time.sleep", lambda seconds: None)
    (item,) = read_shard(url, TEMPLATES)
    assert isinstance(item, Bad)
    with pytest.raises(DataError, match="not counted"):
        open_shards(url, TEMPLATES)


def test_real_pictures_come_through_unchanged(tmp_path: Path) -> None:
    content = solid(200, kind="jpg")
    (sample,) = usable(write_tar(tmp_path / "x.tar", {"x.jpg": content, "x.txt": "red"}))
    assert sample.picture == content
