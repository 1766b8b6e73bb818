"""`edgeclip prompts`: banks listed, made, shown, tried, removed; a bundle that stays sound."""

import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from conftest import COLORS, square, write_squares
from safetensors.numpy import load_file, save_file

import runtime
from calibration.confusable import confusable
from export.cli import main
from export.verify import verify
from runtime import bank_store, manifest
from runtime.bank_store import bank_of, remove_bank, store_bank
from runtime.bundle import Bundle, describe
from runtime.classifier import Classifier
from runtime.errors import BundleError, DataError
from runtime.manifest import Head
from runtime.prompts import PromptBank, build_bank

LABELS = {
    "labels": {
        "warm": {"labels": {"red": ["red", "scarlet"]}},
        "cold": {"labels": {"blue": {"not": ["sky"]}, "green": {"prompts": ["a green square"]}}},
    },
    "background": ["nothing"],
    "templates": ["a {} square"],
}


class Edgeclip(Protocol):
    def __call__(self, *arguments: object, code: int = 0) -> str: ...


@pytest.fixture
def edgeclip(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Edgeclip:
    """Runs `edgeclip prompts` in this process; returns stdout, of a failure the line in stderr."""

    def run(*arguments: object, code: int = 0) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["edgeclip", "prompts", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        found = capsys.readouterr()
        assert (exit.value.code or 0) == code, found.err
        if not code:
            return found.out
        assert found.out == ""
        (line,) = found.err.strip().splitlines()
        return line

    return run


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(LABELS))
    return path


@pytest.fixture
def bank(bundle: Path) -> PromptBank:
    classifier = Classifier(Bundle(bundle), backend="onnxruntime", precision="fp32")
    classifier.set_labels(LABELS)
    return classifier.require_bank()


def test_a_bank_is_made_and_used(
    edgeclip: Edgeclip, bundle_copy: Path, labels: Path, squares: Path, tmp_path: Path
) -> None:
    assert "stored the bank 'colors'" in edgeclip(
        bundle_copy, "--labels", labels, "--name", "colors"
    )
    listed = json.loads(edgeclip(bundle_copy, "--json"))["banks"]
    assert [row["name"] for row in listed] == ["default", "colors"]
    assert listed[1] | {"file": ""} == {
        **{"name": "colors", "labels": 3, "groups": 2, "negatives": 1, "background": 1},
        **{"templates": ["a {} square"], "fitted": [], "bound": True, "file": ""},
    }
    table = edgeclip(bundle_copy)
    assert "default" in table and "a {} square" in table
    assert verify(bundle_copy) == []
    line = json.loads(
        edgeclip(bundle_copy, "--name", "colors", "--test", squares / "red/0.png", "--json")
    )
    assert line["label"] == "red"
    shown = json.loads(edgeclip(bundle_copy, "--show", "colors", "--json"))
    (tmp_path / "again.json").write_text(json.dumps(shown["label_set"]))
    before = bank_of(Bundle(bundle_copy), "colors")
    edgeclip(
        bundle_copy, "--labels", tmp_path / "again.json", "--name", "colors", "--force", "--json"
    )
    np.testing.assert_array_equal(bank_of(Bundle(bundle_copy), "colors").rows, before.rows)
    assert "removed" in edgeclip(bundle_copy, "--remove", "colors")
    assert Bundle(bundle_copy).manifest.prompts.keys() == {"default"}
    assert verify(bundle_copy) == [] and len(list((bundle_copy / "prompts").iterdir())) == 1


def test_the_command_is_explained(edgeclip: Edgeclip) -> None:
    assert "Example: edgeclip prompts bundle/ --labels" in edgeclip("--help")


def test_a_bank_is_shown(edgeclip: Edgeclip, bundle_copy: Path, labels: Path) -> None:
    edgeclip(bundle_copy, "--labels", labels, "--name", "colors")
    shown = edgeclip(bundle_copy, "--show", "colors")
    for text in ("warm", "red | scarlet", "not sky", "prompts a green square", "nothing"):
        assert text in shown
    assert "default: 3 labels" in edgeclip(bundle_copy, "--show", "default")


def test_labels_that_lie_too_close_are_named(edgeclip: Edgeclip, bundle: Path) -> None:
    looked = "--labels", "red,RED,blue", "--show-confusable"
    pairs = json.loads(edgeclip(bundle, *looked, "--json"))["pairs"]
    assert pairs[0]["label"] == "red" and pairs[0]["other"] == "RED" and pairs[0]["too_close"]
    assert pairs[0]["share"] == pytest.approx(0.5) and len(pairs) == 3
    table = edgeclip(bundle, *looked)
    assert "RED" in table and "too close" in table
    assert "closest of 3 labels" in edgeclip(bundle, "--show-confusable")  # of the bank "default"
    assert "but one label" in edgeclip(bundle, "--labels", "red", "--show-confusable")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "a,b"], "name the bank to store .* --name default; or look"),
        (["--labels", "a,b", "--name", "default"], "'default' already; replace it with --force"),
        (["--labels", "a,b", "--name", "../x"], "cannot be the name of a prompt bank"),
        (["--name", "default"], "what of the bank"),
        (["--template", "a {}"], "--template goes with --labels"),
        (["--show", "birds"], "no prompt bank 'birds'; it has: default"),
        (["--remove", "birds"], "no prompt bank 'birds'; it has: default"),
        (["--show", "default", "--remove", "default"], "--remove stands alone"),
        (["--show", "default", "--labels", "a"], "--show stands alone"),
        (["--show-confusable", "--name", "birds"], "no prompt bank 'birds'"),
    ],
)
def test_what_is_wrong_with_a_command(
    edgeclip: Edgeclip, bundle: Path, arguments: list[str], message: str
) -> None:
    assert re.search(message, edgeclip(bundle, *arguments, code=2))
    assert set(Bundle(bundle).manifest.prompts) == {"default"}


