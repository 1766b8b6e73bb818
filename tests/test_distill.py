"""A student learns from a teacher, without labels, and is a whole CLIP in the end."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import COLORS, square, write_squares
from PIL import Image
from rich.progress import Progress
from safetensors.numpy import load_file
from test_distributed import edgeclip, torchrun
from test_resume import Killed, die_at
from typer.testing import CliRunner

from calibration.subject import measure
from export.cli import app
from runtime.errors import DataError, GateFailed
from training.distill import distill
from training.distill_images import open_images
from training.distill_options import DistillOptions
from training.evaluate import checkpoint_subject
from training.model import create, save
from training.rivals import split
from training.student import make_student

WEIGHTS = "open_clip_model.safetensors"


def options(teacher: Path, student: Path, source: Path, out: Path, **more: Any) -> DistillOptions:
    chosen: dict[str, Any] = {
        "teacher": str(teacher),
        "student": str(student),
        "images": (source,),
        "out": out,
        "epochs": 4,
        "batch_size": 16,
        "views": 2,
        "crop": 0.8,
        "lr": 3e-3,
        "workers": 0,
    }
    return DistillOptions(**(chosen | more))


@pytest.fixture(scope="session")
def student(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, half: Path, unlabelled: Path
) -> Path:
    out = tmp_path_factory.mktemp("student") / "student"
    val = write_squares(out.parent / "val", each=8, seed=5)
    distill(
        options(checkpoint, half, unlabelled, out, val=val, labels=",".join(COLORS), epochs=15),
        quiet=True,
    )
    return out


def test_it_learns_without_labels(student: Path) -> None:
    record = json.loads((student / "training.json").read_text())
    last = record["epochs"][-1]
    assert last["top1"] > 0.8 and last["agreement"] > 0.8 and last["teacher_cosine"] > 0.8
    assert record["ended"] and record["options"]["views"] == 2 and "loss" not in record["options"]
    _, found = measure(checkpoint_subject(str(student)), student.parent / "val", quiet=True)
    assert found.figures["top1"] == pytest.approx(last["top1"])


def test_it_is_a_whole_clip_with_its_teachers_text_tower(student: Path, checkpoint: Path) -> None:
    import open_clip  # behind ours, which makes torchvision load

    own = open_clip.create_model(f"local-dir:{student}").state_dict()
    given = create(str(checkpoint)).model.state_dict()
    rest = {k for k in given if not k.startswith("visual.")}
    assert rest and all(torch.equal(own[k], given[k]) for k in rest)
    assert own["visual.proj"].shape == (32, 32)
    assert create(str(student)).templates == ("a {} square", "{}")


def test_the_report_holds_it_against_its_teacher(student: Path) -> None:
    folder = student / "report"
    text = (folder / "report.md").read_text()
    for part in ("## Student and teacher", "multiply-adds of a frame", "| red |", "curves.png"):
        assert part in text
    found = json.loads((folder / "report.json").read_text())["teacher"]
    assert found["figures"]["top1"]["teacher"] > 0.9
    assert {row["label"] for row in found["classes"]} == set(COLORS)
    assert len(found["differences"]) == round((1 - found["agreement"]) * 24)
    assert (folder / "differences.png").exists() == bool(found["differences"])


def test_a_killed_run_goes_on_to_the_same_weights(
    checkpoint: Path, half: Path, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"checkpoint_every": 3, "ema": 0.9, "cache": tmp_path / "cache", "epochs": 2}
    whole = options(checkpoint, half, unlabelled, tmp_path / "whole", **more)
    distill(whole, quiet=True)
    with monkeypatch.context() as patch:
        die_at(patch, 5, Killed())
        with pytest.raises(Killed):
            distill(options(checkpoint, half, unlabelled, tmp_path / "out", **more), quiet=True)
    again = options(checkpoint, half, unlabelled, tmp_path / "out", **more, resume=True)
    monkeypatch.setattr("training.distill_prepare.inherit", None)  # the state has the weights
    distill(again, quiet=True)
    reports = [(tmp_path / n / "report/report.md").read_text() for n in ("whole", "out")]
    starts = [line for text in reports for line in text.splitlines() if "start" in line]
    assert "random" not in str(starts) and len(set(starts)) == 1
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    with pytest.raises(DataError, match="has ended"):
        distill(again, quiet=True)


def test_another_teacher_is_no_continuation(
    checkpoint: Path, half: Path, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        die_at(patch, 3, Killed())
        with pytest.raises(Killed):
            distill(
                options(checkpoint, half, unlabelled, tmp_path / "out", checkpoint_every=2),
                quiet=True,
            )
    changed = options(
        checkpoint, half, unlabelled, tmp_path / "out", resume=True, checkpoint_every=2, affinity=3
    )
    monkeypatch.setattr("training.distill.prepare_distillation", None)  # it is said before
    with pytest.raises(DataError, match="--affinity was 1.0, and is 3 now"):
        distill(changed, quiet=True)


def test_captions_and_pictures_without_any(
    checkpoint: Path, tiny_config: Path, squares: Path, unlabelled: Path, tmp_path: Path
) -> None:
    table = tmp_path / "captions.csv"
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "caption"])
        for color in COLORS:
            for n in range(4):
                writer.writerow([squares / color / f"{n}.png", f"a {color} square, left"])
                writer.writerow([squares / color / f"{n}.png", f"the colour {color}"])
    record = distill(
        options(
            checkpoint, tiny_config, table, tmp_path / "out",
            images=(table, unlabelled), captions=2, epochs=2, micro_batch=8, inherit=False,
        ),
        quiet=True,
    )  # fmt: skip
    assert record["data"][0]["captions"] == 6
    assert record["start"] == "random weights" and "teacher_cosine" in record["epochs"][-1]


def test_labels_are_not_learned_from(squares: Path, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text(f"file,label\n{squares}/red/1.png,red\n{squares}/red/2.png,red\n")
    quiet = Progress(disable=True)
    pairs = open_images([squares, table], 1.0, tmp_path, 0.0, quiet)
    assert len(pairs) == 72 and not pairs.texts and set(pairs.captions) == {()}


def test_frames_of_a_video(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    video = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"MJPG"), 10, (60, 48))
    for second in range(6):  # the last three look alike
        frame = square((220, 40, 40), rng, 48) if second < 3 else np.full((48, 60, 3), 90, np.uint8)
        for _ in range(10):
            writer.write(frame[..., ::-1])
    writer.release()
    quiet = Progress(disable=True)
    room = tmp_path / "room"
    pairs = open_images([video], 1.0, room, 0.0, quiet)
    assert len(pairs) == 4
    reddest = np.asarray(Image.open(pairs.files[0])).reshape(-1, 3).max(axis=0)
    assert reddest[0] > 180 > reddest[2]
    assert open_images([video], 1.0, room, 0.0, quiet).files == pairs.files
    assert len(open_images([video], 0.5, room, 0.0, quiet)) == 3
    (tmp_path / "no.mp4").write_text("no video")
    with pytest.raises(DataError, match="no video that can be read"):
        open_images([tmp_path / "no.mp4"], 1.0, room, 0.0, quiet)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"images": ()}, "--images: name at least one"),
        ({"embedding": -1}, "--embedding must not be negative"),
        (dict.fromkeys(("embedding", "affinity", "soft_labels", "contrast"), 0), "all weights"),
        ({"temperature": 0}, "--temperature must be greater"),
        ({"held_out": 1}, "--held-out is a share"),
        ({"batch_size": 1}, "--batch-size 1"),
        ({"views": 0}, "--views must be at least 1"),
    ],
)
def test_options_that_cannot_work(more: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        options(Path("t"), Path("s"), Path("i"), Path("o"), **more)


def test_without_anything_to_learn_it_does_not_begin(
    checkpoint: Path, unlabelled: Path, tmp_path: Path
) -> None:
    chosen = options(
        checkpoint, Path("nano"), unlabelled, tmp_path / "out", embedding=0, affinity=0
    )
    with pytest.raises(DataError, match="nothing would be learned"):
        distill(chosen, quiet=True)


def test_unreadable_pictures_to_compare_on_count(
    checkpoint: Path, unlabelled: Path, tmp_path: Path
) -> None:
    val = write_squares(tmp_path / "val", each=2, seed=5)
    next(val.rglob("*.png")).write_bytes(b"no picture")
    chosen = options(checkpoint, Path("nano"), unlabelled, tmp_path / "out", val=val)
    with pytest.raises(DataError, match="1 of 6"):
        distill(chosen, quiet=True)


def test_held_out_pictures_do_not_shape_the_student(
    checkpoint: Path, half: Path, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Begun(Exception):
        pass

    seen: list[Path] = []

    def note(_: Any, student: Any, teacher: Any, files: Any, progress: Any) -> None:
        seen.extend(files)
        raise Begun

    monkeypatch.setattr("training.distill_prepare._inherit", note)
    with pytest.raises(Begun):
        distill(options(checkpoint, half, unlabelled, tmp_path / "out", held_out=0.25), quiet=True)
    assert len(seen) == 0.75 * len(list(unlabelled.iterdir()))


def test_quick_gelu_counts_where_there_is_some(checkpoint: Path, tmp_path: Path) -> None:
    """A trained student of the other kind is refused if its tower would compute otherwise."""
    teacher = create(str(checkpoint))
    assert teacher.config["quick_gelu"]
    other = dataclasses.replace(teacher, config=teacher.config | {"quick_gelu": False})
    chosen = options(checkpoint, checkpoint, tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="trained with quick_gelu, its teacher otherwise"):
        make_student(chosen, other)
    folder = tmp_path / "nano"  # timm's, which has no such thing
    folder.mkdir()
    save(create("nano"), folder, {})
    assert make_student(dataclasses.replace(chosen, student=str(folder)), teacher)


def test_inherit_says_why_not(checkpoint: Path, unlabelled: Path, tmp_path: Path) -> None:
    chosen = options(checkpoint, Path("nano"), unlabelled, tmp_path / "out", inherit=True)
    with pytest.raises(DataError, match="nano-of-tiny is neither a smaller ViT"):
        distill(chosen, quiet=True)


def test_a_trained_student_cannot_inherit(
    checkpoint: Path, unlabelled: Path, tmp_path: Path
) -> None:
    chosen = options(checkpoint, checkpoint, unlabelled, tmp_path / "out", inherit=True)
    with pytest.raises(DataError, match="--inherit begins with the weights of tiny, but"):
        distill(chosen, quiet=True)


@pytest.mark.slow
def test_the_command_makes_a_bundle_of_the_student(
    checkpoint: Path,
    half: Path,
    unlabelled: Path,
    squares: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from export import distilled_bundle
    from export.cli import main

    monkeypatch.setattr(distilled_bundle, "SECONDS", 0.1)
    arguments = [
        "distill", tmp_path / "out", "--teacher", checkpoint, "--student", half,
        "--images", unlabelled, "--images", squares, "--val", squares, "--labels", "red,green,blue",
        "--epochs", 8, "--views", 2, "--batch-size", 16, "--lr", 3e-3, "--workers", 0,
        "--bundle", tmp_path / "bundle", "--json",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["edgeclip", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    output = capsys.readouterr()
    report = json.loads((tmp_path / "out/report/report.json").read_text())
    if not ended.value.code:
        assert json.loads(output.out)["bundle"] == report["bundle"]
    found = report["bundle"]
    assert found["figures"]["fp32"]["top1"] == pytest.approx(report["figures"]["top1"], abs=0.03)
    assert found["teacher"]["top1"] == report["teacher"]["figures"]["top1"]["teacher"]
    against = [own["agreement"] for own in found["figures"].values()]
    assert len(against) > 1 and np.allclose(against, report["teacher"]["agreement"], atol=0.05)
    assert found["mib"]["image.fp16.onnx"] < found["mib"]["image.fp32.onnx"]
    assert {row["backend"] for row in found["ms"]} >= {"onnxruntime"}
    assert "## The bundle" in (tmp_path / "out/report/report.md").read_text()
    assert (tmp_path / "bundle/prompts/default.safetensors").exists()
    # What was cut off in the export goes on with the export.
    shutil.rmtree(tmp_path / "bundle")
    monkeypatch.setattr("training.distill.run", None)  # would fail
    monkeypatch.setattr("sys.argv", ["edgeclip", *map(str, arguments), "--resume"])
    with pytest.raises(SystemExit) as again:
        main()
    assert again.value.code == ended.value.code
    assert (tmp_path / "bundle/prompts/default.safetensors").exists()


@pytest.mark.slow
def test_two_processes_reach_the_weights_of_one(
    checkpoint: Path, half: Path, unlabelled: Path, tmp_path: Path
) -> None:
    one = options(checkpoint, half, unlabelled, tmp_path / "one", epochs=2, labels="red,blue")
    distill(one, quiet=True)
    done = torchrun(
        edgeclip(), "distill", str(tmp_path / "two"), f"--teacher={checkpoint}",
        f"--student={half}", f"--images={unlabelled}", "--labels=red,blue", "--epochs=2",
        "--batch-size=16", "--views=2", "--crop=0.8", "--lr=3e-3", "--workers=0", "--devices=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    for name, own in expected.items():
        np.testing.assert_allclose(own, found[name], rtol=1e-4, atol=2e-5, err_msg=name)


def test_a_budget_finds_the_student(
    checkpoint: Path, half: Path, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export import budget

    tiny = str(Path(__file__).parent / "tiny.json")
    monkeypatch.setattr(budget, "proposed", lambda ms, backend, console: [tiny, str(half)])
    out = tmp_path / "out"
    command = [
        "distill", out, "--teacher", checkpoint, "--budget-ms", 5, "--images", unlabelled,
        "--labels", "red,green,blue", "--epochs", 4, "--batch-size", 8, "--workers", 0, "--json",
    ]  # fmt: skip
    result = CliRunner().invoke(app, list(map(str, command)), catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "out.budget" / "budget.json").read_text())
    assert set(found["reached"]) == {tiny, str(half)}
    assert found["student"] == max(found["reached"], key=found["reached"].get)
    assert json.loads(result.stdout)["options"]["student"] == found["student"]
    for message, *more in (
        ("leave out --student", "--student", half, "--force"),
        ("exists already",),
        ("on one device", "--devices", 2, "--force"),
        ("give --val", "--held-out", 0, "--force"),
    ):
        wrong = list(map(str, [*command, *more]))
        with pytest.raises(DataError, match=message):
            CliRunner().invoke(app, wrong, catch_exceptions=False)


def test_what_is_held_out_is_moved_by_no_other_picture() -> None:
    digests = np.random.default_rng(0).integers(0, 256, (1000, 16), np.uint8)
    digests[501] = digests[500]
    learn, compare = split(digests, 0.1, 3)
    assert sorted([*learn, *compare]) == list(range(1000)) and len(compare) in (100, 101)
    assert (500 in compare) == (501 in compare)
    assert split(digests, 0.1, 4)[1] != compare
    more = np.concatenate([digests[::-1], np.full((10, 16), 7, np.uint8)])
    moved = {999 - row for row in split(more, 0.1, 3)[1]} ^ set(compare)
    assert len(moved) < 5
    assert split(digests, 0.0, 3) == (list(range(1000)), [])


def test_a_distillation_is_searched_with_one_cache_of_the_teacher(
    checkpoint: Path, half: Path, unlabelled: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [
        "distill", out, "--teacher", checkpoint, "--student", half, "--images", unlabelled,
        "--labels", "red,green,blue", "--epochs", 1, "--batch-size", 8, "--workers", 0,
        "--search", 2, "--search-over", "lr", "--json",
    ]  # fmt: skip
    result = CliRunner().invoke(app, list(map(str, command)), catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert len(record["search"]["trials"]) == 2
    assert record["search"]["reached"] == record["epochs"][-1]["agreement"]
    assert (tmp_path / "out.teacher" / "teacher").is_dir()
    assert not list((tmp_path / "out.search").glob("*.run/teacher"))


def test_a_student_learns_as_int8(
    checkpoint: Path, half: Path, unlabelled: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="--qat goes on from a trained model"):
        fresh = options(checkpoint, half, unlabelled, tmp_path / "no", qat=True, inherit=False)
        distill(fresh, quiet=True)
    first = options(checkpoint, half, unlabelled, tmp_path / "first", epochs=2)
    distill(first, quiet=True)
    again = options(
        checkpoint, first.out, unlabelled, tmp_path / "out", epochs=1, lr=1e-4, qat=True
    )
    record = distill(again, quiet=True)
    assert record["options"]["qat"] and record["epochs"][0]["teacher_cosine"] > 0
    assert len(json.loads((again.out / "quantization.json").read_text())["input_steps"]) > 4


def test_what_a_bundle_cannot_be_is_said_before_the_training(
    checkpoint: Path, half: Path, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.distill.run", None)  # would fail
    command = [
        "distill", tmp_path / "out", "--teacher", checkpoint, "--student", half, "--images",
        unlabelled,
    ]  # fmt: skip
    for message, *more in (
        ("name another folder", "--bundle", tmp_path / "out"),
        ("leave out --qat-bits 4", "--bundle", tmp_path / "b", "--qat", "--qat-bits", 4),
    ):
        with pytest.raises(DataError, match=message):
            CliRunner().invoke(app, list(map(str, [*command, *more])), catch_exceptions=False)


def test_an_export_that_fails_does_not_take_the_old_bundle_for_its_own(
    checkpoint: Path, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export import distilled_bundle

    def fails(*_: Any) -> None:
        raise GateFailed("the files differ from the model")

    monkeypatch.setattr(distilled_bundle, "export_bundle", fails)
    (tmp_path / "old").mkdir()
    chosen = options(checkpoint, checkpoint, unlabelled, tmp_path / "out")
    with pytest.raises(GateFailed, match="the files differ"):
        distilled_bundle.bundle_student(chosen, tmp_path / "old")
