"""Calibration frames: which are drawn, that they are told apart, and what is said of them."""

import collections
import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from calibration.coverage import coverage
from calibration.frame_set import FrameSet
from calibration.sampling import sample
from runtime.errors import DataError, FrameError
from runtime.frames import Frame
from runtime.manifest import ImageSpec
from runtime.preprocess import preprocess
from training.video_frames import frames_of_video

SPEC = ImageSpec(height=32, width=48, mean=(0, 0, 0), std=(1, 1, 1))


def scene(number: int) -> Image.Image:
    """A picture that looks like no other number's."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((90, 60), Image.Resampling.BICUBIC)


def write(path: Path, picture: Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)
    return path


def pictures(folder: Path, numbers: Sequence[int]) -> Path:
    """`folder/<number>.png`, written in the order given."""
    for number in numbers:
        write(folder / f"{number}.png", scene(number))
    return folder


def video(path: Path, numbers: Sequence[int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    fourcc = cv2.VideoWriter.fourcc(*"MJPG")
    writer = cv2.VideoWriter(str(path), fourcc, 10, (90, 60))
    for number in numbers:
        writer.write(np.asarray(scene(number))[..., ::-1])
    writer.release()
    return path


def draw(store: Path, *sources: Path, most: int = 1000, seed: int = 0, **options: Any) -> FrameSet:
    return sample(sources, SPEC, most, seed, store / "frames.u8", **options)


def all_frames(frames: FrameSet) -> Frame:
    return np.concatenate(list(frames.batches(7)))


def base(frames: FrameSet) -> list[str]:
    return [os.path.basename(name) for name in frames.names]


def test_a_seed_draws_the_same_frames(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", range(30))
    first, again = (draw(tmp_path / at, folder, most=8, seed=1) for at in "ab")
    assert first.sha256 == again.sha256 and first.names == again.names
    np.testing.assert_array_equal(all_frames(first), all_frames(again))
    assert set(first.sha256) != set(draw(tmp_path / "c", folder, most=8, seed=2).sha256)


def test_neither_the_order_on_disk_nor_the_place_nor_the_threads_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    for threads, name, numbers in [(1, "x", range(40)), (8, "y", range(39, -1, -1))]:
        monkeypatch.setattr(os, "cpu_count", lambda threads=threads: threads)
        pictures(tmp_path / name / "in/one", numbers)
        pictures(tmp_path / name / "in/two", [number + 100 for number in numbers])
        drawn.append(draw(tmp_path / name, tmp_path / name / "in", most=12))
    assert drawn[0].sha256 == drawn[1].sha256
    assert base(drawn[0]) == base(drawn[1])


def test_every_frame_is_preprocessed_as_the_runtime_does(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", range(10))
    frames = draw(tmp_path, folder)
    assert all_frames(frames).shape == (10, 32, 48, 3)
    for name, frame in zip(frames.names, all_frames(frames), strict=True):
        np.testing.assert_array_equal(frame, preprocess(Path(name), SPEC))


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=quality)
    return Image.open(content).convert("RGB")


@pytest.mark.parametrize(
    "change",
    [
        lambda picture: picture,
        lambda picture: jpeg(picture, 60),
        lambda picture: jpeg(picture, 30),
        lambda picture: ImageEnhance.Brightness(picture).enhance(1.08),
        lambda picture: ImageEnhance.Brightness(picture).enhance(0.92),
        lambda picture: picture.resize((180, 120)),
    ],
    ids=["same", "jpeg 60", "jpeg 30", "brighter", "darker", "larger"],
)
def test_near_duplicates_are_used_once(
    tmp_path: Path, change: Callable[[Image.Image], Image.Image]
) -> None:
    for number in range(12):
        write(tmp_path / f"in/{number}.png", scene(number))
        write(tmp_path / f"in/again/{number}.png", change(scene(number)))
    frames = draw(tmp_path, tmp_path / "in")
    assert sorted(base(frames)) == sorted(f"{n}.png" for n in range(12))
    assert frames.origin.near_duplicates == 12


def test_what_looks_different_is_kept(tmp_path: Path) -> None:
    frames = draw(tmp_path, pictures(tmp_path / "in", range(200)))
    assert len(frames) == 200 and frames.origin.near_duplicates == 0


def test_the_same_place_by_night_or_in_another_color_is_another_frame(tmp_path: Path) -> None:
    day = scene(0)
    write(tmp_path / "in/day.png", day)
    write(tmp_path / "in/night.png", ImageEnhance.Brightness(day).enhance(0.3))
    red, green, blue = day.split()
    write(tmp_path / "in/odd.png", Image.merge("RGB", (red.point(lambda v: v // 2), green, blue)))
    assert len(draw(tmp_path, tmp_path / "in")) == 3


def test_noise_in_the_dark_makes_no_new_frames(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(10):
        noise = rng.integers(0, 12, (60, 90, 3), dtype=np.uint8)
        write(tmp_path / f"in/{number}.png", Image.fromarray(noise))
    assert len(draw(tmp_path, tmp_path / "in")) == 1


def test_the_draw_goes_on_until_there_are_enough(tmp_path: Path) -> None:
    for number in range(100):
        write(tmp_path / f"in/{number}.png", scene(number % 10))
    frames = draw(tmp_path, tmp_path / "in", most=10)
    assert len(frames) == 10 and len({int(n[:-4]) % 10 for n in base(frames)}) == 10
    assert frames.origin.candidates == 100 and frames.origin.near_duplicates > 0
    assert len(draw(tmp_path, tmp_path / "in", most=50)) == 10


def test_frames_of_a_video_are_spread_out(tmp_path: Path) -> None:
    frames = draw(tmp_path, video(tmp_path / "clip.avi", range(60)), per_video=6)
    assert sorted(base(frames)) == sorted(f"clip.avi, frame {n}" for n in range(0, 60, 10))
    numbers = [int(name.split()[-1]) for name in frames.names]
    for number, frame in zip(numbers, all_frames(frames).astype(int), strict=True):
        wanted = preprocess(np.asarray(scene(number)), SPEC, "rgb")
        assert np.abs(frame - wanted).mean() < 12  # Motion JPEG changes it a little


@pytest.mark.parametrize("says", [0, 20, 1000])
@pytest.mark.parametrize("most", [1, 7, 8, 100])
def test_the_header_of_a_video_may_be_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: int, most: int
) -> None:
    monkeypatch.setattr("calibration.candidates._length", lambda video: says)
    frames = draw(tmp_path, video(tmp_path / "clip.avi", range(60)), per_video=most)
    numbers = sorted(int(name.split()[-1]) for name in frames.names)
    assert 1 <= len(numbers) <= most and numbers[0] == 0
    assert len(set(np.diff(numbers))) <= 1
    for number, frame in zip(frames.names, all_frames(frames).astype(int), strict=True):
        wanted = preprocess(np.asarray(scene(int(number.split()[-1]))), SPEC, "rgb")
        assert np.abs(frame - wanted).mean() < 12


def test_a_video_gives_more_where_it_is_alone(tmp_path: Path) -> None:
    clip = video(tmp_path / "in/1.avi", range(60))
    assert draw(tmp_path, clip, most=20).origin.candidates == 30  # every second
    video(tmp_path / "in/2.avi", range(60, 120))
    assert draw(tmp_path, tmp_path / "in", most=20).origin.candidates == 40


def test_sources_take_turns(tmp_path: Path) -> None:
    large = pictures(tmp_path / "large", range(60))
    small = pictures(tmp_path / "small", range(100, 106))
    clip = video(tmp_path / "clip.avi", range(200, 240))
    frames = draw(tmp_path, large, small, clip, most=15)
    assert collections.Counter(frames.sources) == {0: 5, 1: 5, 2: 5}
    frames = draw(tmp_path, large, small, clip, most=30)
    assert collections.Counter(frames.sources) == {0: 12, 1: 6, 2: 12}


def test_pictures_given_one_by_one_are_one_source(tmp_path: Path) -> None:
    single = sorted(pictures(tmp_path / "single", range(20)).iterdir())
    frames = draw(tmp_path, *single, pictures(tmp_path / "in", range(30, 50)), most=10)
    assert collections.Counter(frames.sources) == {0: 5, 20: 5}


def test_labels_take_turns(tmp_path: Path) -> None:
    pictures(tmp_path / "in/dog", range(40))
    pictures(tmp_path / "in/cat", range(100, 110))
    pictures(tmp_path / "in/cow", range(200, 203))
    frames = draw(tmp_path, tmp_path / "in", most=18)  # 6 of each, were there as many cows
    assert frames.classes == ("cat", "cow", "dog")
    assert sorted(collections.Counter(frames.targets).values()) == [3, 7, 8]
    assert frames.labels() == [Path(name).parent.name for name in frames.names]


def test_labels_of_a_table(tmp_path: Path) -> None:
    pictures(tmp_path / "in", range(8))
    video(tmp_path / "in/clip.avi", range(50, 58))
    rows = [f"in/{n}.png,{'even' if n % 2 == 0 else 'odd'}" for n in range(8)]
    (tmp_path / "data.csv").write_text("\n".join(["file,label", *rows, "in/clip.avi,moving"]))
    frames = draw(tmp_path, tmp_path / "data.csv", most=12)
    assert frames.classes == ("even", "moving", "odd")
    assert collections.Counter(frames.labels()) == {"even": 4, "moving": 4, "odd": 4}
    (tmp_path / "said.tsv").write_text("file\tcaption\nin/0.png\ta\nin/0.png\tb\nin/1.png\tc\n")
    frames = draw(tmp_path, tmp_path / "said.tsv")
    assert len(frames) == 2 and frames.targets is None
    mixed = draw(tmp_path, tmp_path / "data.csv", pictures(tmp_path / "more", range(90, 95)))
    assert mixed.targets is None and mixed.classes == () and mixed.labels() is None


def test_kinds_of_folders(tmp_path: Path) -> None:
    only = pictures(tmp_path / "a/images", range(3)).parent
    assert draw(tmp_path, only).targets is None  # one folder is no choice of labels
    pictures(tmp_path / "b/x/deep", range(3))
    pictures(tmp_path / "b/y", range(3, 5))
    assert draw(tmp_path, tmp_path / "b").targets is None
    video(tmp_path / "c/x/1.avi", range(3))
    pictures(tmp_path / "c/y", range(3, 5))
    assert draw(tmp_path, tmp_path / "c").targets is None  # recordings by day


def test_what_tools_hide_is_no_frame_and_links_are_followed_once(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", range(3))
    pictures(folder / ".thumbnails", range(10, 13))
    (folder / "._1.png").write_bytes(b"what macOS writes beside a file")
    (folder / "notes.txt").write_text("no picture")
    (folder / "folder.png").mkdir()
    (folder / "linked").symlink_to(pictures(tmp_path / "far", range(20, 22)))
    (folder / "linked/up").symlink_to(folder)
    assert draw(tmp_path, folder).origin.candidates == 5


def test_batches(tmp_path: Path) -> None:
    frames = draw(tmp_path, pictures(tmp_path / "in", range(10)))
    assert [len(batch) for batch in frames.batches(4)] == [4, 4, 2]
    assert {batch.dtype for batch in frames.batches(4)} == {np.dtype(np.uint8)}
    (some,) = frames.batches(8, [7, 0, 7])
    np.testing.assert_array_equal(some, all_frames(frames)[[7, 0, 7]])
    assert list(frames.batches(4, [])) == []
    with pytest.raises(DataError, match="at least 1 frame, not 0"):
        frames.batches(0)


def test_parts_are_disjoint_and_alike(tmp_path: Path) -> None:
    for label, start in {"cat": 0, "cow": 100, "dog": 200}.items():
        pictures(tmp_path / "in" / label, range(start, start + 20))
    frames = draw(tmp_path, tmp_path / "in")
    first, second = frames.split(0.7, 3)
    assert (len(first), len(second)) == (42, 18)
    assert set(first.sha256) | set(second.sha256) == set(frames.sha256)
    assert not set(first.sha256) & set(second.sha256)
    assert collections.Counter(first.labels()) == {"cat": 14, "cow": 14, "dog": 14}
    np.testing.assert_array_equal(
        all_frames(second), all_frames(frames)[[frames.names.index(n) for n in second.names]]
    )
    assert frames.split(0.7, 3)[0].names == first.names
    assert frames.split(0.7, 4)[0].names != first.names


def test_parts_without_labels_are_alike_in_sources(tmp_path: Path) -> None:
    sources = [pictures(tmp_path / str(n), range(n, n + 10)) for n in (0, 100, 200)]
    first, second = draw(tmp_path, *sources).split(0.5, 0)
    assert collections.Counter(first.sources) == collections.Counter(second.sources)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.99])
def test_no_part_is_empty_and_rare_labels_are_in_one(tmp_path: Path, share: float) -> None:
    for number in range(7):
        write(tmp_path / f"in/label {number}/1.png", scene(number))
    first, second = draw(tmp_path, tmp_path / "in").split(share, 0)
    assert len(first) == max(1, min(6, round(7 * share))) and len(second) == 7 - len(first)


def test_one_frame_can_be_drawn_but_not_split(tmp_path: Path) -> None:
    frames = draw(tmp_path, pictures(tmp_path / "in", range(5)), most=1)
    assert len(frames) == 1
    with pytest.raises(DataError, match="1 frame of .*in cannot be split.*give at least 2"):
        frames.split(0.5, 0)


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_is_between_0_and_1(tmp_path: Path, share: float) -> None:
    frames = draw(tmp_path, pictures(tmp_path / "in", range(3)))
    with pytest.raises(DataError, match="between 0 and 1"):
        frames.split(share, 0)


MEMORY = """
import sys
from pathlib import Path
from calibration.coverage import coverage
from calibration.sampling import sample
from runtime.manifest import ImageSpec