def test_a_bundle_without_banks(edgeclip: Edgeclip, bundle_copy: Path) -> None:
    remove_bank(bundle_copy, "default")
    assert "no prompt bank; make one" in edgeclip(bundle_copy)
    assert "none yet" in edgeclip(bundle_copy, "--show-confusable", code=2)
    edgeclip(bundle_copy, "--labels", "red,blue", "--name", "default")
    assert runtime.load(bundle_copy).labels == ("red", "blue") and verify(bundle_copy) == []


def test_a_bank_of_another_encoder_is_listed_as_stale(
    edgeclip: Edgeclip, bundle_copy: Path, bank: PromptBank
) -> None:
    path = bundle_copy / "prompts/default.safetensors"
    metadata = {"labels": '["red", "green", "blue"]', "templates": '["{}"]', "text_encoder": "0"}
    save_file(load_file(path), path, metadata=metadata)
    raw = json.loads((bundle_copy / "manifest.json").read_text())
    raw["files"]["prompts/default.safetensors"] = {
        "bytes": path.stat().st_size,
        "sha256": describe(path).sha256,
    }
    (bundle_copy / "manifest.json").write_text(json.dumps(raw))
    assert not json.loads(edgeclip(bundle_copy, "--json"))["banks"][0]["bound"]
    assert "stale" in edgeclip(bundle_copy)
    said = edgeclip(bundle_copy, "--fit", "nowhere.mp4", code=2)  # said before frames are read
    assert "another text encoder: make it again" in said
    stale = bank_of(Bundle(bundle_copy), "default")
    with pytest.raises(BundleError, match="another text encoder"):
        store_bank(bundle_copy, "again", stale)
    store_bank(bundle_copy, "default", bank, replace=True)
    assert verify(bundle_copy) == []


@contextmanager
def interrupted(at: int) -> Iterator[None]:
    """Has the `at`-th step of a change end it, as a crash would."""
    steps = 0
    with pytest.MonkeyPatch.context() as patch:

        def ends(owner: Any, name: str) -> None:
            whole = getattr(owner, name)

            def step(*arguments: Any, **more: Any) -> Any:
                nonlocal steps
                steps += 1
                if steps == at:
                    raise KeyboardInterrupt(name)
                return whole(*arguments, **more)

            patch.setattr(owner, name, step)

        for owner, name in (
            (bank_store, "save_bank"),
            (bank_store, "_sync"),
            (bank_store, "describe"),
            (Path, "replace"),
            (Path, "unlink"),
            (manifest, "write"),
        ):
            ends(owner, name)
        yield


