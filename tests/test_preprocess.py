"""Preprocessing: the pixels of the model's own transform, from every kind of frame."""

import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import runtime
from runtime import opencv, resize
from runtime.errors import BackendUnavailable, FrameError
from runtime.frames import Color, Frame, read_picture
from runtime.manifest import ImageSpec
from runtime.preprocess import preprocess, preprocess_regions

MODES = {"crop": "shortest", "squash": "squash", "pad": "longest"}
CHANNELS: dict[Color, int] = {"bgr": 3, "rgb": 3, "bgra": 4, "gray": 1, "nv12": 1}


def spec(size: tuple[int, int], fit: str, interpolation: str = "bicubic") -> ImageSpec:
    return ImageSpec(
        height=size[0],
        width=size[1],
        mean=(0, 0, 0),
        std=(1, 1, 1),
        interpolation=interpolation,  # type: ignore[arg-type]
        fit=fit,  # type: ignore[arg-type]
        fill=7,
    )


SMALL = spec((32, 32), "crop")


def picture(height: int, width: int, noise: int = 40) -> Frame:
    """Coarse and fine structure, so that a resize without antialias would show."""
    rng = np.random.default_rng(height * width)
    coarse = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    fine = rng.integers(-noise, noise, (height, width, 3))
    return (np.asarray(smooth, dtype=np.int64) + fine).clip(0, 255).astype(np.uint8)


def noise(height: int, width: int, color: Color) -> Frame:
    """A frame of that size with anything in it."""
    rng = np.random.default_rng(height * width)
    shape = (height * 3 // 2, width) if color == "nv12" else (height, width, CHANNELS[color])
    return rng.integers(0, 256, shape, dtype=np.uint8)


def reference(image: Frame, wanted: ImageSpec) -> NDArray[np.int64]:
    """What open_clip's own transform makes of it, in whole levels."""
    pytest.importorskip("torch")
    from training import torchvision_ops as torchvision_ops

    # isort: split
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = PreprocessCfg(
        size=(wanted.height, wanted.width),
        mean=(0, 0, 0),
        std=(1, 1, 1),
        interpolation=wanted.interpolation,
        resize_mode=MODES[wanted.fit],
        fill_color=wanted.fill,
    )
    tensor = image_transform_v2(config, is_train=False)(Image.fromarray(image))
    return np.asarray((tensor.permute(1, 2, 0) * 255).round().long().numpy())


def assert_near(found: Frame, expected: NDArray[np.int64]) -> None:
    """The bar: 0.5 of 255 in the mean, and 99.9 % of the values within 2."""
    apart = np.abs(found.astype(np.int64) - expected)
    assert apart.mean() < 0.5 and (apart > 2).mean() < 0.001, (apart.mean(), (apart > 2).mean())


@pytest.fixture
def no_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opencv, "opencv", lambda: ImportError("there is no OpenCV"))


# The model's own transform


@pytest.mark.parametrize("fit", MODES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(480, 640), (541, 433), (224, 224), (90, 57), (720, 888)])
def test_equals_the_models_own_transform(
    shape: tuple[int, int], interpolation: str, fit: str
) -> None:
    image, wanted = picture(*shape), spec((224, 224), fit, interpolation)
    np.testing.assert_array_equal(preprocess(image, wanted, "rgb"), reference(image, wanted))


def test_a_model_that_is_not_square() -> None:
    image, wanted = picture(300, 500), spec((128, 96), "crop")
    np.testing.assert_array_equal(preprocess(image, wanted, "rgb"), reference(image, wanted))


