"""What a teacher said is kept: computed anew is what changed, and no more."""

import copy
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from conftest import solid
from PIL import Image
from rich.progress import Progress
from typer.testing import CliRunner

from export.cli import app
from export.towers import text_tower
from runtime.errors import DataError
from training.augment import Augmentation
from training.distill_images import digests, open_images
from training.evaluate import image_encoder, text_encoder
from training.model import ClipModel, create, create_from, save
from training.options import Precision
from training.teacher import Seen, Teacher, open_teacher
from training.views import PLAIN, apply_view

QUIET = Progress(disable=True)


@functools.cache
def opened(checkpoint: Path) -> ClipModel:
    return open_teacher(str(checkpoint))


def changes(clip: ClipModel, **strength: Any) -> Augmentation:
    return Augmentation(clip.image, **({"crop": 0.6, "flip": True} | strength))


class Counted(Teacher):
    """Counts the frames and the texts that its model embeds."""

    frames = 0

    def _encoder(self) -> Any:
        encode = super()._encoder()

        def counted(frames: Any) -> Any:
            self.frames += len(frames)
            return encode(frames)

        return counted


def asked(
    checkpoint: Path, cache: Path, pictures: Path, views: int = 2, first: int = 1, seed: int = 0,
    precision: Precision = "fp32", **strength: Any,
) -> tuple[int, Seen, Counted]:  # fmt: skip
    """How many frames were embedded, what is known of them, and by whom."""
    clip = opened(checkpoint)
    view = changes(clip, **strength)
    teacher = Counted(clip, cache, view, seed, workers=0, precision=precision)
    pairs = open_images([pictures], 1.0, cache / "frames", 0.5, QUIET)
    hashes, good = digests(pairs.files, QUIET)
    seen = teacher.see(pairs.keep(good), hashes[good], range(first, first + views), QUIET)
    return teacher.frames, seen, teacher


