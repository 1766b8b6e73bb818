"""Locked towers run once: what is cut off, computed, kept, and computed anew."""

import dataclasses
import json
import multiprocessing
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import Progress
from torch import Tensor

from calibration.pairs import Pairs, read_pairs
from runtime.errors import DataError, FrameError
from training import features
from training.augment import Augmentation
from training.cache import FrameCache
from training.evaluate import normalise
from training.features import Cut, FeatureStore, cut
from training.fold import folded
from training.groups import image_groups, lock, set_training
from training.model import ClipModel, create
from training.pictures import PictureReader

Features = NDArray[np.float16]
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def make(folder: Path, timm: str | None = None, **more: Any) -> ClipModel:
    """A small model with open_clip's own ViT, or a timm net; with unlike batch norm statistics."""
    fields = json.loads((Path(__file__).parent / "tiny.json").read_text())
    fields["text_cfg"] |= {"width": 16, "vocab_size": 49408}
    if timm:
        fields["vision_cfg"] = {
            "timm_model_name": timm,
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 32,
        }
    fields["vision_cfg"] |= more
    file = folder / "model.json"
    file.write_text(json.dumps(fields))
    clip = create(str(file))
    generator = torch.Generator().manual_seed(0)
    for name, tensor in clip.model.visual.named_buffers():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.05, generator=generator)
        if name.endswith("running_var"):
            tensor.uniform_(0.02, 0.1, generator=generator)
    return clip


def trained(clip: ClipModel) -> ClipModel:
    """The same, its weights given by some start: none is fresh."""
    return dataclasses.replace(clip, fresh=frozenset())


def lock_all_but(clip: ClipModel, unlocked: int) -> None:
    lock(clip, image_groups(clip.model), unlocked, "--lock-image")