def test_a_tall_picture_is_resized_as_by_pillow_13() -> None:
    """Before that Pillow resized the columns first, and rounded other values between."""
    image = picture(641, 333)
    rows_first = Image.fromarray(image).resize((333, 224), Image.Resampling.BICUBIC)
    expected = np.asarray(rows_first.resize((224, 224), Image.Resampling.BICUBIC))
    found = preprocess(image, spec((224, 224), "squash"), "rgb")
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("fit", MODES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1080, 1920), 224),  # halved once
        ((899, 1203), 224),  # hardly more than 4 times, and odd
        ((768, 577), 64),  # halved twice, to a small result: much of it is border
        ((1083, 2171), 64),  # what is left over at the end is 3 of 4
    ],
)
def test_a_large_frame_is_near_the_models_own_transform(
    shape: tuple[int, int], size: int, interpolation: str, fit: str
) -> None:
    image, wanted = picture(*shape, noise=12), spec((size, size), fit, interpolation)
    assert_near(preprocess(image, wanted, "rgb"), reference(image, wanted))


@pytest.mark.parametrize("fit", MODES)
def test_real_photos_at_a_small_size(data: Path, fit: str) -> None:
    """Sharp to the pixel, and reduced 5 to 8 times: what halving could spoil most."""
    wanted = spec((64, 64), fit)
    photos = [read_picture(p) for p in sorted((data / "photos/images").glob("*.jpg"))[::15]]
    found = np.stack([preprocess(photo, wanted, "rgb") for photo in photos])
    assert_near(found, np.stack([reference(photo, wanted) for photo in photos]))


def test_embeddings_of_large_frames(bundle: Path) -> None:
    classifier = runtime.load(bundle)
    wanted = classifier.bundle.manifest.image
    for height, width in [(200, 300), (480, 640), (1080, 1920)]:
        image = picture(height, width)
        expected = classifier.embed(reference(image, wanted).astype(np.uint8), "rgb")
        assert float(classifier.embed(image, "rgb") @ expected) > 0.999


# Frames of every kind


@pytest.mark.parametrize("shape", [(1, 1), (1, 99), (2, 3), (99, 1), (70, 1), (900, 9), (3, 300)])
@pytest.mark.parametrize("fit", MODES)
def test_odd_shapes_of_one_level(shape: tuple[int, int], fit: str) -> None:
    frame = np.full((*shape, 3), 77, dtype=np.uint8)
    small = preprocess(frame, spec((8, 8), fit))
    assert small.shape == (8, 8, 3) and small.dtype == np.uint8
    assert set(np.unique(small)) <= ({7, 77} if fit == "pad" else {77})


def test_channels_come_out_as_rgb() -> None:
    frame = np.zeros((300, 300, 4), dtype=np.uint8)
    frame[:] = 10, 20, 30, 200
    assert (preprocess(frame, SMALL, "bgra") == [30, 20, 10]).all()
    assert (preprocess(frame[..., :3], SMALL, "bgr") == [30, 20, 10]).all()
    assert (preprocess(frame[..., :3], SMALL, "rgb") == [10, 20, 30]).all()


@pytest.mark.parametrize("size", [60, 200, 500])
def test_gray_is_each_channel(size: int) -> None:
    frame = picture(size, size + 31)
    gray = preprocess(frame[..., 1], SMALL, "gray")
    assert (gray == preprocess(frame, SMALL, "rgb")[..., 1:2]).all()
    assert (gray == preprocess(frame[..., 1:2], SMALL, "gray")).all()


@pytest.mark.parametrize(("height", "width"), [(64, 96), (240, 320), (540, 362)])
def test_nv12_is_what_opencv_converts_it_to(height: int, width: int) -> None:
    cv2 = pytest.importorskip("cv2")
    frame = noise(height, width, "nv12")
    bgr = cv2.cvtColor(frame, cv2.COLOR_YUV2BGR_NV12)
    for roi in (None, (3, 5, 51, 43), (1, 0, 63, 64)):
        np.testing.assert_array_equal(
            preprocess(frame, SMALL, "nv12", roi), preprocess(bgr, SMALL, "bgr", roi)
        )


