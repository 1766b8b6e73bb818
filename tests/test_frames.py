"""Frames and pictures: what is read, and one clear error for what cannot be used."""

import csv
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.errors import EdgeClipError, FrameError
from runtime.frames import check_frame, check_roi, read_picture
from runtime.sources import find_files, frames_of


@pytest.mark.parametrize(
    ("frame", "color", "message"),
    [
        (np.zeros((4, 4, 3), dtype=np.float32), "bgr", "float32.*convert"),
        (np.full((4, 4, 3), np.nan), "bgr", "float64"),
        (np.zeros((4, 4, 3), dtype=np.int64), "bgr", "int64"),
        (np.zeros((4, 4), dtype=np.uint8), "bgr", r"\(height, width, 3\).*\(4, 4\)"),
        (np.zeros((4, 4, 4), dtype=np.uint8), "bgr", "bgr frame"),
        (np.zeros((3, 4, 4), dtype=np.uint8), "rgb", "rgb frame"),
        (np.zeros((4, 4, 3), dtype=np.uint8), "gray", "gray frame"),
        (np.zeros((4, 5), dtype=np.uint8), "nv12", "nv12 frame"),
        (np.zeros((2, 4, 4, 3), dtype=np.uint8), "bgr", "bgr frame"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "bgr", "empty"),
        (np.zeros((1, 101, 3), dtype=np.uint8), "bgr", "differ by over 100 times"),
        (np.zeros((4, 4, 3), dtype=np.uint8), "hsv", "color='hsv' is not known"),
        ([[1, 2], [3, 4]], "bgr", "not list"),
        (None, "bgr", "not NoneType"),
    ],
)
def test_bad_frames(frame: object, color: str, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        check_frame(frame, color)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("roi", "message"),
    [
        ((0, 0, 0, 5), r"the roi \(0, 0, 0, 5\) is empty"),
        ((0, 0, 5, -1), "is empty"),
        ((-1, 0, 5, 5), "reaches outside the frame of 20 x 10 pixels"),
        ((0, 6, 5, 5), "outside"),
        ((16, 0, 5, 5), "outside"),
        ((0, 0, 5), "in whole pixels of the frame, not"),
        ((0, 0, 5.0, 5), "whole pixels"),
        ("abcd", "whole pixels"),
        (7, "whole pixels"),
    ],
)
def test_bad_rois(roi: object, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        check_roi(roi, 20, 10)


def test_rois() -> None:
    assert check_roi(None, 20, 10) == (0, 0, 20, 10)
    assert check_roi(np.array([16, 6, 4, 4]), 20, 10) == (16, 6, 4, 4)
    with pytest.raises(FrameError, match="differ by over 100 times"):
        check_roi((0, 0, 1, 101), 200, 200)


def test_exif_orientation(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    upright = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter: stored sideways
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_picture(tmp_path / "turned.png"), pixels)


def test_picture_modes(tmp_path: Path) -> None:
    sixteen = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024).astype(np.uint16)
    Image.fromarray(sixteen).save(tmp_path / "sixteen.png")
    assert read_picture(tmp_path / "sixteen.png")[0, 4].tolist() == [16, 16, 16]
    for mode in ("1", "L", "P", "RGBA", "CMYK"):
        path = tmp_path / f"{mode}.tif"
        Image.new(mode, (5, 4)).save(path)
        assert read_picture(path).shape == (4, 5, 3)


def test_wide_gray_is_scaled_or_refused(tmp_path: Path) -> None:
    """16-bit PGM opens in a 32-bit mode; clipping it would turn it white."""
    header = b"P5 3 1 65535\n"
    (tmp_path / "ramp.pgm").write_bytes(header + np.array([0, 32768, 65535], ">u2").tobytes())
    assert read_picture(tmp_path / "ramp.pgm")[0, :, 0].tolist() == [0, 128, 255]
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(FrameError, match="mode F"):
        read_picture(tmp_path / "float.tif")


def png_of(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rest = chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rest


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.jpg", b"this is a text\n", "not a picture"),
        ("empty.jpg", b"", "not a picture"),
        ("cut.png", png_of(8, 8)[:40], "picture"),
        ("bomb.png", png_of(11_000, 10_000), r"11000 x 10000 pixels|at most"),
        ("script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_pictures(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FrameError, match=message):
        read_picture(tmp_path / name)


def test_picture_that_is_missing_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FrameError, match="there is no picture"):
        read_picture(tmp_path / "no.png")
    with pytest.raises(FrameError, match="cannot be read"):
        read_picture(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_hostile_pictures(data: Path) -> None:
    """Each is read or refused by name; nothing hangs, crashes or raises anything else."""
    with (data / "badimages" / "manifest.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    read = {}
    for row in rows:
        try:
            read[row["file"]] = read_picture(data / "badimages" / row["file"])
        except FrameError as error:
            assert row["file"].split("/")[1] in str(error)
    for row in rows:
        if row["kind"] in ("truncated", "bomb", "crasher"):
            assert row["file"] not in read, row
    turned = [read[f"files/Landscape_{n}.jpg"] for n in (1, 3, 6, 8)]
    assert {image.shape for image in turned} == {(1200, 1800, 3)}
    assert len(read) >= 20


def test_find_files(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FrameError, match="no pictures and no videos"):
        find_files([tmp_path / "empty"])
    with pytest.raises(FrameError, match="no file or folder"):
        find_files([tmp_path / "nowhere"])
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.JPG", format="JPEG")
    (tmp_path / "notes.txt").write_text("no picture")
    assert [p.name for p in find_files([tmp_path])] == ["a.JPG", "b.png"]


def test_videos(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (32, 24))
    for level in range(0, 100, 20):
        writer.write(np.full((24, 32, 3), level, dtype=np.uint8))
    writer.release()
    found = list(frames_of(path, every=2))
    assert [name.rpartition("#")[2] for name, _, _ in found] == ["0", "2", "4"]
    assert found[1][1].shape == (24, 32, 3) and found[1][2] == "bgr"
    cut = tmp_path / "cut.avi"
    writer = cv2.VideoWriter(str(cut), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    rng = np.random.default_rng(0)
    for _ in range(60):
        writer.write(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    writer.release()
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    with pytest.raises(FrameError, match="cut off: it ends after"):
        list(frames_of(cut))
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(EdgeClipError, match="is not a video"):
        list(frames_of(tmp_path / "broken.mp4"))