def pixels(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of folded batch normalisation."""
    largest = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * largest)


# Cutting


@pytest.mark.parametrize("unlocked", range(6))
@pytest.mark.parametrize("timm", ["test_resnet", "test_efficientnet"])
def test_a_chain_of_layers_can_be_cut_anywhere(tmp_path: Path, timm: str, unlocked: int) -> None:
    clip = trained(make(tmp_path, timm))
    lock_all_but(clip, unlocked)
    where = cut(clip)
    assert where is not None
    with torch.inference_mode():
        found = where.stem(pixels())
        assert_near(where.rest(found), clip.model.visual(pixels()))
    weights = {id(p) for p in clip.model.visual.parameters() if p.requires_grad}
    rest = {id(p) for p in where.rest.parameters()}
    assert weights <= rest and (rest == weights or unlocked)


@pytest.mark.parametrize("timm", ["test_resnet", "test_efficientnet", "repvit_m0_9"])
def test_batch_normalisation_is_folded_where_it_follows_a_convolution(
    tmp_path: Path, timm: str
) -> None:
    tower = trained(make(tmp_path, timm)).model.visual.eval()
    kinds = [
        [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        for net in (tower, folded(tower, pixels()))
    ]
    assert len(kinds[1]) < len(kinds[0]) / 2
    with torch.inference_mode():
        assert_near(folded(tower, pixels())(pixels(5)), tower(pixels(5)))


def test_the_rest_is_as_small_as_can_be(tmp_path: Path) -> None:
    clip = trained(make(tmp_path, "test_resnet"))
    sizes = []
    for unlocked in range(6):
        clip.model.requires_grad_(True)
        lock_all_but(clip, unlocked)
        where = cut(clip)
        assert where is not None
        sizes.append(sum(p.numel() for p in where.rest.parameters() if not p.requires_grad))
    assert sizes == [0] * 6


@pytest.mark.parametrize("timm", [None, "test_vit"])
def test_a_vit_is_cut_behind_its_end(tmp_path: Path, timm: str | None) -> None:
    clip = trained(make(tmp_path, timm))
    lock_all_but(clip, 0)
    where = cut(clip)
    assert where is not None and not list(where.rest.parameters())
    with torch.inference_mode():
        torch.testing.assert_close(where.rest(where.stem(pixels())), clip.model.visual(pixels()))


@pytest.mark.parametrize(
    ("timm", "unlocked"), [(None, 1), (None, 2), (None, 3), ("test_vit", 2), ("test_vit", 7)]
)
def test_a_partly_locked_vit_cannot_be_cut(tmp_path: Path, timm: str | None, unlocked: int) -> None:
    clip = trained(make(tmp_path, timm))
    lock_all_but(clip, unlocked)
    assert cut(clip) is None


def test_nothing_locked_nothing_cut(tmp_path: Path) -> None:
    assert cut(make(tmp_path)) is None


def test_a_random_projection_behind_a_locked_backbone_is_trained(tmp_path: Path) -> None:
    clip = make(tmp_path, "test_vit")
    clip = dataclasses.replace(clip, fresh=frozenset({"visual.head.proj.weight"}))
    lock_all_but(clip, 0)
    where = cut(clip)
    assert where is not None and where.last == "trunk"
    assert [n for n, _ in where.rest.named_parameters()] == ["head.proj.weight"]
    where.rest(where.stem(pixels())).sum().backward()
    assert clip.model.visual.head.proj.weight.grad is not None


def test_training_the_rest_trains_the_tower(tmp_path: Path) -> None:
    clip = trained(make(tmp_path, "test_resnet"))
    lock_all_but(clip, 2)
    where = cut(clip)
    assert where is not None
    before = clip.model.visual(pixels()).detach()
    set_training(where.rest)
    optimizer = torch.optim.SGD(where.rest.parameters(), lr=0.1)
    where.rest(where.stem(pixels()).detach()).square().sum().backward()
    optimizer.step()
    clip.model.eval()
    where.rest.eval()
    after = clip.model.visual(pixels()).detach()
    assert not torch.allclose(before, after)
    assert_near(where.rest(where.stem(pixels())), after)


# Computing and keeping


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    folder = tmp_path / "data"
    rng = np.random.default_rng(0)
    for name in ("left", "other"):
        (folder / name).mkdir(parents=True)
        for n in range(4):
            frame = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(frame).save(folder / name / f"{n}.bmp")
    return read_pairs(folder, ("a {}",))


class Locked:
    """A model whose image tower is locked, and a store of its features."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.clip = trained(make(folder, "test_resnet"))
        lock_all_but(self.clip, 1)
        self.views, self.seed, self.workers = 1, 0, 0
        self.augmentation = Augmentation(self.clip.image)
        self.cache: FrameCache | None = None
        vars(self).update(changes)
        self.folder = folder / "features"

    def where(self) -> Cut:
        found = cut(self.clip)
        assert found is not None
        return found

    def images(self, pairs: Pairs) -> tuple[Pairs, Features]:
        reader = PictureReader(self.augmentation, self.cache)
        store = FeatureStore(self.folder, reader, self.views, self.seed, self.workers)
        with Progress(disable=True) as progress:
            return store.images(self.clip, self.where(), pairs, progress)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures the tower was run on, call by call."""
    counts: list[int] = []
    real = features._run

    def counted(clip: ClipModel, where: Cut, frames: Any) -> Features:
        counts.append(len(frames))
        return real(clip, where, frames)

    monkeypatch.setattr(features, "_run", counted)
    return counts


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("workers", [0, 2])
def test_features_are_the_towers_own(tmp_path: Path, pairs: Pairs, workers: int) -> None:
    locked = Locked(tmp_path, workers=workers)
    kept, found = locked.images(pairs)
    assert kept.files == pairs.files and kept.bad == ()
    assert found.dtype == np.float16 and found.shape[:2] == (8, 1)
    reader = PictureReader(locked.augmentation)
    frames = torch.from_numpy(np.stack([reader.file(path) for path in pairs.files]))
    rows = torch.from_numpy(np.array(found[:, 0]))
    with torch.inference_mode():
        pixels = normalise(frames, locked.clip.image)
        torch.testing.assert_close(rows, locked.where().stem(pixels).half())
        expected = locked.clip.model.visual(pixels)
        result = locked.where().rest(rows.float())
    assert float((result - expected).abs().max()) < 2e-3 * float(expected.abs().max())


def test_the_second_time_they_are_read(tmp_path: Path, pairs: Pairs, runs: list[int]) -> None:
    kept, found = Locked(tmp_path).images(pairs)
    assert runs == [8]
    again = Locked(tmp_path).images(pairs)
    assert runs == [8] and again[0].files == kept.files
    np.testing.assert_array_equal(found, again[1])
    assert len(files(tmp_path / "features")) == 2


def change_weight(locked: Locked, pairs: Pairs) -> Pairs:
    with torch.no_grad():
        next(locked.clip.model.visual.parameters()).view(-1)[0] += 1e-3
    return pairs


def change_statistics(locked: Locked, pairs: Pairs) -> Pairs:
    dict(locked.clip.model.visual.named_buffers())["trunk.bn1.running_mean"][0] += 1e-3
    return pairs


def change_picture(locked: Locked, pairs: Pairs) -> Pairs:
    path = pairs.files[0]
    content = bytearray(path.read_bytes())
    content[-100] ^= 0xFF  # as many bytes
    path.write_bytes(content)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    return pairs


def other_folder(locked: Locked, pairs: Pairs) -> Pairs:
    """Other pictures of the same names, sizes and times."""
    folder = pairs.files[0].parents[1]
    other = folder.with_name("other")
    for path in pairs.files:
        twin = other / path.relative_to(folder)
        twin.parent.mkdir(parents=True, exist_ok=True)
        content = bytearray(path.read_bytes())
        content[-100] ^= 0xFF
        twin.write_bytes(content)
        os.utime(twin, ns=(0, path.stat().st_mtime_ns))
    return read_pairs(other, ("a {}",))


def change_captions(locked: Locked, pairs: Pairs) -> Pairs:
    return read_pairs(pairs.files[0].parents[1], ("the {}",))


def change_cut(locked: Locked, pairs: Pairs) -> Pairs:
    locked.clip.model.requires_grad_(True)
    lock_all_but(locked.clip, 2)
    return pairs


def change_views(locked: Locked, pairs: Pairs) -> Pairs:
    locked.views = 2
    return pairs


def change_seed(locked: Locked, pairs: Pairs) -> Pairs:
    locked.seed = 1
    return pairs


def change_augmentation(locked: Locked, pairs: Pairs) -> Pairs:
    locked.augmentation = Augmentation(locked.clip.image, flip=True)
    return pairs


def fewer_pictures(locked: Locked, pairs: Pairs) -> Pairs:
    return pairs.keep(range(7))


CHANGES: list[Callable[[Locked, Pairs], Pairs]] = [
    change_weight,
    change_statistics,
    change_picture,
    other_folder,
    change_captions,
    change_cut,
    change_views,
    change_seed,
    change_augmentation,
    fewer_pictures,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_has_changed_is_computed_anew(
    tmp_path: Path, pairs: Pairs, runs: list[int], change: Callable[[Locked, Pairs], Pairs]
) -> None:
    locked = Locked(tmp_path)
    _, before = locked.images(pairs)
    pairs = change(locked, pairs)
    _, after = locked.images(pairs)
    assert runs == [8, len(pairs)]
    same = change in (change_captions, change_seed, fewer_pictures)  # the key plays safe
    assert same or not np.array_equal(before, after)
    locked.images(pairs)
    assert len(runs) == 2


def test_other_activations_are_another_tower(tmp_path: Path, pairs: Pairs, runs: list[int]) -> None:
    found: list[Features] = []
    for quick in (False, True):
        fields = json.loads((Path(__file__).parent / "tiny.json").read_text())
        file = tmp_path / "quick.json"
        file.write_text(json.dumps(fields | {"quick_gelu": quick}))
        locked = Locked(tmp_path)
        locked.clip = trained(create(str(file)))
        lock_all_but(locked.clip, 0)
        found.append(np.array(locked.images(pairs)[1]))
    assert len(runs) == 2 and not np.array_equal(found[0], found[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_pictures_are_left_out(tmp_path: Path, pairs: Pairs, workers: int) -> None:
    _, whole = Locked(tmp_path).images(pairs)
    whole = np.array(whole)
    for row in (0, 5):
        pairs.files[row].write_bytes(b"this is no picture")
    pairs.files[6].unlink()
    for _ in range(2):
        kept, found = Locked(tmp_path, workers=workers).images(pairs)
        assert kept.files == tuple(pairs.files[n] for n in (1, 2, 3, 4, 7))
        assert kept.targets == (0, 0, 0, 1, 1)
        assert [b.item for b in kept.bad] == [str(pairs.files[n]) for n in (0, 5, 6)]
        assert {b.reason for b in kept.bad} == {"unreadable picture"}
        assert len(found) == 5
        np.testing.assert_allclose(found, whole[[1, 2, 3, 4, 7]], atol=2e-2)


def test_what_could_not_be_read_for_a_while_is_read_again(
    tmp_path: Path, pairs: Pairs, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that was away leaves a file's size and time as they are."""
    read = PictureReader.file

    def away(self: PictureReader, path: Path) -> Any:
        if path == pairs.files[3]:
            raise FrameError("input/output error")
        return read(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(PictureReader, "file", away)
        for _ in range(2):
            assert len(Locked(tmp_path).images(pairs)[0]) == 7
        assert sum(runs) == 7
    for _ in range(2):
        assert len(Locked(tmp_path).images(pairs)[0]) == 8
    assert sum(runs) == 15


def test_more_than_one_batch_with_gaps(
    tmp_path: Path, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = Locked(tmp_path).images(pairs)
    whole = np.array(whole)
    for row in (0, 1, 2, 4):
        pairs.files[row].write_bytes(b"")
    monkeypatch.setattr(features, "BATCH", 3)
    kept, found = Locked(tmp_path).images(pairs)
    assert [p.name for p in kept.files] == ["3.bmp", "1.bmp", "2.bmp", "3.bmp"]
    np.testing.assert_allclose(found, whole[[3, 5, 6, 7]], atol=2e-2)


def test_views_differ_and_the_seed_fixes_them(tmp_path: Path, pairs: Pairs) -> None:
    results = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        locked = Locked(folder, views=3, workers=workers)
        locked.augmentation = Augmentation(locked.clip.image, crop=0.5)
        results.append(np.array(locked.images(pairs)[1]))
    np.testing.assert_allclose(results[0], results[1], atol=1e-3)
    found = results[0]
    assert found.shape[:2] == (8, 3)
    for row in found:
        assert len({view.tobytes() for view in row}) == 3


def test_views_of_what_names_a_side_are_not_mirrored(tmp_path: Path, pairs: Pairs) -> None:
    locked = Locked(tmp_path, views=12)
    locked.augmentation = Augmentation(locked.clip.image, flip=True)
    kept, found = locked.images(pairs)
    distinct = [len({view.tobytes() for view in row}) for row in np.array(found)]
    assert [kept.classes[t] for t in kept.targets or ()] == ["left"] * 4 + ["other"] * 4
    assert distinct == [1] * 4 + [2] * 4


def test_pictures_come_from_the_cache_and_go_into_it(
    tmp_path: Path, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    Locked(tmp_path, cache=FrameCache(tmp_path / "c")).images(pairs)
    monkeypatch.setattr("training.pictures.read_picture", None)
    locked = Locked(tmp_path, cache=FrameCache(tmp_path / "c"), seed=1)
    locked.images(pairs)


# What goes wrong


@pytest.mark.parametrize("workers", [0, 1])
def test_no_readable_picture(tmp_path: Path, pairs: Pairs, workers: int) -> None:
    for path in pairs.files:
        path.write_bytes(b"")
    with pytest.raises(DataError, match="^none of the 8 pictures could be read$"):
        Locked(tmp_path, workers=workers).images(pairs)
    assert files(tmp_path / "features") == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_that_does_not_open(tmp_path: Path, pairs: Pairs, workers: int) -> None:
    (tmp_path / "c").write_text("in the way")
    with pytest.raises(DataError) as info:
        Locked(tmp_path, workers=workers, cache=FrameCache(tmp_path / "c")).images(pairs)
    assert str(info.value).startswith(f"--cache {tmp_path}/c cannot be opened")
    assert "Traceback" not in str(info.value)
    assert files(tmp_path / "features") == []


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_nothing_half_written_is_left(
    tmp_path: Path, pairs: Pairs, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    real, calls = features._run, []

    def fails(*args: Any) -> Features:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return real(*args)

    monkeypatch.setattr(features, "_run", fails)
    monkeypatch.setattr(features, "BATCH", 3)
    with pytest.raises(type(error)):
        Locked(tmp_path).images(pairs)
    assert files(tmp_path / "features") == []
    calls.extend([1, 1])
    assert len(Locked(tmp_path).images(pairs)[1]) == 8


def test_a_full_disk_is_said(tmp_path: Path, pairs: Pairs) -> None:
    locked = Locked(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(DataError, match="features cannot be kept in .*features: "):
            locked.images(pairs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path / "features") == []


@pytest.mark.parametrize("lost", ["values", "rows", "half of the values", "half of the rows"])
def test_files_that_are_lost_or_cut_off_are_made_anew(
    tmp_path: Path, pairs: Pairs, runs: list[int], lost: str
) -> None:
    found = np.array(Locked(tmp_path).images(pairs)[1])
    paths = (tmp_path / "features").iterdir()
    file = next(p for p in paths if ("rows" in p.name) == ("rows" in lost))
    if lost.startswith("half"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()
    np.testing.assert_array_equal(Locked(tmp_path).images(pairs)[1], found)
    assert len(runs) == 2


def test_features_too_large_for_16_bits(tmp_path: Path, pairs: Pairs) -> None:
    locked = Locked(tmp_path)
    with torch.no_grad():
        locked.clip.model.visual.trunk.layer4[0].bn2.bias += 1e5
    with pytest.raises(DataError, match="do not fit 16 bits: train without --lock-image"):
        locked.images(pairs)
    assert files(tmp_path / "features") == []


def test_processes_that_compute_the_same_at_once(tmp_path: Path, pairs: Pairs) -> None:
    locked = Locked(tmp_path)
    context = multiprocessing.get_context("fork")

    def compute() -> None:
        torch.set_num_threads(1)  # OpenMP's other threads are not in a forked process
        assert len(locked.images(pairs)[1]) == 8

    processes = [context.Process(target=compute, daemon=True) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(files(tmp_path / "features")) == 2
