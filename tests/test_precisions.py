"""Export with frames: what is made, what is refused, and what the report says of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import COLORS, write_squares
from PIL import Image

import runtime
from calibration import activations, gate, precisions
from calibration.gate import Cost, Limits
from export.bundle import ExportOptions, export_bundle
from export.precisions import CalibrationOptions
from export.verify import verify
from runtime import manifest
from runtime.errors import DataError, GateFailed

TEMPLATES = ("a {} square", "{}")


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("judged") / "squares", each=12, seed=9)


def options(checkpoint: Path, bundle: Path, force: bool = False, **changes: Any) -> ExportOptions:
    return ExportOptions(
        checkpoint=str(checkpoint),
        bundle=bundle,
        labels=tuple(COLORS),
        templates=TEMPLATES,
        precisions=CalibrationOptions(**changes),
        force=force,
    )


@pytest.fixture(scope="module")
def made(
    checkpoint: Path, squares: Path, judged: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "bundle"
    chosen = options(checkpoint, folder, calibrate=(squares,), judge=(judged,))
    export_bundle(chosen, quiet=True)
    return folder


def test_precisions_that_agree(made: Path, judged: Path) -> None:
    found, _ = manifest.read(made)
    assert list(found.precisions) == ["fp32", "fp16", "int8", "int8_fp16"]
    assert {entry.status for entry in found.precisions.values()} == {"accepted"}
    half, int8 = (found.precisions[name].figures for name in ("fp16", "int8"))
    assert half["cosine_p1"] >= 0.9999 and half["agreement"] == 1
    assert int8["cosine_p1"] >= 0.99 and int8["agreement"] >= 0.99 and int8["drop"] <= 0.5
    assert int8["int8_share"] >= 0.9 and int8["frames"] == 36
    sizes = {name: found.files[entry.image].bytes for name, entry in found.precisions.items()}
    assert sizes["int8"] < 0.4 * sizes["fp32"] and sizes["fp16"] < 0.6 * sizes["fp32"]
    assert verify(made) == []


def test_int8_fp16_is_int8_with_half_around_it(made: Path) -> None:
    """The same int8 weights, scales in float16, and float32 only where fp16 keeps it too."""
    found, _ = manifest.read(made)
    int8, both = found.precisions["int8"].figures, found.precisions["int8_fp16"].figures
    assert both["cosine_p1"] >= 0.99 and both["int8_share"] == int8["int8_share"]
    models = [onnx.load(made / found.precisions[name].image) for name in ("int8", "int8_fp16")]
    assert [model.opset_import[0].version for model in models] == [17, 19]
    weights = [int8_weights(model) for model in models]
    assert weights[0].keys() == weights[1].keys() and len(weights[0]) == 10
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    scales = [t for t in models[1].graph.initializer if t.name.endswith(".scale")]
    halves = [t for t in scales if t.data_type == onnx.TensorProto.FLOAT16]
    assert len(scales) - len(halves) == 2  # the projection's: its input's and its weight's


def int8_weights(model: onnx.ModelProto) -> dict[str, Any]:
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    return {name: a for name, a in arrays.items() if a.dtype == np.int8 and a.ndim >= 2}


@pytest.mark.parametrize("names", [(), ("fp16",), ("int8",)])
def test_only_the_precisions_that_are_asked_for(
    checkpoint: Path, squares: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    chosen = options(checkpoint, tmp_path / "b", calibrate=(squares,), precisions=names)
    assert list(export_bundle(chosen, quiet=True).precisions) == ["fp32", *names]


@pytest.mark.parametrize(
    ("names", "message"),
    [(("fp8",), "'fp8' is none of"), (("int8_fp16",), "ask for both")],
)
def test_precisions_that_cannot_be_asked_for(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        CalibrationOptions(precisions=names)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int8_fp16"])
def test_the_runtime_runs_each(made: Path, judged: Path, precision: str) -> None:
    classifier = runtime.load(made, precision=precision)
    for color in COLORS:
        for picture in sorted((judged / color).iterdir())[:4]:
            assert classifier.classify(picture).label == color


def test_the_report_tells_what_was_done(made: Path) -> None:
    report = json.loads((made / "report" / "report.json").read_text())
    rows = {row["precision"]: row for row in report["precisions"]}
    assert list(rows) == ["fp32", "fp16", "int8", "int8_fp16"]
    assert all(row["ms"] > 0 and row["nodes"] > 50 for row in rows.values())
    assert len(report["layers"]) == 10 and not any(row["in_float"] for row in report["layers"])
    frames = report["frames"]
    assert len(frames["calibration"]["frames"]) == 72 and len(frames["judged"]["frames"]) == 36
    text = (made / "report" / "report.md").read_text()
    assert "| int8 | accepted |" in text and "transformer.resblocks.0.attn.qkv" in text
    Image.open(made / "report" / "drift.png").verify()


def test_without_frames_there_is_no_int8(bundle: Path) -> None:
    found, _ = manifest.read(bundle)
    assert list(found.precisions) == ["fp32", "fp16"]
    assert "int8 not made" in (bundle / "report" / "report.md").read_text()


def test_some_frames_are_set_apart_to_judge(
    checkpoint: Path, squares: Path, tmp_path: Path
) -> None:
    export_bundle(options(checkpoint, tmp_path / "b", calibrate=(squares,)), quiet=True)
    frames = json.loads((tmp_path / "b" / "report" / "report.json").read_text())["frames"]
    names = [{row["sha256"] for row in frames[k]["frames"]} for k in ("calibration", "judged")]
    assert len(names[0]) > len(names[1]) > 20 and not names[0] & names[1]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"min_cosine": 1.0}, "--min-cosine 1"),
        ({"min_agreement": 1.0}, "--min-agreement 1"),
        ({"max_drop": -100.0}, "--max-drop -100"),
    ],
)
def test_a_gate_that_cannot_be_met(
    checkpoint: Path,
    squares: Path,
    judged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limits: dict[str, float],
    message: str,
) -> None:
    """Each figure ends the export with exit code 3; the bundle is there without int8."""
    compare = gate.Judge.compare

    def worse(self: gate.Judge, rows: Any) -> Cost:
        return compare(self, rows if "agreement" not in message else -rows)

    monkeypatch.setattr(gate.Judge, "compare", worse)
    chosen = options(
        checkpoint, tmp_path / "b", calibrate=(squares,), judge=(judged,), limits=Limits(**limits)
    )
    with pytest.raises(GateFailed, match=message) as failed:
        export_bundle(chosen, quiet=True)
    assert failed.value.exit_code == 3
    assert "--allow-rejected" in str(failed.value) and "More frames" in str(failed.value)
    found, _ = manifest.read(tmp_path / "b")
    assert "int8" not in found.precisions and "fp32" in found.precisions
    assert verify(tmp_path / "b") == []
    assert message in (tmp_path / "b" / "report" / "report.md").read_text()


def test_a_rejected_file_is_kept_when_asked_for_and_never_chosen(
    checkpoint: Path, squares: Path, judged: Path, tmp_path: Path
) -> None:
    chosen = options(
        checkpoint, tmp_path / "b", calibrate=(squares,), judge=(judged,),
        limits=Limits(max_drop=-100), allow_rejected=True,
    )  # fmt: skip
    with pytest.raises(GateFailed, match="marked as rejected"):
        export_bundle(chosen, quiet=True)
    found, _ = manifest.read(tmp_path / "b")
    assert found.precisions["int8"].status == "rejected"
    assert found.precisions[runtime.load(tmp_path / "b").precision].status == "accepted"
    assert runtime.load(tmp_path / "b", precision="int8").classify(next((judged / "red").iterdir()))


def test_an_export_that_was_cut_off_leaves_nothing_but_its_ranges(
    checkpoint: Path,
    squares: Path,
    judged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = options(checkpoint, tmp_path / "b", calibrate=(squares,), judge=(judged,))
    with monkeypatch.context() as patch:
        patch.setattr(precisions, "choose_ranges", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_bundle(chosen, quiet=True)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".edgeclip-ranges-")
    ran: list[int] = []
    add = activations.Activation.add

    def noted(self: activations.Activation, *args: Any) -> None:
        ran.append(1)
        add(self, *args)

    monkeypatch.setattr(activations.Activation, "add", noted)
    export_bundle(chosen, quiet=True)
    assert not ran  # all was there
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def one_frame(folder: Path) -> Path:
    folder.mkdir()
    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(folder / "0.png")
    return folder


@pytest.mark.parametrize("kind", ["empty", "one", "corrupt", "missing", "same"])
def test_calibration_sets_that_do_not_work(
    checkpoint: Path, tmp_path: Path, judged: Path, kind: str
) -> None:
    folder = tmp_path / "frames"
    if kind == "empty":
        folder.mkdir()
    elif kind == "one":
        one_frame(folder)
    elif kind == "corrupt":
        folder.mkdir()
        (folder / "0.png").write_bytes(b"this is no picture")
    judge: tuple[Path, ...] = ()
    if kind == "same":
        folder, judge = judged, (judged,)
    with pytest.raises(DataError):
        export_bundle(
            options(checkpoint, tmp_path / "b", calibrate=(folder,), judge=judge), quiet=True
        )
    assert [p.name for p in tmp_path.iterdir() if p.name != "frames"] == []


def test_black_frames(checkpoint: Path, judged: Path, tmp_path: Path) -> None:
    """One black frame to calibrate on: whatever int8 makes of it is judged on real ones."""
    folder = tmp_path / "frames"
    folder.mkdir()
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(folder / "0.png")
    chosen = options(checkpoint, tmp_path / "b", calibrate=(folder,), judge=(judged,))
    try:
        found = export_bundle(chosen, quiet=True)
    except GateFailed:
        found, _ = manifest.read(tmp_path / "b")
    assert "fp32" in found.precisions
    for entry in found.precisions.values():
        onnx.checker.check_model(onnx.load(tmp_path / "b" / entry.image))
    text = (tmp_path / "b" / "report" / "report.md").read_text()
    assert "1 frame" in text