spec = ImageSpec(height=128, width=128, mean=(0, 0, 0), std=(1, 1, 1))
most = int(sys.argv[3])
frames = sample([Path(sys.argv[1])], spec, most, 0, Path(sys.argv[2]))
assert len(frames) == coverage(frames).frames == most
for line in Path("/proc/self/status").read_text().splitlines():
    if line.startswith("VmHWM"):
        print(line.split()[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_frames(tmp_path: Path) -> None:
    """1,024 frames are 48 MiB."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(1100):
        coarse = np.random.default_rng(number).integers(0, 256, (8, 9, 3), dtype=np.uint8)
        Image.fromarray(coarse).save(folder / f"{number}.bmp")
    peaks = []
    for most in ("64", "1024"):
        command = [sys.executable, "-c", MEMORY, str(folder), str(tmp_path / "store"), most]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(run.stdout))
    assert peaks[1] - peaks[0] < 8 << 10  # KiB


def test_a_batch_is_read_when_it_is_asked_for(tmp_path: Path) -> None:
    frames = draw(tmp_path, pictures(tmp_path / "in", range(10)))
    batches = frames.batches(4)
    next(batches)
    frames.store.write_bytes(frames.store.read_bytes()[:-1])
    next(batches)
    with pytest.raises(DataError, match="frames.u8 cannot be read: it ends before frame 9; sample"):
        next(batches)
    frames.store.unlink()
    with pytest.raises(DataError, match="cannot be read: .*No such file"):
        next(frames.batches(1))


def test_broken_pictures_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", range(9))
    (folder / "broken.png").write_bytes(b"\x89PNG and no more")
    frames = draw(tmp_path, folder, max_bad=0.1)
    assert len(frames) == 9
    (bad,) = frames.origin.bad
    assert bad.item == str(folder / "broken.png") and bad.reason == "unreadable picture"
    with pytest.raises(DataError, match=r"in: 1 of 10 items .*\(1 unreadable picture\).*broken"):
        draw(tmp_path / "more", folder, max_bad=0.09)


def test_bad_rows_of_a_table_are_counted_by_its_rows(tmp_path: Path) -> None:
    pictures(tmp_path, range(9))
    rows = ["file,caption", *(f"{n}.png,x" for n in range(9)), "no.png,x"]
    (tmp_path / "data.csv").write_text("\n".join(rows))
    assert draw(tmp_path, tmp_path / "data.csv", most=2, max_bad=0.1).origin.bad
    with pytest.raises(DataError, match="1 of 10 items .*missing file"):
        draw(tmp_path, tmp_path / "data.csv", most=2, max_bad=0.09)


def test_of_a_damaged_video_the_rest_is_used(tmp_path: Path) -> None:
    clip = video(tmp_path / "clip.avi", range(40))
    content = clip.read_bytes()
    clip.write_bytes(content[: len(content) // 2])
    frames = draw(tmp_path, clip, max_bad=0.2)
    assert 10 < len(frames) < 30
    assert [(b.item, b.reason) for b in frames.origin.bad] == [(str(clip), "damaged video")]
    with pytest.raises(DataError, match="1 damaged video"):
        draw(tmp_path, clip)


def test_nothing_usable_says_what_is_wrong_with_the_first(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/1.png").write_text("no picture")
    with pytest.raises(DataError, match=r"no frame of .*in can be used; first: .*1\.png is not"):
        draw(tmp_path, tmp_path / "in", max_bad=1)
    (tmp_path / "2.avi").write_text("no video")
    with pytest.raises(DataError, match="first: .*2.avi is not a video"):
        draw(tmp_path, tmp_path / "2.avi", max_bad=1)


def test_black_frames_are_one(tmp_path: Path) -> None:
    for number in range(30):
        write(tmp_path / f"in/{number}.png", Image.new("RGB", (60 + number, 50)))
    frames = draw(tmp_path, tmp_path / "in")
    assert len(frames) == 1 and frames.origin.near_duplicates == 29
    notes = "; ".join(coverage(frames).notes())
    assert "one frame is little" in notes and "1 frame shows one even colour" in notes


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "there is no file or folder .*nowhere"),
        ("nowhere.csv", "there is no data file or folder .*nowhere.csv"),
        ("empty", "the folder .*empty holds no pictures and no videos"),
        ("x.tar", "shards are for training"),
        ("pipe", "pipe is neither a file nor a folder"),
        ("x.json", "no frame .* can be used; first: .*x.json is not a picture"),
        ("x" * 5000, "no file or folder"),
    ],
)
def test_sources_that_are_none(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.tar").touch()
    (tmp_path / "x.json").write_text("{}")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=message):
        draw(tmp_path / "out", pictures(tmp_path / "in", range(2)).parent / source)
    assert not list(tmp_path.glob("out/*"))


def test_options_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no frames to calibrate on: give folders, tables"):
        draw(tmp_path)
    with pytest.raises(DataError, match="at least 1 frame has to be drawn.*not 0"):
        draw(tmp_path, tmp_path, most=0)
    with pytest.raises(DataError, match="at least 1 frame of a video.*not 0"):
        draw(tmp_path, tmp_path, per_video=0)


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DataError),
        (OSError(errno.EIO, "Input/output error"), OSError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["disk full", "disk broken", "Ctrl-C"],
)
def test_no_half_of_a_store_stays(
    tmp_path: Path, error: BaseException, becomes: type[BaseException]
) -> None:
    folder, store = pictures(tmp_path / "in", range(9)), tmp_path / "out"
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if done == 5:
            raise error

    with pytest.raises(becomes, match="(?i)no space left|Input|^$"):
        draw(store, folder, advance=advance)
    assert done == 5 and list(store.iterdir()) == []
    before = draw(store, folder, most=2)
    done = 0
    with pytest.raises(becomes):
        draw(store, folder, advance=advance)
    assert list(store.iterdir()) == [before.store] and len(all_frames(before)) == 2


def test_progress_is_of_frames_found(tmp_path: Path) -> None:
    told: list[int] = []
    frames = draw(tmp_path, pictures(tmp_path / "in", range(9)), most=6, advance=told.append)
    assert sum(told) == len(frames) == 6
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["frames.u8"]
    assert frames.store.stat().st_size == 6 * 32 * 48 * 3


def test_the_manifest_says_where_frames_came_from(tmp_path: Path) -> None:
    odd = os.fsdecode(b"in/caf\xe9")
    write(tmp_path / odd / "1.png", scene(0))
    write(tmp_path / odd / "2.png", jpeg(scene(0), 70))
    clip = video(tmp_path / "clip.avi", range(5, 8))
    frames = draw(tmp_path, tmp_path / "in", clip, most=9, seed=5)
    made = json.loads(json.dumps(frames.manifest(), ensure_ascii=False).encode())
    assert made["sources"] == [str(tmp_path / "in"), str(clip)]
    counts = {key: made[key] for key in ("seed", "most", "candidates", "near_duplicates", "used")}
    assert counts == {"seed": 5, "most": 9, "candidates": 5, "near_duplicates": 1, "used": 4}
    assert made["unreadable"] == 0 and made["reasons"] == {} and made["spec"]["width"] == 48
    assert [frame["name"] for frame in made["frames"]] == list(frames.names)
    assert {len(frame["sha256"]) for frame in made["frames"]} == {64}
    assert repr(frames) == f"FrameSet(4 frames of {tmp_path / 'in'}, {clip})"


def test_labels_are_in_the_manifest(tmp_path: Path) -> None:
    pictures(tmp_path / "in/cat", [1])
    pictures(tmp_path / "in/dog", [2])
    made = draw(tmp_path, tmp_path / "in").manifest()
    assert sorted(frame["label"] for frame in made["frames"]) == ["cat", "dog"]


def test_scenes_are_counted(tmp_path: Path) -> None:
    """Two places, and something small that is elsewhere in each frame."""
    for number in range(12):
        picture = scene(number % 2)
        picture.paste("white", (7 * number, 20, 7 * number + 14, 45))
        write(tmp_path / f"in/{number}.png", picture)
    found = coverage(draw(tmp_path, tmp_path / "in"))
    assert found.frames == 12 and found.scenes == 2
    assert any("all 12 frames are of 2 scenes: record more places" in n for n in found.notes())
    many = coverage(draw(tmp_path, pictures(tmp_path / "many", range(120))))
    assert many.scenes > 100 and not any("scene" in note for note in many.notes())


def test_notes_on_light(tmp_path: Path) -> None:
    def notes(levels: Sequence[float], name: str) -> str:
        for number, level in enumerate(levels):
            picture = np.asarray(scene(number)).astype(float) / 8 + level
            content = picture.clip(0, 255).astype(np.uint8)
            write(tmp_path / f"{name}/{number}.png", Image.fromarray(content))
        return "; ".join(coverage(draw(tmp_path, tmp_path / name)).notes())

    assert "no frame is darker than 40: if the camera works at night" in notes([100] * 5, "day")
    assert "dark" not in notes([100, 100, 100, 10], "both")
    assert "100% of the frames are darker than 40: add frames by day" in notes([5] * 5, "night")
    assert "40% of the frames are brighter than 215" in notes([100] * 3 + [220] * 2, "glare")


def test_figures_of_light_and_detail(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    fine = rng.integers(0, 256, (32, 48, 1), dtype=np.uint8).repeat(3, axis=2)
    write(tmp_path / "fine/1.png", Image.fromarray(fine))
    found = coverage(draw(tmp_path, tmp_path / "fine"))
    assert found.luma.middle == pytest.approx(fine.mean(), abs=0.01)
    assert found.contrast.middle == pytest.approx(fine.std(), abs=0.01)
    assert found.detail.middle == pytest.approx(
        20, rel=0.1
    )  # 1 + 1 + 1 + 1 + 4 * 4, of white noise
    smooth = Image.new("RGB", (48, 32))
    smooth.putdata([(4 * x + y,) * 3 for y in range(32) for x in range(48)])
    write(tmp_path / "smooth/1.png", smooth)
    found = coverage(draw(tmp_path, tmp_path / "smooth"))
    assert found.detail.middle < 0.005
    assert any("blurred, or smaller than the model's input" in note for note in found.notes())


def test_notes_on_labels(tmp_path: Path) -> None:
    for number, label in enumerate(["cat", "cow"]):
        write(tmp_path / f"in/{label}/1.png", scene(number))
    (tmp_path / "in/dog").mkdir()
    (tmp_path / "in/dog/1.png").write_text("broken")
    frames = draw(tmp_path, tmp_path / "in", max_bad=1)
    found = coverage(frames)
    assert found.labels == {"cat": 1, "cow": 1, "dog": 0}
    assert "no frames of the label 'dog'" in found.notes()
    more = coverage(frames, ["cat", "ant", "bee", "elk"])
    assert more.labels["elk"] == 0 and more.labels["cat"] == 1
    assert "no frames of 4 labels: 'dog', 'ant', 'bee' and 1 more" in more.notes()
    plain = draw(tmp_path, pictures(tmp_path / "plain", range(3)))
    assert coverage(plain, ["cat"]).labels == {}


def test_few_frames_are_noted(tmp_path: Path) -> None:
    frames = draw(tmp_path, pictures(tmp_path / "in", range(100)))
    assert not any("few" in note for note in coverage(frames).notes())
    assert "9 frames are few: 100 to 500 are usual" in coverage(frames.keep(range(9))).notes()


def test_real_photos_and_clips(tmp_path: Path, data: Path) -> None:
    photos, clip = data / "photos/labels.csv", data / "video/car-detection.mp4"
    frames = draw(tmp_path, photos, clip, most=80)
    assert collections.Counter(frames.sources) == {0: 40, 1: 40}
    assert frames.targets is None
    parked = draw(tmp_path, clip, most=80)
    assert parked.origin.near_duplicates > 40  # long stretches of an empty car park
    found = coverage(parked)
    assert found.scenes < 12
    assert any("are of" in note and "record more places" in note for note in found.notes())


@pytest.mark.filterwarnings("ignore")  # Pillow's, on what is wrong with the files
def test_real_broken_pictures(tmp_path: Path, data: Path) -> None:
    with pytest.raises(DataError, match=r"items cannot be used \(\d+ unreadable picture\)"):
        draw(tmp_path, data / "badimages/files")
    frames = draw(tmp_path, data / "badimages/files", max_bad=1)
    assert 5 < len(frames) < 37 and frames.manifest()["unreadable"] > 5


def test_a_video_whose_name_is_no_utf_8_is_left_out(tmp_path: Path) -> None:
    """OpenCV would crash the process."""
    folder = pictures(tmp_path / "in", range(4))
    video(tmp_path / "clip.avi", range(4)).rename(folder / os.fsdecode(b"caf\xe9.avi"))
    (bad,) = draw(tmp_path, folder, max_bad=0.5).origin.bad
    assert bad.reason == "damaged video" and "caf\ufffd.avi" in bad.item
    with pytest.raises(FrameError, match="is not UTF-8"):
        frames_of_video(folder / os.fsdecode(b"caf\xe9.avi"), 1.0, tmp_path / "room")
