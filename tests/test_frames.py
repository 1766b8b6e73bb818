"""Frames and pictures: exact preprocessing, and one clear error for what cannot be used."""

import csv
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from runtime.errors import EdgeClipError, FrameError
from runtime.frames import check_frame, read_picture
from runtime.manifest import ImageSpec
from runtime.preprocess import preprocess
from runtime.sources import find_files, frames_of
from training import torchvision_ops as torchvision_ops

# isort: split
from open_clip.transform import PreprocessCfg, image_transform_v2

MODES = {"crop": "shortest", "squash": "squash", "pad": "longest"}


def spec(size: tuple[int, int], fit: str, interpolation: str = "bicubic") -> ImageSpec:
    return ImageSpec(
        height=size[0],
        width=size[1],
        mean=(0, 0, 0),
        std=(1, 1, 1),
        interpolation=interpolation,  # type: ignore[arg-type]
        fit=fit,  # type: ignore[arg-type]
        fill=0,
    )


def picture(height: int, width: int) -> NDArray[np.uint8]:
    """Coarse and fine structure, so that a resize without antialias would show."""
    rng = np.random.default_rng(height * width)
    coarse = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    fine = rng.integers(-40, 40, (height, width, 3))
    return (np.asarray(smooth, dtype=np.int64) + fine).clip(0, 255).astype(np.uint8)


def reference(image: NDArray[np.uint8], wanted: ImageSpec) -> NDArray[np.float64]:
    config = PreprocessCfg(
        size=(wanted.height, wanted.width),
        mean=(0, 0, 0),
        std=(1, 1, 1),
        interpolation=wanted.interpolation,
        resize_mode=MODES[wanted.fit],
    )
    tensor = image_transform_v2(config, is_train=False)(Image.fromarray(image))
    return np.asarray(tensor.permute(1, 2, 0).numpy() * 255, dtype=np.float64)


@pytest.mark.parametrize("fit", MODES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(480, 640), (641, 333), (224, 224), (90, 57), (1080, 1920)])
def test_pixels_equal_the_models_own_transform(
    shape: tuple[int, int], interpolation: str, fit: str
) -> None:
    image, wanted = picture(*shape), spec((224, 224), fit, interpolation)
    np.testing.assert_allclose(
        preprocess(image, wanted, "rgb"), reference(image, wanted), atol=0.01
    )


def test_a_model_that_is_not_square() -> None:
    image, wanted = picture(300, 500), spec((128, 96), "crop")
    np.testing.assert_allclose(
        preprocess(image, wanted, "rgb"), reference(image, wanted), atol=0.01
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 99), (2, 3), (99, 1)])
@pytest.mark.parametrize("fit", MODES)
def test_odd_shapes(shape: tuple[int, int], fit: str) -> None:
    frame = np.full((*shape, 3), 77, dtype=np.uint8)
    small = preprocess(frame, spec((32, 32), fit))
    assert small.shape == (32, 32, 3) and small.dtype == np.uint8
    if fit != "pad":
        assert (small == 77).all()


def test_gray_and_nv12() -> None:
    gray = picture(64, 96)[..., 0]
    small = preprocess(gray, spec((32, 32), "crop"), "gray")
    assert (small[..., 0] == small[..., 2]).all()
    nv12 = np.full((96, 96), 128, dtype=np.uint8)  # 64 x 96: luma 128, no colour
    assert np.abs(preprocess(nv12, spec((32, 32), "crop"), "nv12").astype(int) - 130).max() <= 2


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


def test_exif_orientation(tmp_path: Path) -> None:
    upright = Image.fromarray(picture(40, 60))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter: stored sideways
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_picture(tmp_path / "turned.png"), np.asarray(upright))


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
