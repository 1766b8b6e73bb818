"""Reading captions and labels, and batches in which no true caption is a negative."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.progress import Progress

from runtime.errors import DataError
from runtime.manifest import ImageSpec
from training.batches import PairDataset, PairSampler
from training.data import Pairs, describe, read_pairs
from training.images import decode

SPEC = ImageSpec(height=8, width=8, mean=(0, 0, 0), std=(1, 1, 1))
TEMPLATES = ("a {}", "{}")


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 12), "red").save(folder / name)


def csv_file(folder: Path, text: str) -> Path:
    (folder / "data.csv").write_text(text, encoding="utf-8")
    return folder / "data.csv"


def decoded(pairs: Pairs, folder: Path, strict: bool = False) -> tuple[Pairs, np.ndarray]:
    with Progress(disable=True) as progress:
        return decode(pairs, SPEC, folder, progress, strict)


def test_captions_of_one_image_are_gathered(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    path = csv_file(tmp_path, "file,caption\na.png,one\nb.png,two\na.png,two\na.png,one\n")
    pairs = read_pairs(path, TEMPLATES)
    assert [p.name for p in pairs.files] == ["a.png", "b.png"]
    assert pairs.texts == ("one", "two")
    assert pairs.captions == ((0, 1), (1,))
    assert pairs.targets is None


def test_labels_become_captions(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    pairs = read_pairs(csv_file(tmp_path, "file,label\na.png,dog\nb.png,cat\n"), TEMPLATES)
    assert pairs.classes == ("cat", "dog") and pairs.targets == (1, 0)
    assert [pairs.texts[c] for c in pairs.captions[0]] == ["a dog", "dog"]


def test_folder_of_classes(tmp_path: Path) -> None:
    pictures(tmp_path, "dog/1.png", "cat/1.jpg", "cat/2.png")
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    pairs = read_pairs(tmp_path, TEMPLATES)
    assert pairs.classes == ("cat", "dog") and pairs.targets == (0, 0, 1)


def test_bad_rows_are_counted_or_stop(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    path = csv_file(tmp_path, "file,caption\na.png,one\nno.png,two\na.png, \n,x\na.png\n")
    pairs = read_pairs(path, TEMPLATES)
    assert len(pairs) == 1
    assert describe(pairs.skipped) == "2 empty caption, 2 missing file"
    with pytest.raises(DataError, match=r"line 3: missing file: 'no\.png'"):
        read_pairs(path, TEMPLATES, strict=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"columns \(none\); expected file,caption"),
        ("image,text\na.png,x\n", "columns image, text; expected"),
        ("file,title\na.png,x\n", "expected file,caption or file,label"),
        ("file,caption\n", "no usable row"),
        ("file,caption\nno.png,x\n", "no usable row: 1 missing file"),
        (f"file,caption\n{'x' * 5000}.png,x\n", "no usable row: 1 missing file"),
        ('file,caption\na.png,"never closed\na.png,one\na.png,two\n', "cannot be read"),
        ('file,caption\n"' + "x" * 2_000_000, "cannot be read"),
    ],
)
def test_unusable_csv(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_pairs(csv_file(tmp_path, text), TEMPLATES)


def test_unusable_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data file or folder"):
        read_pairs(tmp_path / "nowhere", TEMPLATES)
    with pytest.raises(DataError, match="no pictures in class folders"):
        read_pairs(tmp_path, TEMPLATES)
    (tmp_path / "latin.csv").write_bytes("file,caption\na.png,caf\xe9\n".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        read_pairs(tmp_path / "latin.csv", TEMPLATES)


def test_unreadable_pictures_are_skipped_and_counted(tmp_path: Path) -> None:
    pictures(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a" / "0.jpg").write_text("this is a text")
    (tmp_path / "b" / "2.png").write_bytes(b"")
    pairs = read_pairs(tmp_path, TEMPLATES)
    kept, frames = decoded(pairs, tmp_path)
    assert [p.parent.name + p.stem for p in kept.files] == ["a1", "b1"]
    assert kept.targets == (0, 1) and kept.skipped == {"unreadable picture": 2}
    assert pairs.skipped == {}
    assert frames.shape == (2, 8, 8, 3) and (frames[..., 0] == 255).all()
    with pytest.raises(DataError, match=r"0\.jpg is not a picture"):
        decoded(pairs, tmp_path, strict=True)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}  # the scratch file has no name


def test_no_picture_left(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.jpg").write_text("this is a text")
    with pytest.raises(DataError, match="none of the 1 pictures.*not a picture"):
        decoded(read_pairs(tmp_path, TEMPLATES), tmp_path)


def dataset(captions: tuple[tuple[int, ...], ...], texts: int) -> PairDataset:
    files = tuple(Path(str(i)) for i in range(len(captions)))
    pairs = Pairs(files, captions, tuple(map(str, range(texts))))
    frames = np.arange(len(captions), dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    return PairDataset(pairs, frames, np.arange(texts, dtype=np.int32)[:, None])


def test_a_batch_knows_every_true_caption() -> None:
    batch = dataset(((0, 1), (1,), (2,)), 3)[np.array([[0, 0], [1, 1], [2, 2]])]
    assert batch.positives.tolist() == [
        [True, True, False],
        [False, True, False],
        [False] * 2 + [True],
    ]
    assert batch.frames[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert batch.tokens[:, 0].tolist() == [0, 1, 2]


def test_the_sampler_sees_each_image_once_and_draws_its_captions() -> None:
    captions = tuple((2 * i, 2 * i + 1) for i in range(10))
    data = dataset(captions, 20)
    sampler = PairSampler(data, 3, seed=0)
    first, second = list(sampler), list(sampler)
    assert len(first) == len(sampler) == 3
    rows = np.concatenate(first)
    assert len(set(rows[:, 0])) == 9
    assert all(c in captions[i] for i, c in rows)
    assert not np.array_equal(rows, np.concatenate(second))
    again = PairSampler(data, 3, seed=0)
    np.testing.assert_array_equal(rows, np.concatenate(list(again)))
    drawn = {c for _ in range(20) for batch in again for c in batch[:, 1].tolist()}
    assert drawn == set(range(20))


def test_a_batch_larger_than_the_data() -> None:
    assert [len(b) for b in PairSampler(dataset(((0,), (1,), (2,)), 3), 64, seed=0)] == [3]
