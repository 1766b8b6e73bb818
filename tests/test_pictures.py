"""A training picture: decoded once, kept, and changed so that its caption stays true."""

import csv
import io
import multiprocessing
import os
import pickle
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import solid
from PIL import Image

from runtime.errors import DataError, FrameError
from runtime.frames import Frame, read_picture
from runtime.manifest import ImageSpec
from runtime.preprocess import preprocess
from training import cache
from training.augment import Augmentation
from training.cache import FrameCache, key_of
from training.pictures import PictureReader

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
FITS = ("crop", "squash", "pad")


def spec(height: int = 32, width: int = 32, fit: str = "crop", **more: object) -> ImageSpec:
    return ImageSpec(
        height=height,
        width=width,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        fit=fit,  # type: ignore[arg-type]
        **more,  # type: ignore[arg-type]
    )


def noise(height: int = 60, width: int = 80, seed: int = 0) -> Frame:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def gradients(height: int, width: int) -> Frame:
    """Red grows to the right, green downwards."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([red, green, np.zeros_like(red)], axis=2).astype(np.uint8)


def save(path: Path, frame: Frame, **options: object) -> Path:
    Image.fromarray(frame).save(path, **options)  # type: ignore[arg-type]
    return path


def seen(augmentation: Augmentation, frame: Frame, seed: int = 0, caption: str = "") -> Frame:
    return augmentation.apply(augmentation.store(frame), seed, caption)


# Changed at random


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (32, 32), (5, 3), (10, 700)])
@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_a_picture_left_alone_is_what_the_runtime_sees(
    fit: str, shape: tuple[int, int], size: tuple[int, int], tmp_path: Path
) -> None:
    own = spec(*size, fit, fill=99, interpolation="bilinear")
    frame = noise(*shape)
    expected = preprocess(frame, own, "rgb")
    np.testing.assert_array_equal(seen(Augmentation(own), frame), expected)
    reader = PictureReader(Augmentation(own), FrameCache(tmp_path / "cache"))
    path = save(tmp_path / "x.png", frame)
    for _ in range(2):
        np.testing.assert_array_equal(reader.file(path), expected)
        np.testing.assert_array_equal(reader.member(path.read_bytes()), expected)
        reader.flush()


CHANGES = {
    "crop": Augmentation(spec(), crop=0.5),
    "flip": Augmentation(spec(), flip=True),
    "rotate": Augmentation(spec(), rotate=30),
    "jitter": Augmentation(spec(), jitter=0.5),
    "all": Augmentation(spec(), crop=0.5, flip=True, rotate=30, jitter=0.5),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_seed_fixes_the_change(name: str) -> None:
    frame = noise()
    found = [seen(CHANGES[name], frame, seed) for seed in range(20)]
    torch.manual_seed(12345)
    state = torch.random.get_rng_state()
    for seed, before in enumerate(found):
        np.testing.assert_array_equal(before, seen(CHANGES[name], frame, seed))
    assert torch.equal(state, torch.random.get_rng_state())
    distinct = len({image.tobytes() for image in found})
    assert distinct == 2 if name == "flip" else distinct >= 19


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(32, 32), (16, 40), (40, 16)])
@pytest.mark.parametrize("shape", [(60, 80), (1, 1), (3, 300), (300, 3), (600, 800), (1, 100)])
@pytest.mark.parametrize("name", CHANGES)
def test_every_picture_becomes_the_models_input(
    name: str, size: tuple[int, int], fit: str, shape: tuple[int, int]
) -> None:
    change = CHANGES[name]
    own = spec(*size, fit)
    changed = Augmentation(own, change.crop, change.flip, change.rotate, change.jitter)
    frame = noise(*shape)
    for seed in range(2):
        found = seen(changed, frame, seed)
        assert found.dtype == np.uint8 and found.shape == (*size, 3)


@pytest.mark.parametrize("crop", [1.0, 0.5])
@pytest.mark.parametrize("shape", [(1, 101), (700, 6)])
def test_strips_are_refused_as_by_the_runtime(crop: float, shape: tuple[int, int]) -> None:
    with pytest.raises(FrameError, match="sides differ by over 100 times"):
        Augmentation(spec(), crop=crop).store(noise(*shape))


@pytest.mark.parametrize(
    ("caption", "mirrored"),
    [
        ("a dog", True),
        ("a bright copyright sign", True),
        ("a dog on the left", False),
        ("LEFT of a tree", False),
        ("a right-hand glove", False),
        ("turning\nright.", False),
    ],
)
def test_what_names_a_side_is_never_mirrored(caption: str, mirrored: bool) -> None:
    augmentation = Augmentation(spec(), flip=True)
    frame = gradients(32, 32)
    found = [seen(augmentation, frame, seed, caption) for seed in range(100)]
    flipped = sum(np.array_equal(image, frame[:, ::-1]) for image in found)
    same = sum(np.array_equal(image, frame) for image in found)
    assert flipped + same == 100
    assert 30 < flipped < 70 if mirrored else flipped == 0


@pytest.mark.parametrize("crop", [0.9, 0.5, 0.1])
def test_a_crop_keeps_its_share_of_the_picture(crop: float) -> None:
    augmentation = Augmentation(spec(), crop=crop)
    frame = gradients(200, 200)
    shares = []
    for seed in range(60):
        image = seen(augmentation, frame, seed).astype(float)
        width, height = np.ptp(image[..., 0]) / 255, np.ptp(image[..., 1]) / 255
        shares.append(width * height)
    assert crop * 0.85 < min(shares) < crop + 0.3 * (1 - crop)
    assert max(shares) > crop + 0.3 * (1 - crop)


@pytest.mark.parametrize("crop", [0.9, 0.5, 0.1])
@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_the_smallest_square_crop_is_not_blown_up(crop: float, size: tuple[int, int]) -> None:
    augmentation = Augmentation(spec(*size), crop=crop)
    stored = augmentation.store(noise(400, 600))
    assert min(stored.shape[:2]) * crop**0.5 >= max(size)
    assert stored.shape[1] / stored.shape[0] == pytest.approx(1.5, abs=0.02)
    small = noise(20, 30)
    assert augmentation.store(small) is small  # never enlarged


@pytest.mark.parametrize(
    ("own", "shape"),
    [
        (spec(32, 32), (100, 100)),
        (spec(16, 64), (50, 200)),
        (spec(64, 16), (200, 50)),
        (spec(32, 32, "squash"), (60, 200)),
        (spec(32, 32, "squash"), (200, 60)),
    ],
)
def test_a_slight_crop_shows_nearly_what_the_runtime_shows(
    own: ImageSpec, shape: tuple[int, int]
) -> None:
    frame = gradients(*shape)
    whole = preprocess(frame, own, "rgb").astype(int)
    for seed in range(10):
        image = seen(Augmentation(own, crop=0.95), frame, seed)
        assert np.abs(image - whole).mean() < 8


@pytest.mark.parametrize("shape", [(90, 160), (160, 90)])
def test_crops_of_long_pictures_keep_their_shape_and_lie_anywhere(shape: tuple[int, int]) -> None:
    frame, places = gradients(*shape), set()
    for seed in range(20):
        red, green, _ = seen(Augmentation(spec(32, 32), crop=0.9), frame, seed).T.astype(float)
        width, height = (np.ptp(c) / 255 * side for c, side in ((red, shape[1]), (green, shape[0])))
        assert 0.7 < width / height < 1.4 and height * width > 0.75 * 90 * 90
        places.add(round((red if shape[1] > shape[0] else green).mean() / 25))
    assert len(places) >= 3


# Decoded


@pytest.mark.parametrize("side", [20, 37, 64, 100, 250])
def test_a_jpeg_is_never_decoded_below_the_asked_side(tmp_path: Path, side: int) -> None:
    for shape in [(side, side * 9 // 2), (side * 2 + 1, side * 2), (side * 8 - 1, side * 9)]:
        path = save(tmp_path / "x.jpg", noise(*shape))
        decoded = read_picture(path, side)
        assert min(decoded.shape[:2]) >= min(side, *shape)


def test_a_large_jpeg_is_decoded_at_a_fraction(tmp_path: Path) -> None:
    path = save(tmp_path / "x.jpg", noise(400, 800))
    assert read_picture(path, 50).shape == (50, 100, 3)
    assert read_picture(path, 51).shape == (100, 200, 3)
    assert read_picture(path).shape == (400, 800, 3)


def test_a_turned_photo_is_upright_also_when_reduced(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # turn right
    path = save(tmp_path / "x.jpg", gradients(160, 320), exif=exif)
    stored = PictureReader(Augmentation(spec(), crop=0.9)).file(path)
    assert stored.shape[0] > stored.shape[1]
    assert stored[5, 5, 1] > 200 and stored[-5, 5, 0] > 200


@pytest.mark.parametrize("crop", [1.0, 0.5])
def test_bad_pictures_are_errors_and_no_crash(data: Path, tmp_path: Path, crop: float) -> None:
    reader = PictureReader(Augmentation(spec(), crop=crop), FrameCache(tmp_path / "cache"))
    with (data / "badimages" / "manifest.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    read = set()
    for line in lines:
        path = data / "badimages" / line["file"]
        for whole in (False, True):
            try:
                stored = reader.member(path.read_bytes()) if whole else reader.file(path)
                frame = reader.augmentation.apply(stored, 0, "")
            except FrameError as error:
                assert str(error)
            else:
                assert frame.shape == (32, 32, 3)
                read.add(line["file"])
            reader.flush()
    sound = {"metadata", "mode", "exif-rotation"}
    assert read >= {line["file"] for line in lines if line["kind"] in sound}
    assert not read & {line["file"] for line in lines if line["kind"] in ("truncated", "bomb")}


def test_a_member_that_cannot_be_read_is_named_by_nobody(tmp_path: Path) -> None:
    with pytest.raises(FrameError, match="not a picture"):
        PictureReader(Augmentation(spec())).member(b"text")


# Kept


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What has been decoded."""
    sources: list[object] = []

    def counted(source: Path | io.BytesIO, at_least: int | None) -> Frame:
        sources.append(source)
        return read_picture(source, at_least)

    monkeypatch.setattr("training.pictures.read_picture", counted)
    return sources


