"""Reading captions and labels: what is used, what is left out and said, what stops."""

import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from calibration.pairs import Bad, check_bad, count, describe, read_pairs
from runtime.errors import DataError

TEMPLATES = ("a {}", "{}")


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 12), "red").save(folder / name)


def table(folder: Path, text: str, name: str = "data.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_captions_of_one_image_are_gathered(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    path = table(tmp_path, "file,caption\na.png,one\nb.png,two\na.png,two\na.png,one\n")
    pairs = read_pairs(path, TEMPLATES)
    assert [p.name for p in pairs.files] == ["a.png", "b.png"]
    assert pairs.texts == ("one", "two")
    assert pairs.captions == ((0, 1), (1,))
    assert pairs.targets is None and pairs.classes == () and pairs.bad == ()


def test_labels_become_captions(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    pairs = read_pairs(table(tmp_path, "file,label\na.png,dog\nb.png,cat\n"), TEMPLATES)
    assert pairs.classes == ("cat", "dog") and pairs.targets == (1, 0)
    assert [pairs.texts[c] for c in pairs.captions[0]] == ["a dog", "dog"]


def test_a_caption_column_goes_before_a_label_column(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    path = table(tmp_path, "label,caption,file\ndog,my dog,a.png\n")
    assert read_pairs(path, TEMPLATES).texts == ("my dog",)


def test_folder_of_classes(tmp_path: Path) -> None:
    pictures(tmp_path, "dog/1.png", "cat/1.jpg", "cat/2.PNG", "loose.png")
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / "dog" / "folder.png").mkdir()
    pairs = read_pairs(tmp_path, TEMPLATES)
    assert pairs.classes == ("cat", "dog") and pairs.targets == (0, 0, 1)
    assert [p.name for p in pairs.files] == ["1.jpg", "2.PNG", "1.png"]


def test_what_tools_hide_in_a_folder_is_no_data(tmp_path: Path) -> None:
    pictures(tmp_path, "dog/1.png", ".ipynb_checkpoints/1.png")
    (tmp_path / "dog" / "._1.png").write_bytes(b"what macOS writes beside a file")
    pairs = read_pairs(tmp_path, TEMPLATES)
    assert pairs.classes == ("dog",) and len(pairs) == 1


NUL = pytest.mark.skipif(sys.version_info < (3, 11), reason="csv refuses a NUL before 3.11")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.tsv", "file\tcaption\na.png\tone, two\n"),
        ("d.TSV", "file\tcaption\na.png\tone, two\n"),
        ("d.csv", '\ufefffile,caption\r\na.png,"one, two"\r\n'),
        ("d.csv", 'id,file,caption\n7,a.png,"one, two"\n'),
        ("d.csv", 'file,caption\n\na.png," one, two "\n\n'),
        ("d.csv", 'file,caption\na.png,"one, two",\n'),
    ],
    ids=["tab", "TSV", "as Excel writes it", "other columns", "blanks", "a last comma"],
)
def test_kinds_of_tables(tmp_path: Path, name: str, text: str) -> None:
    pictures(tmp_path, "a.png")
    pairs = read_pairs(table(tmp_path, text, name), TEMPLATES)
    assert pairs.texts == ("one, two",) and pairs.bad == ()


def test_files_may_have_any_name_and_place(tmp_path: Path) -> None:
    pictures(tmp_path, "in/ä b.png", "data/x.png")
    path = table(tmp_path / "data", f"file,caption\n../in/ä b.png,one\n{tmp_path}/data/x.png,two\n")
    pairs = read_pairs(path, TEMPLATES)
    assert [p.name for p in pairs.files] == ["ä b.png", "x.png"]
    assert all(p.is_file() for p in pairs.files)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("no.png,two", "missing file"),
        pytest.param("a.png\0,two", "missing file", marks=NUL),
        (",two", "missing file"),
        ("folder,two", "missing file"),
        ("a.png, ", "empty caption"),
        ("a.png", "empty caption"),
        (f"a.png,{'x' * 10_000}", "caption over 2000 characters"),
        ("a.png,a dog, a cat", "more columns than the header (captions with a comma go in quotes)"),
    ],
)
def test_bad_rows_are_left_out_and_said(tmp_path: Path, row: str, reason: str) -> None:
    pictures(tmp_path, "a.png", "folder/x.png")
    pairs = read_pairs(table(tmp_path, f"file,caption\na.png,one\n{row}\n"), TEMPLATES)
    assert len(pairs) == 1
    (bad,) = pairs.bad
    assert bad.reason == reason
    assert bad.item.startswith("data.csv, line 3 (")


