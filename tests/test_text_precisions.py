"""The text encoder in fp16 and int8: made, judged, refused, verified, and run."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from conftest import COLORS, write_squares
from numpy.typing import NDArray

import runtime
from calibration import text_judge
from calibration.gate import Cost, Encode, Limits, faults
from calibration.layers import OPERATORS, find_layers
from calibration.metrics import row_cosines
from calibration.pairs import read_pairs
from calibration.text_judge import Naming, TextJudge, naming
from calibration.texts import FEWEST, find_texts, split_texts
from export.bundle import PROBES, ExportOptions, export_bundle
from export.cli import main
from export.precisions import CalibrationOptions
from export.verify import verify
from runtime import manifest
from runtime.bundle import describe
from runtime.errors import BundleError, DataError, GateFailed, UnsupportedFormat
from runtime.tokenizer import Tokenizer

FEW = ("a {} square", "{}")
MANY = (*FEW, *(f"{{}}, a square of {n}" for n in ("paint", "paper", "light", "glass", "ink")))
MANY += tuple(f"the {n} {{}} thing" for n in ("first", "second", "last", "other", "same"))
LABELS = tuple(COLORS)
INT8 = "text.int8.onnx"


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("judged") / "squares", each=12, seed=9)


def options(
    checkpoint: Path,
    bundle: Path,
    templates: tuple[str, ...] = FEW,
    labels: tuple[str, ...] | None = LABELS,
    **changes: Any,
) -> ExportOptions:
    return ExportOptions(
        checkpoint=str(checkpoint),
        bundle=bundle,
        labels=labels,
        templates=templates,
        precisions=CalibrationOptions(precisions=("fp16",), **changes),
    )


@pytest.fixture(scope="module")
def made(
    checkpoint: Path, squares: Path, judged: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("texts") / "bundle"
    frames: dict[str, Any] = {"calibrate": (squares,), "judge": (judged,)}
    export_bundle(options(checkpoint, folder, MANY, text_int8=True, **frames), quiet=True)
    return folder


@pytest.fixture
def made_copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# What is made


def test_both_are_close_to_fp32(made: Path) -> None:
    found, _ = manifest.read(made)
    assert list(found.text_precisions) == ["fp16", "int8"]
    assert {entry.status for entry in found.text_precisions.values()} == {"accepted"}
    half, int8 = (found.text_precisions[name].figures for name in ("fp16", "int8"))
    assert half["cosine_p1"] >= 0.9999 and half["agreement"] == 1
    assert int8["cosine_p1"] >= 0.99 and int8["agreement"] >= 0.99 and int8["drop"] <= 0.5
    assert int8["int8_share"] >= 0.5 and int8["frames"] == 36 and int8["texts"] >= FEWEST
    size = {name: entry.bytes for name, entry in found.files.items()}
    assert size["text.fp16.onnx"] < 0.6 * size["text.fp32.onnx"]
    assert size[INT8] < size["text.fp32.onnx"]
    assert verify(made) == []


def test_fp16_is_there_without_frames_and_int8_only_when_asked_for(bundle: Path) -> None:
    found, _ = manifest.read(bundle)
    assert list(found.text_precisions) == ["fp16"]
    figures = found.text_precisions["fp16"].figures
    assert figures["cosine_p1"] >= 0.9999 and "agreement" not in figures
    assert not (bundle / INT8).exists()
    assert "judged on those that it was calibrated on" in (bundle / "report/report.md").read_text()


def test_int8_is_in_the_linears_alone(made: Path) -> None:
    """Each takes int8 weights, unless it is listed; the table of tokens stays as it is."""
    entry = manifest.read(made)[0].text_precisions["int8"]
    model = onnx.load(made / INT8)
    linears = find_layers(onnx.load(made / "text.fp32.onnx"))
    types = {t.name: t.data_type for t in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    quantised = {
        node.name
        for node in model.graph.node
        if node.op_type in OPERATORS
        and node.input[1] in makers
        and types.get(makers[node.input[1]].input[0]) == onnx.TensorProto.INT8
    }
    assert quantised == {layer.name for layer in linears} - set(entry.float_layers)
    assert types["embedding.weight"] == onnx.TensorProto.FLOAT


def test_the_report_tells_what_was_done(made: Path) -> None:
    report = json.loads((made / "report/report.json").read_text())
    rows = {row["precision"]: row for row in report["text_precisions"]}
    assert list(rows) == ["fp32", "fp16", "int8"]
    assert all(row["status"] == "accepted" and row["bytes"] > 0 for row in rows.values())
    text = (made / "report/report.md").read_text()
    table = text[text.index("## The text encoder by precision") :]
    assert "| int8 | accepted |" in table and "Calibrated on 22 texts, judged on 22" in table


def test_captions_serve_where_there_are_no_labels(
    checkpoint: Path, squares: Path, tmp_path: Path
) -> None:
    table = tmp_path / "pairs.csv"
    pictures = [(color, squares / color / f"{n}.png") for color in COLORS for n in range(12)]
    rows = [f'{path},"a {color} square, number {path.stem}"' for color, path in pictures]
    table.write_text("\n".join(["file,caption", *rows]) + "\n")
    chosen = options(checkpoint, tmp_path / "b", labels=None, calibrate=(table,), text_int8=True)
    found = export_bundle(chosen, quiet=True)
    figures = found.text_precisions["int8"].figures
    assert figures["texts"] == 22 and figures["frames"] == 0 and "agreement" not in figures


def test_too_few_texts_for_int8(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"at least 16 texts .* 14: give more --labels .* captions"):
        export_bundle(options(checkpoint, tmp_path / "b", text_int8=True), quiet=True)
    assert not list(tmp_path.iterdir())


def test_the_command_makes_it_too(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there are too few texts to hold some back: the report says so."""
    colors = "red,green,blue,black,white"
    arguments = ["export", str(checkpoint), str(tmp_path / "b"), "--labels", colors, "--text-int8"]
    monkeypatch.setattr(sys, "argv", ["edgeclip", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    assert not exit.value.code
    assert (tmp_path / "b" / INT8).is_file()
    assert "there are 18 texts only" in (tmp_path / "b/report/report.md").read_text()


# The gate


def test_a_gate_that_fails(
    checkpoint: Path,
    squares: Path,
    judged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every figure is named, with exit code 3; the bundle is there with fp32's texts alone."""
    cost = text_judge.TextJudge.cost

    def turned_round(self: TextJudge, encode: Encode) -> Cost:
        return cost(self, lambda tokens: -encode(tokens))

    monkeypatch.setattr(text_judge.TextJudge, "cost", turned_round)
    frames: dict[str, Any] = {"calibrate": (squares,), "judge": (judged,)}
    with pytest.raises(GateFailed, match="^text fp16: cosine .*; text int8: cosine ") as failed:
        export_bundle(options(checkpoint, tmp_path / "b", MANY, text_int8=True, **frames), True)
    message, text = str(failed.value), (tmp_path / "b/report/report.md").read_text()
    assert failed.value.exit_code == 3 and "more labels or captions" in message
    for figure in ("--min-cosine 0.99", "--min-agreement 0.99", "--max-drop 0.5"):
        assert message.count(figure) == text.count(figure) == 2
    found, _ = manifest.read(tmp_path / "b")
    assert found.text_precisions == {} and list(found.precisions) == ["fp32", "fp16"]
    assert not list((tmp_path / "b").glob("text.[!f]*")) and verify(tmp_path / "b") == []


def test_a_rejected_file_is_kept_when_asked_for_and_runs_only_by_its_name(
    checkpoint: Path, tmp_path: Path
) -> None:
    chosen = options(
        checkpoint, tmp_path / "b", MANY,
        text_int8=True, limits=Limits(min_cosine=1.0), allow_rejected=True,
    )  # fmt: skip
    with pytest.raises(GateFailed, match="text int8: cosine .*marked as rejected"):
        export_bundle(chosen, quiet=True)
    found, _ = manifest.read(tmp_path / "b")
    assert found.text_precisions["int8"].status == "rejected"
    assert verify(tmp_path / "b") == []
    assert runtime.load(tmp_path / "b", labels=LABELS).text_precision == "fp32"
    assert runtime.load(tmp_path / "b", labels=LABELS, text_precision="int8").labels == LABELS


def test_texts_are_split_alike_whatever_their_order(tokenizer: Tokenizer) -> None:
    texts = [f"number {n}" for n in range(40)]
    found = split_texts([*texts, "NUMBER 3"], tokenizer, seed=0)
    again = split_texts(texts[::-1], tokenizer, seed=0)
    assert found.apart and len(found.calibration) == len(found.judged) == 20
    np.testing.assert_array_equal(found.calibration, again.calibration)
    np.testing.assert_array_equal(found.judged, again.judged)
    rows = [{row.tobytes() for row in part} for part in (found.calibration, found.judged)]
    assert not rows[0] & rows[1]
    few = split_texts(texts[:31], tokenizer, seed=0)
    assert not few.apart and len(few.judged) == 31


def test_what_texts_there_are(squares: Path, tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text(f"file,caption\n{squares}/red/0.png,one\n{squares}/red/1.png,two\n")
    assert set(find_texts([], LABELS, FEW, PROBES, 99, 0)) == {
        *PROBES, *LABELS, *(f"a {label} square" for label in LABELS),
    }  # fmt: skip
    assert set(find_texts([squares, table], None, ["{}"], (), 99, 0)) == {*LABELS, "one", "two"}
    assert len(find_texts([squares, table], LABELS, FEW, (), 1, 0)) == 2
    assert read_pairs(table, ["{}"]).texts == ("one", "two")


def test_many_prompts_are_cut_by_the_templates_of_the_label_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text_judge, "MOST_PROMPTS", 4)
    labels = {"labels": ["a", "b"], "templates": ["one {}", "two {}", "three {}"]}
    asked: list[str] = []

    def tokenizer(texts: Sequence[str]) -> NDArray[np.int32]:
        asked.extend(texts)
        return np.arange(len(texts), dtype=np.int32)[:, None]

    unit = np.eye(4, dtype=np.float32)
    told = naming(unit[:, :4], None, labels, ["{}"], tokenizer, lambda tokens: unit[tokens[:, 0]])
    assert asked == ["one a", "two a", "one b", "two b"]
    assert told.templates == ("one {}", "two {}") and told.of == 3
    assert told.best(unit).shape == (4,)


def test_the_judge_by_hand() -> None:
    """Two frames, two labels with two prompts each; the prompts of the labels are exchanged."""
    unit = np.eye(2, dtype=np.float32)
    prompts = np.arange(4, dtype=np.int32)[:, None]
    reference = unit[[0, 0, 1, 1]]
    frames = Naming(unit, np.array([0, 1]), ["a", "b"], ("{}", "a {}"), 2, prompts, reference)
    judge = TextJudge(prompts[:2], reference[:2], frames)
    same = judge.cost(lambda tokens: reference[tokens[:, 0]])
    assert same.cosine_p1 == same.agreement == same.top1 == 1 and same.drop == 0
    assert same.frames == 2 and same.texts == 2 and faults(same, Limits()) == []
    other = judge.cost(lambda tokens: reference[::-1][tokens[:, 0]])
    assert (other.cosine_p1, other.agreement, other.drop, other.flipped) == (0, 0, 100, (0, 1))
    anything = Limits(min_cosine=-1, min_agreement=-1, max_drop=100)
    assert faults(other, anything) == []
    for figure in ({"min_cosine": 0.5}, {"min_agreement": 0.5}, {"max_drop": 50}):
        (fault,) = faults(other, dataclasses.replace(anything, **figure))
        assert f"--{next(iter(figure)).replace('_', '-')}" in fault
    alone = judge.first(1).cost(lambda tokens: reference[tokens[:, 0]])
    assert alone.texts == 1 and alone.agreement is None
    nothing = judge.cost(lambda tokens: np.full((len(tokens), 2), np.nan, np.float32))
    assert nothing.cosine_p1 == -1 and nothing.agreement == 0.5


# On the device


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_live_labels_classify_the_same(made: Path, judged: Path, precision: str) -> None:
    classifier = runtime.load(made, labels=LABELS, templates=FEW, text_precision=precision)
    before = runtime.load(made, labels=LABELS, templates=FEW)
    pictures = sorted(judged.glob("*/*.png"))
    assert [classifier.classify(p).label for p in pictures] == [
        before.classify(p).label for p in pictures
    ]
    rows = classifier.embed_text(PROBES), before.embed_text(PROBES)
    assert 0.99 < row_cosines(*rows).min() and not np.array_equal(*rows)
    assert f"text {precision}, 3 labels" in repr(classifier) and "text" not in repr(before)
    assert classifier.bank and before.bank
    assert classifier.bank.text_encoder != before.bank.text_encoder


def test_prompt_banks_are_used_whatever_embeds_live_labels(made: Path) -> None:
    exported, half = runtime.load(made), runtime.load(made, text_precision="fp16")
    assert exported.bank and half.bank
    np.testing.assert_array_equal(exported.bank.embeddings, half.bank.embeddings)


def test_a_precision_that_is_not_there(bundle: Path) -> None:
    with pytest.raises(BundleError, match="no text encoder of .* 'int8'; it has: fp32, fp16"):
        runtime.load(bundle, text_precision="int8")


def test_a_bundle_from_before_there_were_any(made_copy: Path) -> None:
    change_manifest(made_copy, lambda fields: fields.pop("text_precisions"))
    assert runtime.load(made_copy, labels=LABELS).labels == LABELS
    assert verify(made_copy) == []
    with pytest.raises(BundleError, match="it has: fp32$"):
        runtime.load(made_copy, text_precision="fp16")


def test_a_file_that_is_not_listed(made_copy: Path) -> None:
    change_manifest(made_copy, lambda fields: fields["files"].pop(INT8))
    with pytest.raises(UnsupportedFormat, match="does not list the file 'text.int8.onnx'"):
        runtime.load(made_copy)


# Verify


def test_verify_finds_a_fault_in_the_graph(made_copy: Path) -> None:
    model = onnx.load(made_copy / INT8)
    zero = next(t for t in model.graph.initializer if t.name == "int8.zero")
    zero.CopyFrom(onnx.numpy_helper.from_array(np.array(3, np.int8), "int8.zero"))
    onnx.save(model, made_copy / INT8)
    entry = msgspec.to_builtins(describe(made_copy / INT8))
    change_manifest(made_copy, lambda fields: fields["files"].update({INT8: entry}))
    found = verify(made_copy)
    assert found and all(line.startswith(f"{INT8}: ") for line in found)
    assert any("it is not symmetric int8" in line for line in found)


def another_status(fields: dict[str, Any]) -> None:
    fields["text_precisions"]["int8"]["status"] = "rejected"


def another_name(fields: dict[str, Any]) -> None:
    fields["text_precisions"]["fp32"] = fields["text_precisions"].pop("fp16")


def another_file(fields: dict[str, Any]) -> None:
    fields["text_precisions"]["int8"]["file"] = "text.fp32.onnx"


def an_image_encoder(fields: dict[str, Any]) -> None:
    fields["text_precisions"]["fp16"]["file"] = "image.fp16.onnx"


def a_float_layer(fields: dict[str, Any]) -> None:
    fields["text_precisions"]["fp16"]["float_layers"] = ["MatMul_3"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (another_status, "text int8 is marked as rejected in the manifest, as accepted in"),
        (another_name, "the text precision 'fp32' is none of fp16, int8"),
        (another_file, "text.fp32.onnx: it has no quantised layer"),
        (an_image_encoder, "image.fp16.onnx: inputs uint8 frames"),
        (a_float_layer, "text.fp16.onnx: MatMul_3: MatMul is float16, and listed in float_layers"),
    ],
)
def test_verify_finds_a_wrong_entry(
    made_copy: Path, change: Callable[[dict[str, Any]], None], fault: str
) -> None:
    change_manifest(made_copy, change)
    found = verify(made_copy)
    assert any(line.startswith(fault) for line in found), found