@pytest.fixture
def pictures(squares: Path, tmp_path: Path) -> Path:
    """Six pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for color in ("red", "green", "blue"):
        for n in range(2):
            shutil.copy(squares / color / f"{n}.png", folder / f"{color}{n}.png")
    return folder


def test_only_what_changed_is_computed_anew(
    checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"

    def count(**how: Any) -> int:
        return asked(checkpoint, cache, pictures, **how)[0]

    assert [count(), count()] == [12, 0]
    assert [count(views=5), count(views=3)] == [18, 0]
    Image.new("RGB", (50, 40), (9, 9, 9)).save(pictures / "red0.png")  # another picture
    (pictures / "more.png").write_bytes(solid(100, (40, 40)))
    os.utime(pictures / "blue0.png")  # the same as before
    shutil.move(pictures / "blue1.png", pictures / "moved.png")
    shutil.copy(pictures / "green0.png", pictures / "copy.png")
    assert [count(), count()] == [4, 0]
    for how in ({"crop": 0.7}, {"jitter": 0.1}, {"seed": 1}):
        assert [count(**how), count(**how)] == [16 - 2, 0]  # copies are embedded once
    assert count() == 0


def test_the_plain_view_does_not_depend_on_how_views_are_drawn(
    checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    def count(**how: Any) -> int:
        return asked(checkpoint, tmp_path / "cache", pictures, 1, first=PLAIN, **how)[0]

    assert count() == 6
    for how in ({"crop": 0.7}, {"jitter": 0.1}, {"seed": 1}):
        assert count(**how) == 0


def test_what_another_run_has_asked_meanwhile_is_not_asked_again(
    checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    clip = opened(checkpoint)
    pairs = open_images([pictures], 1.0, tmp_path / "frames", 0.5, QUIET)
    hashes, _ = digests(pairs.files, QUIET)
    first, second = (Counted(clip, tmp_path / "c", changes(clip), 0, workers=0) for _ in range(2))
    for teacher, asked in ((first, 12), (second, 0)):
        teacher.see(pairs, hashes, [1, 2], QUIET)
        assert teacher.frames == asked


def test_another_teacher_is_asked_anew(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    def count(clip: ClipModel) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("test_teacher.opened", lambda _: clip)
            return asked(checkpoint, tmp_path / "cache", pictures)[0]

    def with_other(name: str) -> ClipModel:
        model = copy.deepcopy(opened(checkpoint).model)
        with torch.no_grad():
            model.state_dict()[name][0] += 0.01
        return dataclasses.replace(opened(checkpoint), model=model)

    assert count(opened(checkpoint)) == 12
    assert count(with_other("visual.ln_post.bias")) == 12
    assert count(with_other("ln_final.bias")) == 0  # of the text tower
    assert count(dataclasses.replace(opened(checkpoint), name="of another name")) == 0
    squashed = msgspec.structs.replace(opened(checkpoint).image, fit="squash")
    assert count(dataclasses.replace(opened(checkpoint), image=squashed)) == 12


def test_what_is_kept_is_what_the_teacher_says(
    checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    """The stored numbers of a view draw the very frame that its embedding is of."""
    _, seen, teacher = asked(checkpoint, tmp_path / "cache", pictures)
    frames = []
    for file, own in zip(seen.pairs.files, seen.places, strict=True):
        for place in own:
            _, drawn = seen.store.row(int(place))
            frames.append(apply_view(teacher.reader.pictures.file(file), drawn, teacher.clip.image))
    expected = image_encoder(teacher.clip)(np.stack(frames))
    assert np.allclose(seen.said, expected.reshape(seen.said.shape), atol=2e-3)


def test_a_teacher_in_16_bits_is_another(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    _, exact, _ = asked(checkpoint, cache, pictures)
    count, rounded, _ = asked(checkpoint, cache, pictures, precision="bf16")
    assert count == 12 and asked(checkpoint, cache, pictures, precision="bf16")[0] == 0
    cosines = (exact.said * rounded.said).sum(axis=-1)
    assert 0.99 < cosines.min() and cosines.max() < 1 - 1e-7
    assert asked(checkpoint, cache, pictures)[0] == 0


def test_texts_are_kept(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = opened(checkpoint)
    teacher = Teacher(clip, tmp_path / "cache", changes(clip), 0, 0)
    texts = ["a red square", "blue", "a red square"]
    expected = text_encoder(clip, teacher.tokenizer)(texts)
    assert np.allclose(teacher.read(texts), expected, atol=2e-3)
    monkeypatch.setattr("training.teacher.text_encoder", None)
    assert np.allclose(teacher.read(texts[::-1]), expected[::-1], atol=2e-3)


def test_rows_that_are_no_embeddings_are_damage(
    checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    file = asked(checkpoint, tmp_path / "cache", pictures)[1].store.folder / "00000.rows.npy"
    np.save(file, np.load(file) * 0)
    _, seen, _ = asked(checkpoint, tmp_path / "cache", pictures)
    with pytest.raises(DataError, match="rows that are no embeddings; delete it"):
        _ = seen.said


def test_unreadable_pictures_are_left_out(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    (pictures / "bad.png").write_text("no picture")
    count, (pairs, _, places), _ = asked(checkpoint, tmp_path / "cache", pictures)
    assert (count, len(pairs), places.shape) == (12, 6, (6, 2))
    assert [(Path(bad.item).name, bad.reason) for bad in pairs.bad] == [
        ("bad.png", "unreadable picture")
    ]
    clip = opened(checkpoint)
    other = Teacher(clip, tmp_path / "new", changes(clip), seed=0, workers=0, asked=False)
    with pytest.raises(DataError, match="none of the 6 pictures"):  # it waits for who asks
        other.see(pairs, digests(pairs.files, QUIET)[0], [1], QUIET)
    for file in pictures.glob("*[01].png"):
        file.unlink()
    with pytest.raises(DataError, match="none of the 1 pictures"):
        asked(checkpoint, tmp_path / "cache", pictures)


KILLED = """
import os, signal, sys
from pathlib import Path
from training import embedding_store, teacher
from test_teacher import Counted, asked

