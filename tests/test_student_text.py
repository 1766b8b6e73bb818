"""A student's own text tower: its teacher's, smaller, which learns beside the image tower."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import COLORS, write_squares
from safetensors.numpy import load_file
from test_distill import WEIGHTS, options
from test_resume import Killed, die_at

import runtime
from export.bundle import ExportOptions, export_bundle
from runtime.errors import DataError
from training.distill import distill
from training.distill_texts import gather_texts, read_lines
from training.evaluate import text_encoder
from training.model import ClipModel, create
from training.student_text import fill_text, text_config
from training.text import text_side
from training.text_towers import encode_short

LABELS = ",".join(COLORS)
WORDS = ("a cat", "two dogs", "something red", "a blue car", "the green sea", "night")


def texts_of(clip: ClipModel, texts: tuple[str, ...] = WORDS) -> np.ndarray[Any, Any]:
    from runtime.tokenizer import Tokenizer

    return text_encoder(clip, Tokenizer(*text_side(clip)))(texts)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> ClipModel:
    """A teacher whose text tower has three layers of three heads."""
    config = json.loads(tiny_config.read_text())
    config["text_cfg"] |= {"layers": 3, "width": 48, "heads": 3}
    file = tmp_path_factory.mktemp("deep") / "deep.json"
    file.write_text(json.dumps(config))
    return create(str(file))


def smaller(teacher: ClipModel, wanted: str, folder: Path) -> ClipModel:
    config = {**teacher.config, "text_cfg": text_config(wanted, teacher)}
    file = folder / "smaller.json"
    file.write_text(json.dumps(config))
    made = create(str(file), seed=7)
    fill_text(made, wanted, teacher)
    return made


def test_the_whole_tower_says_what_the_teacher_says(deep: ClipModel, tmp_path: Path) -> None:
    np.testing.assert_allclose(
        texts_of(smaller(deep, "3", tmp_path)), texts_of(deep), rtol=1e-5, atol=1e-6
    )


def test_layers_are_at_even_distances(deep: ClipModel, tmp_path: Path) -> None:
    made = smaller(deep, "2", tmp_path).model.transformer.resblocks
    given = deep.model.transformer.resblocks
    for own, old in zip(made, (given[0], given[2]), strict=True):
        assert torch.equal(own.mlp.c_fc.weight, old.mlp.c_fc.weight)


def test_channels_are_the_same_all_along(deep: ClipModel, tmp_path: Path) -> None:
    made = smaller(deep, "1x32", tmp_path)
    own, given = made.model, deep.model
    assert made.config["text_cfg"]["heads"] == 2
    table = own.token_embedding.weight[1000:1004]
    kept = [
        (given.token_embedding.weight[1000:1004] == column[:, None]).all(0).nonzero().item()
        for column in table.T
    ]
    assert sorted(kept) == kept and len(set(kept)) == 32
    assert torch.equal(own.text_projection, given.text_projection[kept])
    assert torch.equal(own.positional_embedding, given.positional_embedding[:, kept])


@pytest.mark.parametrize("custom", [False, True])
def test_a_text_costs_its_own_length(deep: ClipModel, tmp_path: Path, custom: bool) -> None:
    clip = deep
    if custom:
        (tmp_path / "custom.json").write_text(json.dumps({**deep.config, "custom_text": True}))
        clip = create(str(tmp_path / "custom.json"))
    from runtime.tokenizer import Tokenizer

    tokens = torch.from_numpy(Tokenizer(*text_side(clip))(WORDS)).long()
    lengths = []
    blocks = getattr(clip.model, "text", clip.model).transformer
    hook = blocks.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    found = encode_short(clip.model, tokens)
    hook.remove()
    whole = torch.nn.functional.normalize(clip.model.encode_text(tokens), dim=-1)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    assert lengths == [5]  # three words, start and end


def test_it_learns_is_exported_and_classifies(
    checkpoint: Path,
    half: Path,
    unlabelled: Path,
    tmp_path: Path,
) -> None:
    val, out = write_squares(tmp_path / "val", each=8, seed=5), tmp_path / "out"
    words = tmp_path / "words.txt"
    words.write_text("purple\ncyan\n\nscarlet\nblack\nwhite\ngrey\ncrimson\nnavy\nlime\nteal\n")
    record = distill(
        options(checkpoint, half, unlabelled, out, val=val, labels=LABELS, epochs=15,
                student_text="1x16", texts=words, held_out=0.2),
        quiet=True,
    )  # fmt: skip
    first, last = record["epochs"][0], record["epochs"][-1]
    assert last["text_cosine"] > first["text_cosine"] > 0
    assert last["top1"] > 0.8 and last["agreement"] > 0.8
    assert record["data"][0]["texts"]["learned"] == 6 + 8 * 2
    assert record["data"][0]["texts"]["compared"] == 2 * 2
    own = create(str(out))
    assert own.config["text_cfg"]["width"] == 16 and own.context_length == 12
    report = (out / "report" / "report.md").read_text()
    assert "its own (1x16), learned from 22 texts and compared on 4 others" in report
    assert "parameters of the text tower" in report

    export_bundle(
        ExportOptions(checkpoint=str(out), bundle=tmp_path / "bundle", labels=["nothing"])
    )
    classifier = runtime.load(tmp_path / "bundle", backend="onnxruntime", precision="fp32")
    classifier.set_labels(list(COLORS))
    named = [classifier.classify(val / color / "0.png").label for color in COLORS]
    assert named == list(COLORS)
    size = (tmp_path / "bundle" / "text.fp32.onnx").stat().st_size
    assert size < 0.6 * 4 * sum(p.numel() for p in create(str(checkpoint)).model.parameters())


def test_a_killed_run_goes_on_to_the_same_text_tower(
    checkpoint: Path,
    half: Path,
    unlabelled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    more = {
        "checkpoint_every": 3, "epochs": 2, "student_text": "1x16", "labels": LABELS, "ema": 0.9,
        "cache": tmp_path / "cache", "micro_batch": 8,
    }  # fmt: skip
    distill(options(checkpoint, half, unlabelled, tmp_path / "whole", **more), quiet=True)
    with monkeypatch.context() as patch:
        die_at(patch, 5, Killed())
        with pytest.raises(Killed):
            distill(options(checkpoint, half, unlabelled, tmp_path / "out", **more), quiet=True)
    distill(
        options(checkpoint, half, unlabelled, tmp_path / "out", **more, resume=True), quiet=True
    )
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "out"))
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_student_goes_on_with_its_own_text_tower(
    checkpoint: Path,
    half: Path,
    unlabelled: Path,
    tmp_path: Path,
) -> None:
    first = options(
        checkpoint, half, unlabelled, tmp_path / "first", epochs=1, student_text="1x16",
        labels=LABELS,
    )  # fmt: skip
    distill(first, quiet=True)
    again = options(
        checkpoint, first.out, unlabelled, tmp_path / "again", epochs=1, lr=1e-8, warmup=0.0,
        student_text=str(first.out), labels=LABELS,
    )  # fmt: skip
    distill(again, quiet=True)
    before, after = (texts_of(create(str(folder))) for folder in (first.out, again.out))
    np.testing.assert_allclose(before, after, atol=1e-4)
    with pytest.raises(DataError, match="has a text tower of its own: add --student-text"):
        distill(options(checkpoint, first.out, unlabelled, tmp_path / "no", epochs=1), quiet=True)


def test_texts_are_learned_or_compared_on(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("\ufeffcat\n  dog \n\ncat\nbird\nfish\n", encoding="utf-8")
    assert read_lines(file) == ["cat", "dog", "bird", "fish"]
    templates = ("a {}", "my {}")
    found = gather_texts(file, ["cow"], ["a cat sleeps"], templates, 0.25, 0)
    assert len(found.learn) == 2 + 3 * 3 + 1 and len(found.compare) == 3
    assert not set(found.learn) & set(found.compare)
    assert gather_texts(file, ["cow"], [], templates, 0.25, 0).compare == found.compare
    captions = gather_texts(None, None, list("abcd"), templates, 0.5, 0)
    assert sorted(captions.learn + captions.compare) == list("abcd")
    assert gather_texts(None, ["cow"], [], templates, 0.5, 0).compare == ("a cow", "my cow")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("four", "is LAYERS, LAYERSxWIDTH"),
        ("4", "has 1 to 3 layers"),
        ("0", "has 1 to 3 layers"),
        ("1x64", "at most 48"),
        ("1x20", "a multiple of 16"),
    ],
)
def test_a_size_that_cannot_be(deep: ClipModel, wanted: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        text_config(wanted, deep)


def test_what_does_not_go_together(
    checkpoint: Path,
    half: Path,
    unlabelled: Path,
    tmp_path: Path,
    deep: ClipModel,
) -> None:
    def run(**more: Any) -> None:
        distill(options(checkpoint, half, unlabelled, tmp_path / "out", **more), quiet=True)

    with pytest.raises(DataError, match="there are no texts to learn from"):
        run(student_text="1")
    with pytest.raises(DataError, match="add --student-text"):
        run(texts=tmp_path / "words.txt")
    with pytest.raises(DataError, match="--texts .* cannot be read"):
        run(student_text="1", texts=tmp_path / "words.txt")
    with pytest.raises(DataError, match="learns by --embedding and --affinity"):
        run(student_text="1", embedding=0, affinity=0)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="holds no text"):
        run(student_text="1", texts=tmp_path / "empty.txt")
    (tmp_path / "image").mkdir()
    with pytest.raises(DataError, match="is not a checkpoint folder"):
        run(student_text=str(tmp_path / "image"), labels=LABELS)
    teacher = copy.copy(deep)
    teacher.config["text_cfg"]["hf_model_name"] = "roberta"
    with pytest.raises(DataError, match="text tower of Hugging Face's"):
        text_config("1", teacher)