VIEWS: dict[str, Callable[[Frame], Frame]] = {
    "upside down": lambda f: f[::-1],
    "every other": lambda f: f[::2, ::2],
    "every other row": lambda f: f[::2],
    "a part": lambda f: f[10:-8, 6:-4],
    "mirrored": lambda f: f[:, ::-1],
    "by columns": np.asfortranarray,
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("color", CHANNELS)
@pytest.mark.parametrize("side", [90, 300])
def test_any_strides(view: str, color: Color, side: int) -> None:
    frame = VIEWS[view](noise(side, side, color))
    if color == "nv12":
        frame = frame[: frame.shape[0] // 3 * 3, : frame.shape[1] // 2 * 2]
    before = frame.copy()
    frame.flags.writeable = False
    np.testing.assert_array_equal(preprocess(frame, SMALL, color), preprocess(before, SMALL, color))
    np.testing.assert_array_equal(frame, before)


@pytest.mark.parametrize("side", [90, 300])
def test_channels_backwards_and_repeated_rows(side: int) -> None:
    frame = picture(side, side)
    np.testing.assert_array_equal(
        preprocess(frame[..., ::-1], SMALL), preprocess(frame, SMALL, "rgb")
    )
    row = np.broadcast_to(frame[:1], frame.shape)
    np.testing.assert_array_equal(preprocess(row, SMALL), preprocess(row.copy(), SMALL))


@pytest.mark.usefixtures("no_opencv")
def test_without_opencv_the_pixels_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        (noise(height, width, color), color)
        for height, width in [(50, 70), (150, 201), (402, 333)]
        for color in CHANNELS
        if color != "nv12"
    ]
    without = [preprocess(frame, SMALL, color) for frame, color in cases]
    monkeypatch.undo()
    pytest.importorskip("cv2")
    for (frame, color), expected in zip(cases, without, strict=True):
        np.testing.assert_array_equal(preprocess(frame, SMALL, color), expected)


@pytest.mark.usefixtures("no_opencv")
def test_nv12_without_opencv() -> None:
    with pytest.raises(BackendUnavailable, match="NV12 frames need OpenCV.*there is no OpenCV"):
        preprocess(noise(64, 64, "nv12"), SMALL, "nv12")


# Parts of frames


@pytest.mark.parametrize("color", CHANNELS)
@pytest.mark.parametrize("roi", [(0, 0, 640, 480), (11, 7, 301, 400), (600, 0, 40, 30)])
def test_a_roi_is_as_a_frame_of_its_own(roi: tuple[int, int, int, int], color: Color) -> None:
    frame, (x, y, width, height) = noise(480, 640, color), roi
    whole = frame
    if color == "nv12":
        cv2 = pytest.importorskip("cv2")
        whole, color = cv2.cvtColor(frame, cv2.COLOR_YUV2BGR_NV12), "bgr"
    cut = whole[y : y + height, x : x + width].copy()
    expected = preprocess(cut, SMALL, color)
    found = preprocess(frame, SMALL, "nv12" if whole is not frame else color, roi)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("color", CHANNELS)
def test_regions_are_as_one_by_one(color: Color) -> None:
    frame = noise(480, 640, color)
    regions = [(100, 90, 31, 47), (0, 0, 640, 480), (301, 201, 200, 150)]
    expected = [preprocess(frame, SMALL, color, roi) for roi in regions]
    np.testing.assert_array_equal(preprocess_regions(frame, regions, SMALL, color), expected)
    assert preprocess_regions(frame, [], SMALL, color).shape == (0, 32, 32, 3)


def test_a_roi_of_a_picture_file(tmp_path: Path) -> None:
    image = picture(90, 120)
    Image.fromarray(image).save(tmp_path / "a.png")
    found = preprocess(tmp_path / "a.png", SMALL, roi=(10, 20, 60, 50))
    np.testing.assert_array_equal(found, preprocess(image[20:70, 10:70], SMALL, "rgb"))


def test_a_roi_outside_the_picture_of_an_nv12_frame() -> None:
    with pytest.raises(FrameError, match="outside the frame of 64 x 64 pixels"):
        preprocess(noise(64, 64, "nv12"), SMALL, "nv12", (0, 32, 64, 64))


def test_classify_regions(bundle: Path) -> None:
    classifier, frame = runtime.load(bundle), picture(120, 160)
    runs: list[int] = []
    encoder = classifier._image
    classifier._image = lambda batch: runs.append(len(batch)) or encoder(batch)  # type: ignore
    regions = np.array([[0, 0, 50, 60], [70, 10, 90, 110]])
    found = classifier.classify_regions(frame, regions)  # type: ignore[arg-type]
    assert runs == [2] and classifier.classify_regions(frame, []) == []
    for prediction, roi in zip(found, regions, strict=True):
        alone = classifier.classify(frame, roi=tuple(roi))
        np.testing.assert_allclose(prediction.cosines, alone.cosines, atol=1e-5)
    with pytest.raises(FrameError, match="outside"):
        classifier.classify_regions(frame, [(0, 0, 10, 10), (150, 0, 20, 20)])


def test_a_batch_of_different_sizes_and_one_roi(bundle: Path) -> None:
    classifier = runtime.load(bundle)
    frames = [picture(60, 80), picture(50, 50), picture(400, 300)]
    found = classifier.classify_batch(frames, roi=(5, 6, 40, 30))
    for frame, prediction in zip(frames, found, strict=True):
        cosines = classifier.require_bank().embeddings @ classifier.embed(frame[6:36, 5:45])
        np.testing.assert_allclose(prediction.cosines, cosines, atol=1e-5)


# Memory


def test_out_is_written_and_checked() -> None:
    out = np.empty((32, 32, 3), dtype=np.uint8)
    found = preprocess(picture(80, 90), SMALL, out=out)
    assert np.shares_memory(found, out)
    np.testing.assert_array_equal(out, preprocess(picture(80, 90), SMALL))
    with pytest.raises(FrameError, match=r"out must be uint8 of shape \(1, 32, 32, 3\)"):
        preprocess(picture(80, 90), SMALL, out=np.empty((32, 31, 3), dtype=np.uint8))


def test_results_share_no_memory() -> None:
    first = preprocess(picture(200, 300), SMALL)
    kept = first.copy()
    preprocess(picture(300, 200), SMALL)
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("color", CHANNELS)
@pytest.mark.parametrize("side", [150, 602])
def test_frames_of_one_size_allocate_nothing(color: Color, side: int) -> None:
    frame, out = noise(side, side, color), np.empty((32, 32, 3), dtype=np.uint8)
    preprocess(frame, SMALL, color, out=out)
    tracemalloc.start()
    try:
        preprocess(frame, SMALL, color, out=out)
        # but what numpy casts through, 8192 values at a time
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_threads_do_not_meet() -> None:
    """Each has frames of its own sizes and colours; in the end all have the right pixels."""
    jobs = [
        [(noise(70 + 60 * n + 40 * i, 90 + 30 * i, color), color) for i in range(4)]
        for n, color in enumerate(CHANNELS)
    ]
    expected = [[preprocess(frame, SMALL, color) for frame, color in job] for job in jobs]
    wrong: list[str] = []

    def work(number: int) -> None:
        for _ in range(20):
            for (frame, color), right in zip(jobs[number], expected[number], strict=True):
                if (preprocess(frame, SMALL, color) != right).any():
                    wrong.append(color)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("shape", [(720, 1280), (1080, 1920), (1400, 150)])
def test_products_are_too_small_for_threads(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else OpenBLAS splits them up, and each waits for the slowest core."""
    sizes: list[int] = []
    matmul = np.matmul

    def counted(a: NDArray[np.float32], b: NDArray[np.float32], out: NDArray[np.float32]) -> None:
        sizes.append(a.shape[-2] * a.shape[-1] * b.shape[-1])
        matmul(a, b, out=out)

    monkeypatch.setattr(np, "matmul", counted)
    preprocess(np.zeros((*shape, 3), dtype=np.uint8), spec((224, 224), "squash"))
    assert 0 < max(sizes) <= resize.ONE_THREAD