def reader(tmp_path: Path, **changes: float) -> PictureReader:
    augmentation = Augmentation(spec(), **{"crop": 0.5, **changes})  # type: ignore[arg-type]
    return PictureReader(augmentation, FrameCache(tmp_path / "cache"))


def test_a_picture_is_decoded_once(tmp_path: Path, decoded: list[object]) -> None:
    path = save(tmp_path / "x.png", noise())
    first = reader(tmp_path)
    frame = first.file(path)
    first.flush()
    again = reader(tmp_path)
    np.testing.assert_array_equal(again.file(path), frame)
    np.testing.assert_array_equal(first.file(path), frame)
    again.file(path)[:] = 0  # one's own copy
    np.testing.assert_array_equal(again.file(path), frame)
    assert len(decoded) == 1


def test_without_a_cache_each_read_decodes(tmp_path: Path, decoded: list[object]) -> None:
    path = save(tmp_path / "x.png", noise())
    plain = PictureReader(Augmentation(spec()))
    for _ in range(2):
        plain.file(path)
        plain.member(path.read_bytes())
        plain.flush()
    assert len(decoded) == 4


def test_what_changes_is_decoded_anew(tmp_path: Path, decoded: list[object]) -> None:
    path = save(tmp_path / "x.bmp", noise())

    def read(own: PictureReader) -> Frame:
        frame = own.file(path)
        own.flush()
        return frame

    before = read(reader(tmp_path))
    save(path, noise(seed=1))  # as many bytes
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert not np.array_equal(before, read(reader(tmp_path)))
    assert len(decoded) == 2
    read(reader(tmp_path, crop=0.1))
    read(reader(tmp_path, crop=1.0))
    assert len(decoded) == 4
    read(reader(tmp_path, flip=True))  # made of the same stored picture
    assert len(decoded) == 4