@pytest.mark.parametrize("at", range(1, 13))
def test_a_crash_at_any_step_leaves_a_sound_bundle(
    bundle_copy: Path, bank: PromptBank, at: int
) -> None:
    frame = square(COLORS["red"], np.random.default_rng(0))[..., ::-1]
    ended = False
    with interrupted(at):
        try:
            store_bank(bundle_copy, "default", bank, replace=True)
        except KeyboardInterrupt:
            ended = True
    assert ended == (at < 12)  # all steps are tried
    classifier = Classifier(Bundle(bundle_copy), backend="onnxruntime", precision="fp32")
    classifier.use_prompts("default")
    assert classifier.classify(frame).label == "red"
    store_bank(bundle_copy, "another", bank)
    assert verify(bundle_copy) == []


def test_changes_at_once_are_all_kept(bundle_copy: Path, bank: PromptBank) -> None:
    threads = [
        threading.Thread(target=store_bank, args=(bundle_copy, f"bank-{n}", bank)) for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Bundle(bundle_copy).manifest.prompts) == 7 and verify(bundle_copy) == []


def test_other_files_among_the_banks_are_left_alone(bundle_copy: Path, bank: PromptBank) -> None:
    (bundle_copy / "prompts/notes.txt").write_text("mine")
    (bundle_copy / "prompts/mine.safetensors").write_text("mine")
    store_bank(bundle_copy, "colors", bank)
    with pytest.raises(DataError, match="already"):
        store_bank(bundle_copy, "colors", bank)
    remove_bank(bundle_copy, "colors")
    assert {p.name for p in (bundle_copy / "prompts").iterdir()} == {
        "default.safetensors", "mine.safetensors", "notes.txt",
    }  # fmt: skip


# Which labels are too close


def rows_at(*degrees: float) -> np.ndarray:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_a_pair_is_too_close_where_a_perfect_frame_is_not_told_apart() -> None:
    head = Head(logit_scale=100.0, logit_bias=0.0, activation="softmax")
    given = {"labels": {"a": {}, "b": {}, "c": {"not": ["n"]}}, "background": ["x", "y"]}
    rows = rows_at(0, 13.0, 60, 73.9, 100, 101)  # cosines of 0.9744 and 0.9707 for the close ones
    bank = build_bank(given, ("{}",), lambda _: rows, "")
    first, second, third = confusable(bank, head, most=3)
    assert (first.label, first.other, first.kind, first.too_close) == ("a", "b", "label", True)
    assert (second.label, second.other, second.kind) == ("c", "n", "not") and second.too_close
    assert (third.label, third.other, third.kind) == ("c", "x", "background")
    assert not third.too_close and second.share == pytest.approx(0.0507, abs=2e-3)
    for pair in (first, second):
        scores = runtime.prediction.scores_of(np.array([1, pair.cosine], np.float32), head)
        assert pair.share == pytest.approx(scores[1], rel=1e-4)
    assert first.distance == pytest.approx((1 - first.cosine) / (1 - np.cos(np.radians(47))), 1e-3)


def test_every_pair_is_named_once_however_many_labels_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = Head(logit_scale=1e6, logit_bias=0.0, activation="softmax")
    rows = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    names = [f"label {n}" for n in range(40)]
    bank = build_bank(names, ("{}",), lambda _: rows, "")
    whole = confusable(bank, head, most=999)
    monkeypatch.setattr("calibration.confusable.BLOCK", 7)
    assert confusable(bank, head, most=999) == whole and len(whole) == 780
    assert len({frozenset((pair.label, pair.other)) for pair in whole}) == 780
    cosines = [pair.cosine for pair in whole]
    assert cosines == sorted(cosines, reverse=True)


# Fitting to frames