embedding_store.SECONDS, teacher.BATCH = 0.0, 4
class Dying(Counted):
    def _encoder(self):
        encode = super()._encoder()
        def dying(frames):
            if self.frames == 8:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(frames)
        return dying
import test_teacher
test_teacher.Counted = Dying
asked(*map(Path, sys.argv[1:]))
"""


def test_a_cache_goes_on_after_kill_9(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    arguments = (checkpoint, tmp_path / "cache", pictures)
    run = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path},
    )
    assert run.returncode == -signal.SIGKILL
    assert asked(*arguments)[0] == 12 - 8
    whole = asked(checkpoint, tmp_path / "whole", pictures)
    again = asked(*arguments)
    assert np.allclose(whole[1].said, again[1].said, atol=2e-3)


@pytest.mark.parametrize(("name", "message"), [
    ("ViT-B-32", "its weights are random"), ("no-such-model", "neither a folder"),
])  # fmt: skip
def test_who_cannot_teach(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "ViT-B-32":  # without making its 150 million weights
        monkeypatch.setattr("training.teacher.create", lambda *_: create("nano"))
    with pytest.raises(DataError, match=message):
        open_teacher(name)


@pytest.fixture
def coca(tiny_config: Path, tmp_path: Path) -> Path:
    """The folder of a small CoCa."""
    config = json.loads(tiny_config.read_text())
    config["vision_cfg"] |= {"attentional_pool": True, "attn_pooler_heads": 4}
    config["text_cfg"] |= {"embed_cls": True}
    for tower in ("vision_cfg", "text_cfg"):
        config[tower]["output_tokens"] = True
    own = config["text_cfg"]
    config["multimodal_cfg"] = {
        **{name: own[name] for name in ("context_length", "vocab_size", "width", "heads")},
        "layers": 1, "attn_pooler_heads": 4,
    }  # fmt: skip
    config["custom_text"] = True
    folder = tmp_path / "coca"
    folder.mkdir()
    save(create_from(config, "tiny-coca"), folder, {})
    return folder


def test_a_student_of_a_coca_needs_a_text_tower_of_its_own(
    coca: Path, pictures: Path, tmp_path: Path
) -> None:
    command = [
        "distill", tmp_path / "out", "--teacher", coca, "--student", "nano", "--images", pictures,
        "--labels", "red,blue", "--epochs", 1, "--batch-size", 2, "--workers", 0,
    ]  # fmt: skip
    bundle = [*command, "--bundle", tmp_path / "bundle"]
    with pytest.raises(DataError, match="its text encoder .* cannot be exported"):
        CliRunner().invoke(app, list(map(str, bundle)), catch_exceptions=False)
    own = [*command, "--student-text", "1x16"]
    assert not CliRunner().invoke(app, list(map(str, own)), catch_exceptions=False).exit_code
    made = create(str(tmp_path / "out"))
    assert made.model.text.cls_emb is None and text_tower(made) is made.model.text


def test_of_a_coca_the_towers_teach(coca: Path) -> None:
    whole, towers = create(str(coca)), open_teacher(str(coca))
    assert not [name for name, _ in towers.model.named_parameters() if "decoder" in name]
    pixels, tokens = torch.rand(2, 3, 32, 32), torch.randint(1, 49000, (3, 12))
    with torch.no_grad():
        image, text = towers.model.encode_image(pixels), towers.model.encode_text(tokens)
        expected = whole.model.encode_image(pixels), whole.model.encode_text(tokens)
    for own, given in zip((image, text), expected, strict=True):
        torch.testing.assert_close(torch.nn.functional.normalize(own, dim=-1), given)