def test_pictures_of_shards_are_known_by_their_bytes(tmp_path: Path, decoded: list[object]) -> None:
    own = reader(tmp_path)
    found = []
    for level in (10, 200, 10):
        content = solid(level, kind="bmp")  # all of one length
        found.append(int(own.member(content)[0, 0, 0]))
        own.flush()
    assert found == [10, 200, 10] and len(decoded) == 2


def test_a_picture_that_cannot_be_read_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"")
    own = reader(tmp_path)
    for _ in range(2):
        with pytest.raises(FrameError):
            own.file(path)
        own.flush()
    path.write_bytes(solid(7))
    assert own.file(path).max() == 7


def test_two_caches_of_one_folder_in_one_process(tmp_path: Path) -> None:
    one, other = FrameCache(tmp_path / "c"), FrameCache(tmp_path / "." / "c")
    one.put({b"1": noise(seed=1)})
    other.put({b"2": noise(seed=2)})
    del other
    np.testing.assert_array_equal(one.get(b"2"), noise(seed=2))
    assert one.get(b"3") is None
    copied = pickle.loads(pickle.dumps(one))
    np.testing.assert_array_equal(copied.get(b"1"), noise(seed=1))


def run(function: Callable[[], None]) -> int:
    """What a forked process ends with."""
    process = multiprocessing.get_context("fork").Process(target=function, daemon=True)
    process.start()
    process.join(30)
    assert process.exitcode is not None
    return process.exitcode


