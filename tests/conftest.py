"""What the tests share: small real data, and a bundle trained and exported from it once.

Nothing but the runtime is imported before it is needed: the runtime's own tests also run where
torch is not, on a bundle that $EDGECLIP_TEST_BUNDLE names (see test_packaging.py).
"""

import io
import json
import os
import shutil
import signal
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from runtime.manifest import TextSpec
from runtime.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
# Real photos, captions, clips and broken pictures, where a developer has them.
DATA = Path(os.environ.get("EDGECLIP_TEST_DATA", ROOT.parent / "shared" / "data"))
COLORS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 80, 230)}


# Tests that send Ctrl-C work in the background too, where shells have it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("realtime"):
            item.add_marker(pytest.mark.flaky(reruns=3, reruns_delay=1))


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a machine finds out is kept apart from the developer's own: here for fixtures that
    several tests share, below for each test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGECLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _cache_of_a_test(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGECLIP_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def data() -> Path:
    if not DATA.is_dir():
        pytest.skip(f"the real test data is not here ({DATA}); set EDGECLIP_TEST_DATA")
    return DATA


def square(color: Sequence[int], rng: np.random.Generator, size: int = 40) -> NDArray[np.uint8]:
    """A noisy RGB frame, wider than high, with a square of one colour somewhere."""
    frame = rng.integers(0, 50, (size, size * 5 // 4, 3))
    top, left = rng.integers(2, size // 2, 2)
    frame[top : top + size // 2, left : left + size // 2] = color
    return (frame + rng.integers(0, 20, frame.shape)).clip(0, 255).astype(np.uint8)


def write_squares(folder: Path, each: int, seed: int) -> Path:
    """`folder/<color>/<n>.png`, `each` of every colour."""
    rng = np.random.default_rng(seed)
    for name, color in COLORS.items():
        (folder / name).mkdir(parents=True)
        for n in range(each):
            Image.fromarray(square(color, rng)).save(folder / name / f"{n}.png")
    return folder


def solid(level: int, size: tuple[int, int] = (12, 10), kind: str = "png") -> bytes:
    """A picture file of one colour, by which it can be told from others."""
    content = io.BytesIO()
    Image.new("RGB", size, (level, 0, 0)).save(content, "JPEG" if kind == "jpg" else kind)
    return content.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes | str], mode: str = "w") -> Path:
    """A tar file of these members; `mode` "w:gz" compresses it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """CLIP's own, 12 tokens long."""
    pytest.importorskip("torch")
    from training.text import clip_tokenizer

    spec = TextSpec(
        context_length=12,
        start_id=49406,
        end_id=49407,
        pad_id=0,
        cleaning="lower",
        templates=("a {}",),
    )
    return Tokenizer(clip_tokenizer(), spec)


@pytest.fixture(scope="session")
def tiny_config() -> Path:
    return Path(__file__).parent / "tiny.json"


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("squares") / "train", each=24, seed=0)


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> Path:
    """A ViT of less depth and width than the teacher's."""
    config = json.loads(tiny_config.read_text())
    config["vision_cfg"] |= {"layers": 1, "width": 32}
    file = tmp_path_factory.mktemp("half") / "half.json"
    file.write_text(json.dumps(config))
    return file


@pytest.fixture(scope="session")
def unlabelled(tmp_path_factory: pytest.TempPathFactory, squares: Path) -> Path:
    """The squares, without their folders."""
    folder = tmp_path_factory.mktemp("unlabelled")
    for number, file in enumerate(sorted(squares.rglob("*.png"))):
        shutil.copy(file, folder / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, squares: Path, tiny_config: Path) -> Path:
    pytest.importorskip("torch")
    from training.options import TrainOptions
    from training.trainer import train

    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    options = TrainOptions(
        data=str(squares),
        val=write_squares(folder.parent / "val", each=8, seed=1),
        out=folder,
        model=str(tiny_config),
        templates=("a {} square", "{}"),
        epochs=12,
        batch_size=24,
        lr=3e-3,
        crop=1.0,
        workers=0,
    )
    train(options, quiet=True)
    return folder


@pytest.fixture(scope="session")
def bundle(request: pytest.FixtureRequest) -> Path:
    """Of a small CLIP that knows squares of three colours, in fp32."""
    if made := os.environ.get("EDGECLIP_TEST_BUNDLE"):
        return Path(made)
    pytest.importorskip("torch")
    from export.bundle import ExportOptions, export_bundle

    checkpoint: Path = request.getfixturevalue("checkpoint")
    folder = checkpoint.parent / "bundle"
    options = ExportOptions(
        checkpoint=str(checkpoint),
        bundle=folder,
        labels=tuple(COLORS),
        templates=("a {} square", "{}"),
    )
    export_bundle(options, quiet=True)
    return folder


@pytest.fixture
def bundle_copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def every_precision(
    checkpoint: Path, squares: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle of every precision, with a bank that is fitted to each. Not to be changed."""
    from export.bundle import ExportOptions, export_bundle
    from export.precisions import CalibrationOptions

    folder = tmp_path_factory.mktemp("every") / "bundle"
    judged = write_squares(folder.parent / "judged", each=6, seed=9)
    options = ExportOptions(
        checkpoint=str(checkpoint),
        bundle=folder,
        labels=tuple(COLORS),
        templates=("a {} square", "{}"),
        precisions=CalibrationOptions(calibrate=(squares,), judge=(judged,), frames=32),
    )
    export_bundle(options, quiet=True)
    return folder