def test_a_stored_bank_is_fitted_to_the_cameras_frames(
    edgeclip: Edgeclip, bundle_copy: Path, tmp_path: Path
) -> None:
    frames = write_squares(tmp_path / "frames", each=12, seed=3)
    said = edgeclip(bundle_copy, "--labels", "red,green", "--name", "cam", "--fit", frames)
    assert "cam, fitted to 24 frames, 12 of no label" in said  # the blue ones
    told = json.loads(edgeclip(bundle_copy, "--fit", frames, "--name", "cam", "--json"))["fitted"]
    assert (told["known_frames"], told["unknown_frames"]) == (24, 12)
    bank = bank_of(Bundle(bundle_copy), "cam")
    limit = told["precisions"]["fp32"]["limit"]
    assert bank.fitted["fp32"].threshold == limit["threshold"]
    assert verify(bundle_copy) == []
    loaded = runtime.load(bundle_copy, prompts="cam", backend="onnxruntime", precision="fp32")
    strange = [loaded.classify(path).unknown for path in sorted((frames / "blue").iterdir())]
    known = [loaded.classify(path).unknown for path in sorted((frames / "red").iterdir())]
    assert sum(strange) / 12 == pytest.approx(limit["found"]) and sum(known) <= 2


@pytest.mark.parametrize(
    "options, message",
    [
        (("--labels", "red,green", "--fit", "x"), "name the bank"),
        (("--unknown", "x"), "--unknown goes with --fit"),
        (("--show", "default", "--fit", "x"), "--show stands alone"),
        (("--fit", "nowhere"), "there is no file or folder nowhere"),
        (("--fit", "x", "--name", "other"), "no prompt bank 'other'"),
    ],
)
def test_what_cannot_be_fitted(
    edgeclip: Edgeclip, bundle: Path, options: tuple[str, ...], message: str
) -> None:
    assert message in edgeclip(bundle, *options, code=2)


def test_a_fit_that_fails_leaves_the_bank_as_it_was(
    edgeclip: Edgeclip, bundle_copy: Path, tmp_path: Path
) -> None:
    frames = write_squares(tmp_path / "frames", each=4, seed=3)
    before = Bundle(bundle_copy).manifest.prompts
    options = ("--labels", "x,y", "--name", "default", "--force", "--fit", frames)
    assert "labelled as the bank's labels" in edgeclip(bundle_copy, *options, code=2)
    assert Bundle(bundle_copy).manifest.prompts == before
    assert verify(bundle_copy) == []


def test_a_bank_that_was_replaced_meanwhile_stays(bundle_copy: Path) -> None:
    bundle = Bundle(bundle_copy)
    read, old = bundle.manifest.prompts["default"], bank_of(bundle, "default")
    classifier = Classifier(bundle, backend="onnxruntime", precision="fp32")
    classifier.set_labels(["one", "two"])
    store_bank(bundle_copy, "default", classifier.require_bank(), replace=True)
    with pytest.raises(DataError, match="was replaced meanwhile"):
        store_bank(bundle_copy, "default", old, replace=True, read=read)
    assert bank_of(Bundle(bundle_copy), "default").labels == ("one", "two")
    classifier.use_prompts("default")  # of a service that runs on
    assert classifier.labels == ("one", "two")


@pytest.mark.parametrize("place", ["../victim.safetensors", "image.fp32.onnx", "absolute"])
def test_a_strangers_manifest_deletes_nothing(bundle_copy: Path, place: str) -> None:
    victim = bundle_copy.parent / "victim.safetensors"
    victim.write_text("mine")
    name = str(victim) if place == "absolute" else place
    made, raw = manifest.read(bundle_copy)
    raw["prompts"]["x"] = name
    raw["files"].setdefault(name, {"bytes": 4, "sha256": "0" * 64})
    (bundle_copy / "manifest.json").write_text(json.dumps(raw))
    remove_bank(bundle_copy, "x")
    assert victim.read_text() == "mine" and (bundle_copy / "image.fp32.onnx").exists()
    assert "x" not in Bundle(bundle_copy).manifest.prompts
    assert "image.fp32.onnx" in Bundle(bundle_copy).manifest.files


def test_the_users_own_files_beside_the_banks_stay(bundle_copy: Path) -> None:
    own = bundle_copy / "prompts" / "my-backup.deadbeef.safetensors"
    own.write_text("mine")
    (bundle_copy / "prompts" / "folder.deadbeef.safetensors").mkdir()
    remove_bank(bundle_copy, "default")
    assert own.read_text() == "mine"