def test_the_share_of_bad_rows_decides() -> None:
    bad = [Bad(f"data.csv, line {n}", "missing file") for n in range(4)]
    bad.append(Bad("x.tar", "damaged", items=3))
    check_bad(bad, 70, 0.1, "data.csv")
    check_bad(bad, 10, 1.0, "data.csv")
    check_bad([], 0, 0.0, "data.csv")
    with pytest.raises(DataError, match="7 of 69 items") as info:
        check_bad(bad, 69, 0.1, "data.csv")
    message = str(info.value)
    assert "(1 damaged, 4 missing file), more than --max-bad 0.1 allows" in message
    assert "First: data.csv, line 0: missing file; data.csv, line 1" in message
    assert "line 3" not in message


def test_bad_rows_are_counted_by_reason() -> None:
    bad = [Bad("1", "missing file"), Bad("2", "empty label"), Bad("3", "missing file")]
    assert count(bad) == {"empty label": 1, "missing file": 2}
    assert describe(bad) == "1 empty label, 2 missing file"
    assert describe(()) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"columns \(none\); expected file,caption"),
        ("image,text\na.png,x\n", "columns image, text; expected"),
        ("file;caption\na.png;x\n", "columns file;caption; expected file,caption or file,label"),
        ("file,caption\n", "no usable row: it is empty"),
        ("file,caption\nno.png,x\n", "no usable row: 1 missing file"),
        (f"file,caption\n{'x' * 5000}.png,x\n", "no usable row: 1 missing file"),
        ('file,caption\na.png,one\na.png,"open\na.png,two\n', "UTF-8 rows, after line 2: "),
        ('file,caption\na.png,"a" dog\n', "UTF-8 rows, after line 0: "),
        ('file,caption\n"' + "x" * 2_000_000, "cannot be read"),
    ],
)
def test_unusable_tables(tmp_path: Path, text: str, message: str) -> None:
    pictures(tmp_path, "a.png")
    with pytest.raises(DataError, match=message):
        read_pairs(table(tmp_path, text), TEMPLATES)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_tables_are_utf8(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "data.csv").write_bytes("file,caption\na.png,caf\xe9\n".encode(encoding))
    with pytest.raises(DataError, match="UTF-8"):
        read_pairs(tmp_path / "data.csv", TEMPLATES)


def test_unusable_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data file or folder"):
        read_pairs(tmp_path / "nowhere", TEMPLATES)
    with pytest.raises(DataError, match="no data file or folder"):
        read_pairs(tmp_path / ("x" * 5000), TEMPLATES)
    with pytest.raises(DataError, match="no pictures in class folders; expected .*<class name>"):
        read_pairs(tmp_path, TEMPLATES)


@pytest.mark.parametrize(
    ("name", "fault"), [(b" ", "empty label"), (b"caf\xe9", "not valid Unicode")]
)
def test_a_folder_whose_name_is_no_label(tmp_path: Path, name: bytes, fault: str) -> None:
    pictures(tmp_path, os.fsdecode(name) + "/1.png")
    with pytest.raises(DataError, match=f"is no label: .*{fault}"):
        read_pairs(tmp_path, TEMPLATES)


def test_keeping_some_rows(tmp_path: Path) -> None:
    pictures(tmp_path, "a/1.png", "b/2.png", "b/3.png")
    some = read_pairs(tmp_path, TEMPLATES).keep([2, 0])
    assert [p.name for p in some.files] == ["3.png", "1.png"]
    assert some.targets == (1, 0) and some.captions == ((2, 3), (0, 1))


def test_the_fingerprint_is_of_names_sizes_and_captions(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    path = table(tmp_path, "file,caption\na.png,one\nb.png,two\n")
    before = read_pairs(path, TEMPLATES).fingerprint()
    assert before == read_pairs(path, TEMPLATES).fingerprint()
    assert before != read_pairs(path, TEMPLATES).keep([0]).fingerprint()
    Image.new("RGB", (90, 90)).save(tmp_path / "b.png")
    grown = read_pairs(path, TEMPLATES).fingerprint()
    assert before != grown
    table(tmp_path, "file,caption\na.png,one\nb.png,three\n")
    assert grown != read_pairs(path, TEMPLATES).fingerprint()


def test_a_picture_has_one_label(tmp_path: Path) -> None:
    """Two rows of it would each be the other's negative."""
    pictures(tmp_path, "a.png", "b.png")
    text = "file,label\na.png,red\nb.png,blue\na.png,warm\nb.png,blue\n"
    found = read_pairs(table(tmp_path, text), TEMPLATES)
    assert found.classes == ("blue", "red", "warm") and len(found) == 3
    (bad,) = found.bad
    assert "a.png" in bad.item and bad.reason.startswith("second label of a picture")


def test_shards_are_not_evaluated(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="shards are for training; here give a table or a folder"):
        read_pairs(tmp_path / "x.tar", ["{}"])


def test_a_missing_file_counts_once(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = "".join(f"{name},caption {n}\n" for name in ("a.png", "no.png") for n in range(5))
    (tmp_path / "data.csv").write_text("file,caption\n" + rows)
    pairs = read_pairs(tmp_path / "data.csv", ["{}"])
    assert len(pairs.texts) == 5 and [b.reason for b in pairs.bad] == ["missing file"]