def test_processes_write_and_read_at_once(tmp_path: Path) -> None:
    kept = FrameCache(tmp_path / "c")
    kept.put({b"0": noise()})  # open in the parent too
    context = multiprocessing.get_context("fork")

    def write(number: int) -> None:
        for n in range(30):
            kept.put({key_of(number, n): noise(8, 8, seed=100 * number + n)})
            assert kept.get(b"0") is not None

    workers = [context.Process(target=write, args=(number,), daemon=True) for number in range(3)]
    for worker in workers:
        worker.start()
    write(3)
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    for number in range(4):
        for n in range(30):
            frame = kept.get(key_of(number, n))
            np.testing.assert_array_equal(frame, noise(8, 8, seed=100 * number + n))


def test_a_killed_writer_loses_only_what_it_had_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = FrameCache(tmp_path / "c")

    class Deadly(dict[bytes, Frame]):
        def items(self) -> Any:
            yield b"2", noise(seed=2)
            os.kill(os.getpid(), signal.SIGKILL)

    def write() -> None:
        kept.put({b"1": noise(seed=1)})
        kept.put(Deadly({b"2": noise()}))

    assert run(write) == -signal.SIGKILL
    np.testing.assert_array_equal(kept.get(b"1"), noise(seed=1))
    assert kept.get(b"2") is None
    kept.put({b"2": noise(seed=3)})  # its lock is free
    np.testing.assert_array_equal(kept.get(b"2"), noise(seed=3))


def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path) -> None:
    kept = FrameCache(tmp_path / "c")

    def write() -> None:
        kept.put({b"1": noise(seed=1)})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(DataError, match=f"--cache {tmp_path}/c cannot be written: "):
            kept.put({b"%d" % n: noise(seed=n) for n in range(2, 30)})

    assert run(write) == 0
    np.testing.assert_array_equal(kept.get(b"1"), noise(seed=1))
    assert kept.get(b"2") is None


def test_no_room_in_the_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "ADDRESS_SPACE", 1 << 16)
    own = PictureReader(Augmentation(spec(224, 224)), FrameCache(tmp_path / "c"))
    own.member(solid(1))
    with pytest.raises(DataError, match="c cannot be written"):
        own.flush()


def test_a_cache_that_is_damaged_or_no_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="file cannot be opened"):
        FrameCache(tmp_path / "file").get(b"1")
    FrameCache(tmp_path / "c").put({b"1": noise()})
    (tmp_path / "c" / "data.mdb").write_bytes(b"something else" * 1000)
    with pytest.raises(DataError, match="c cannot be opened"):
        FrameCache(tmp_path / "c").get(b"1")
