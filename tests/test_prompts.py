"""Label sets and prompt banks: what users may give, what frames are then taken for, and labels that
change while frames flow."""

import dataclasses
import hashlib
import json
import sqlite3
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save

import runtime
from runtime import classifier as classifier_module
from runtime import manifest, row_file, text_cache
from runtime.backends import Opened
from runtime.bank_file import load_bank, save_bank
from runtime.bundle import Bundle, describe
from runtime.classifier import Classifier
from runtime.errors import DataError, UnsupportedFormat
from runtime.head import predictions
from runtime.label_sets import parse_label, parse_labels, read_labels
from runtime.manifest import Head, ImageSpec, Manifest, Model, Precision
from runtime.prediction import Prediction, scores_of
from runtime.prompts import PromptBank, build_bank, prompts_of
from runtime.row_file import RowFile
from runtime.text_cache import TextCache, machine_cache, maker_of
from runtime.tokenizer import Tokenizer
from runtime.unknown import Fitted

DIM = 16
Rows = NDArray[np.float32]
SOFTMAX = Head(logit_scale=20.0, logit_bias=0.0, activation="softmax")
SIGMOID = Head(logit_scale=20.0, logit_bias=-5.0, activation="sigmoid")
EVERYTHING = {
    "labels": {
        "bird": {},
        "pet": {
            "labels": {
                "cat": ["cat", "kitten"],
                "dog": {"synonyms": ["dog"], "prompts": ["a pug at night"], "not": ["toy", "wolf"]},
            }
        },
        "vehicle": {"labels": {"road": {"labels": ["car", "truck"]}, "ship": {"not": ["toy"]}}},
    },
    "background": ["an empty room", "wolf"],
    "templates": ["a {}", "{}!"],
}


def unit(key: str) -> Rows:
    """A unit row that is a text's own."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    row = np.random.default_rng(seed).standard_normal(DIM)
    return (row / np.linalg.norm(row)).astype(np.float32)


def embed(texts: Sequence[str]) -> Rows:
    return np.stack([unit(text) for text in texts])


def bank_of(labels: Any, **changed: Any) -> PromptBank:
    return dataclasses.replace(build_bank(labels, ("{}",), embed, "0" * 64), **changed)


# What users may give


def test_the_short_forms_are_the_long_one_with_less() -> None:
    listed = parse_labels(["cat", "dog"])
    assert listed == parse_labels({"cat": ["cat"], "dog": ["dog"]})
    assert listed == parse_labels({"labels": ["cat", "dog"]})
    assert listed == parse_labels({"labels": {"cat": {}, "dog": {"not": []}}, "background": []})
    assert listed == parse_labels({"cat": {}, "dog": {"synonyms": ["dog"]}})
    assert parse_labels(listed) is listed


def test_everything_that_a_label_set_can_say() -> None:
    found = parse_labels(EVERYTHING)
    assert found.names == ("bird", "cat", "dog", "car", "truck", "ship")
    assert found.groups == (("pet",), ("vehicle",), ("vehicle", "road"))
    assert found.labels[2].negatives == ("toy", "wolf") and found.labels[2].groups == ("pet",)
    assert found.others == ("toy", "wolf", "an empty room")  # each once
    assert parse_labels(found.as_given()) == found
    assert parse_labels(json.loads(json.dumps(found.as_given()))) == found


def test_synonyms_are_put_into_templates_and_prompts_are_not() -> None:
    labels = {"dog": {"synonyms": ["a dog"], "prompts": ["a pug"], "not": ["a toy"]}, "cat": {}}
    assert prompts_of(labels, ["{}", "a photo of {}"]) == [
        *("a dog", "a photo of a dog", "a pug"),
        *("cat", "a photo of cat"),
        *("a toy", "a photo of a toy"),
    ]
    assert prompts_of({"dog": {"prompts": ["a pug"]}}, ["a {}"]) == ["a pug"]
    assert prompts_of({"labels": ["dog"], "templates": ["no {}"]}, ["a {}"]) == ["no dog"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": ["a"], "backgrounds": ["b"]}, "no field 'backgrounds'; it has: labels, back"),
        ({"a": {"synonym": ["b"]}}, "label 'a' .* no field 'synonym'; it has: synonyms, prompts"),
        ({"a": {"labels": ["b"], "not": ["c"]}}, "the group 'a' has no field 'not'; it has: label"),
        ({"a": {"labels": []}}, "the group 'a' has no labels"),
        ({"a": {"labels": "b"}}, "labels of the group 'a' are a list of texts, or a map.*not 'b'"),
        ({"a": {"synonyms": []}}, "'synonyms' of 'a' is a list of texts"),
        ({"a": {"not": "b"}}, "'not' of 'a' is a list of texts, not 'b'"),
        ({"a": {"prompts": ["b", 1]}}, "not empty, not 1"),
        ({"a": {"labels": {"b": {}}}, "b": {}}, "labels and groups are given more than once: b"),
        ({"a": {"labels": {"a": {}}}}, "labels and groups are given more than once: a"),
        ({"labels": ["a"], "background": ["b", "b"]}, "background texts are given more than once"),
        ({"labels": ["a"], "background": ["a"]}, "'a' is background, and a synonym of the label"),
        ({"a": {}, "b": {"not": ["a"]}}, "'a' is in 'not' of the label 'b', and a synonym of the"),
        ({"labels": ["a"], "templates": ["b"]}, "the template 'b' has no {}"),
        ({"labels": ["a"], "templates": "{}"}, "non-empty list"),
        ({"labels": {}}, "at least one label"),
        (3, "labels are a list of texts, or a mapping, not 3"),
        ({1: ["a"]}, "not 1"),
    ],
)
def test_what_is_wrong_with_a_label_set(content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_labels(content)


_TEXTS = st.sampled_from(["a", "b", "c", "d", "e", "labels", "not", "", " ", "{}"])
_KEYS = _TEXTS | st.sampled_from(["synonyms", "prompts", "background", "templates"])
_JSON = st.recursive(
    st.none() | st.integers() | _TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(_JSON)
def test_any_json_is_a_label_set_or_one_clear_error(content: Any) -> None:
    try:
        found = parse_labels(content)
    except DataError:
        return
    again = parse_labels(found.as_given())
    assert set(again.labels) == set(found.labels) and again.templates == found.templates
    bank = build_bank(found, ("{}",), embed, "")
    assert len(predictions(np.zeros((1, len(bank.rows)), np.float32), bank, SOFTMAX)) == 1


def test_groups_that_are_too_deep() -> None:
    nested: dict[str, Any] = {"label": {}}
    for level in range(40):
        nested = {f"group {level}": {"labels": nested}}
    with pytest.raises(DataError, match="more than 32 groups deep"):
        parse_labels(nested)
    with pytest.raises(DataError, match="more than 32 groups deep"):
        parse_label("label", groups=[f"group {level}" for level in range(33)])


def test_labels_from_files(tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(EVERYTHING))
    assert read_labels(str(path)) == parse_labels(EVERYTHING)
    assert read_labels("a, b,").names == ("a", "b")
    for content, message in (
        ('{"a": ["b"], "a": ["c"]}', "keys of one object are given more than once: a"),
        ('{"a": [}', "not valid JSON"),
        ('{"a": "b"}', "synonyms of 'a' are a list"),
        ("[" * 100_000, "not valid JSON"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=f"labels.json.*{message}"):
            read_labels(str(path))


# Banks


def test_a_bank_holds_labels_and_what_competes_with_them() -> None:
    bank = build_bank(EVERYTHING, ("unused {}",), embed, "")
    mean = embed(["a dog", "dog!", "a pug at night"]).mean(axis=0)
    np.testing.assert_allclose(bank.embeddings[2], mean / np.linalg.norm(mean), atol=1e-6)
    assert bank.embeddings.shape == (6, DIM) and bank.rows.shape == (9, DIM)
    mean = embed(["a wolf", "wolf!"]).mean(axis=0)
    np.testing.assert_allclose(bank.rows[7], mean / np.linalg.norm(mean), atol=1e-6)
    assert bank.templates == ("a {}", "{}!")


def test_a_bank_in_a_file(tmp_path: Path) -> None:
    fitted = {"int8": Fitted(head=SOFTMAX, threshold=0.25, measure="margin")}
    bank = bank_of(EVERYTHING, fitted=fitted)
    save_bank(bank, tmp_path / "bank")
    found = load_bank(tmp_path / "bank", "0" * 64, DIM)
    assert found.label_set == bank.label_set and found.fitted == fitted
    assert found.labels == bank.labels and found.templates == bank.templates
    np.testing.assert_array_equal(found.rows, bank.rows)


def test_a_bank_of_an_older_release(tmp_path: Path) -> None:
    metadata = {"labels": '["a", "b"]', "templates": '["{}"]', "text_encoder": "0"}
    (tmp_path / "bank").write_bytes(save({"embeddings": embed(["a", "b"])}, metadata=metadata))
    found = load_bank(tmp_path / "bank", "0", DIM)
    assert found.labels == ("a", "b") and found.label_set is None and not found.fitted
    cosines = unit("b")[None] @ found.rows.T
    assert predictions(cosines, found, SOFTMAX)[0].label == "b"


@pytest.mark.parametrize(
    ("changed", "arrays"),
    [
        ({"label_set": '{"labels": ["a", "c"]}'}, {}),
        ({"label_set": '{"labels": ["a", "b"], "background": ["c"]}'}, {}),
        ({"label_set": '{"labels": ["a", "a"]}'}, {}),
        ({}, {"other_embeddings": embed(["c"])}),
        ({"label_set": "{"}, {}),
        ({"labels": '["a", "a"]'}, {}),
        ({"templates": '"{}"'}, {}),
        ({"labels": "[]"}, {}),
    ],
)
def test_a_file_that_is_no_bank(
    tmp_path: Path, changed: dict[str, str], arrays: dict[str, Rows]
) -> None:
    metadata = {"labels": '["a", "b"]', "templates": '["{}"]', "text_encoder": "0"} | changed
    content = save({"embeddings": embed(["a", "b"])} | arrays, metadata=metadata)
    (tmp_path / "bank").write_bytes(content)
    with pytest.raises(UnsupportedFormat, match="not a prompt bank"):
        load_bank(tmp_path / "bank", "0", DIM)


# What frames are taken for


def named(
    bank: PromptBank, cosines: dict[str, float], head: Head = SOFTMAX, **more: Any
) -> Prediction:
    """What a frame with these cosines (0 with all other rows) is taken for."""
    rows = [cosines.get(name, 0.0) for name in (*bank.labels, *bank.made_of.others)]
    return predictions(np.array([rows], np.float32), bank, head, **more)[0]


def test_labels_alone_are_scored_as_before() -> None:
    bank, cosines = bank_of(["a", "b", "c"]), np.array([[0.1, 0.3, 0.2]], np.float32)
    for head in (SOFTMAX, SIGMOID):
        found = predictions(cosines, bank, head)[0]
        np.testing.assert_array_equal(found.scores, scores_of(cosines, head)[0])
        assert found.label == "b" and found.path == ("b",) and found.groups == {}
        assert [label for label, _ in found.top(3)] == ["b", "c", "a"]
        assert found.margin == pytest.approx(found.scores[1] - found.scores[2])
        assert not found.unknown and found.background is None


def test_the_margin_of_a_single_label_is_its_score() -> None:
    assert named(bank_of(["a"]), {"a": 0.2}).margin == 1


@pytest.mark.parametrize("head", [SOFTMAX, SIGMOID])
def test_a_frame_of_the_background_is_unknown(head: Head) -> None:
    bank = bank_of({"labels": ["a", "b"], "background": ["nothing", "blur"]})
    found = named(bank, {"a": 0.2, "blur": 0.3}, head)
    assert found.unknown and found.background == "blur" and found.path == ()
    assert found.label == "a" and found.cosine == pytest.approx(0.2)
    assert not named(bank, {"a": 0.31, "blur": 0.3}, head).unknown
    if head == SOFTMAX:
        assert found.score == pytest.approx(np.exp(4) / (np.exp(4) + np.exp(6) + 2))


@pytest.mark.parametrize("head", [SOFTMAX, SIGMOID])
def test_a_negative_prompt_rules_its_label_out(head: Head) -> None:
    bank = bank_of({"a": {"not": ["x", "y"]}, "b": {}, "c": {"not": ["y"]}})
    found = named(bank, {"a": 0.3, "b": 0.1, "c": -0.5, "y": 0.31}, head)
    assert found.label == "b" and found.scores[0] == found.scores[2] == 0 and found.score > 0
    assert [label for label, _ in found.top(3)] == ["b", "a", "c"]
    assert not found.unknown
    found = named(bank, {"a": 0.3, "b": 0.1, "c": 0.25, "x": 0.29, "y": 0.28}, head)
    assert found.label == "a" and found.scores[2] == 0  # c is not y


def test_where_all_labels_are_ruled_out_the_frame_is_unknown() -> None:
    bank = bank_of({"a": {"not": ["x"]}, "b": {"not": ["y"]}})
    found = named(bank, {"a": 0.1, "b": 0.1, "x": 0.2, "y": 0.2})
    assert found.unknown and found.score == 0 and found.path == ()


def test_a_frame_is_named_coarse_to_fine() -> None:
    labels = {"car": {}, "animal": {"labels": {"pet": {"labels": ["cat", "dog"]}, "cow": {}}}}
    found = named(bank_of(labels), {"car": 0.25, "cat": 0.2, "dog": 0.22, "cow": 0.23})
    assert found.scores.argmax() == 0 and found.label == "dog"  # two animals outweigh a car
    assert found.path == ("animal", "pet", "dog")
    assert found.groups["animal"] == pytest.approx(found.scores[1:].sum())
    assert found.groups["pet"] == pytest.approx(found.scores[1:3].sum())
    assert found.groups["animal"] > found.scores[0] > found.score and found.margin < 0
    assert found.top(2)[0] == ("dog", found.score)


def test_the_path_ends_where_scores_fall_below_the_threshold() -> None:
    bank = bank_of({"car": {}, "animal": {"labels": ["cat", "dog"]}})
    cosines = {"cat": 0.3, "dog": 0.31}
    assert named(bank, cosines, threshold=0.5).path == ("animal", "dog")
    found = named(bank, cosines, threshold=0.9)
    assert found.path == ("animal",) and found.unknown
    assert named(bank, cosines, threshold=1.0).path == ()


def test_groups_of_sigmoids_are_as_good_as_their_best_label() -> None:
    bank = bank_of({"car": {}, "animal": {"labels": ["cat", "dog"]}})
    found = named(bank, {"car": 0.3, "cat": 0.28, "dog": 0.29}, SIGMOID)
    assert found.label == "car" and found.groups["animal"] == found.scores[2]
    sure = Head(logit_scale=1000.0, logit_bias=0.0, activation="sigmoid")
    found = named(bank, {"car": 0.5, "cat": 0.6, "dog": 0.7}, sure)
    assert found.scores.tolist() == [1, 1, 1] and found.label == "dog"


def test_a_group_whose_labels_are_ruled_out_does_not_win() -> None:
    bank = bank_of({"car": {}, "animal": {"labels": {"cat": {"not": ["x"]}, "dog": {}}}})
    for head in (SOFTMAX, SIGMOID):
        found = named(bank, {"cat": 0.4, "x": 0.5, "dog": -0.4, "car": 0.1}, head)
        assert found.label == "car"
        assert named(bank, {"cat": 0.4, "x": 0.5, "dog": -1.0, "car": -2.0}, head).label == "dog"


def test_what_was_fitted_to_another_measure_than_the_score() -> None:
    fitted = {"int8": Fitted(head=SOFTMAX, threshold=0.25, measure="contrast")}
    bank = bank_of({"g": {"labels": ["a", "b"]}, "c": {}}, fitted=fitted)
    assert named(bank, {"a": 0.3}, precision="int8").unknown
    assert named(bank, {"a": 0.3}, precision="int8").path == ()
    assert named(bank, {"a": 0.5}, precision="int8").path == ("g", "a")
    assert not named(bank, {"a": 0.3}, precision="fp32").unknown
    assert not named(bank, {"a": 0.3}, precision="int8", threshold=0.1).unknown


@pytest.mark.parametrize(
    "measure, threshold", [("energy", 0.3), ("contrast", 0.2), ("margin", 0.2)]
)
def test_what_is_ruled_out_makes_nothing_certain(measure: Any, threshold: float) -> None:
    fitted = {"int8": Fitted(head=SOFTMAX, threshold=threshold, measure=measure)}
    bank = bank_of({"car": {"not": ["toy car"]}, "truck": {}, "bus": {}}, fitted=fitted)
    toy = {"car": 0.4, "toy car": 0.45, "truck": 0.12, "bus": 0.1}
    assert named(bank, toy, precision="int8").unknown
    real = {"car": 0.5, "toy car": 0.05, "truck": 0.12, "bus": 0.1}
    assert not named(bank, real, precision="int8").unknown


def test_where_nothing_stands_the_closest_label_is_told() -> None:
    bank = bank_of({"a": {"not": ["x"]}, "b": {"not": ["x"]}})
    found = named(bank, {"a": 0.1, "b": 0.2, "x": 0.3})
    assert found.unknown and found.label == "b"


def test_a_group_that_is_ruled_out_does_not_win_by_a_tie_at_0() -> None:
    sharp = Head(logit_scale=200.0, logit_bias=0.0, activation="softmax")
    bank = bank_of({"animal": {"labels": {"cat": {"not": ["x"]}}}, "car": {}})
    assert named(bank, {"cat": 0.4, "x": 0.9, "car": 0.1}, sharp).label == "car"


# A classifier with encoders that are quick


class Counted:
    """A text encoder by which tokens have a row of their own; counts them."""

    name = "fake"

    def __init__(self) -> None:
        self.texts = 0

    def __call__(self, batch: NDArray[Any]) -> Rows:
        self.texts += len(batch)
        return np.stack([unit(row.tobytes().hex()) for row in batch])


class Image:
    """An image encoder whose rows are the frames' first bytes."""

    name = "fake"

    def __call__(self, batch: NDArray[Any]) -> Rows:
        rows = batch.reshape(len(batch), -1)[:, :DIM].astype(np.float32) + 1
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


@pytest.fixture(scope="module")
def words(bundle: Path) -> bytes:
    """CLIP's tokenizer.json."""
    return (bundle / "tokenizer.json").read_bytes()


@pytest.fixture
def folder(
    tmp_path: Path, tokenizer: Tokenizer, words: bytes, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A bundle of encoders that are not opened."""
    made = tmp_path / "bundle"
    made.mkdir()
    contents = {"image": b"i", "text": b"t", "tokenizer.json": words}
    for name, content in contents.items():
        (made / name).write_bytes(content)
    record = Manifest(
        format=manifest.FORMAT,
        model=Model(name="m", source="s", weights_sha256="0" * 64, embedding_dim=DIM),
        image=ImageSpec(height=8, width=8, mean=(0, 0, 0), std=(1, 1, 1)),
        text=tokenizer.spec,
        head=SOFTMAX,
        precisions={"fp32": Precision(image="image", status="accepted", figures={})},
        text_encoder="text",
        tokenizer="tokenizer.json",
        files={name: describe(made / name) for name in contents},
    )
    manifest.write(made, record)
    opened = Opened(encoder=Image(), backend="fake", precision="fp32")
    monkeypatch.setattr(classifier_module, "open_image", lambda *_: opened)
    monkeypatch.setattr(classifier_module, "open_text", lambda *_: Counted())
    return made


@pytest.fixture
def quick(folder: Path) -> Classifier:
    classifier = Classifier(Bundle(folder))
    classifier.set_labels(["a", "b"])
    return classifier


def counted(classifier: Classifier) -> Counted:
    encoder = classifier._text_encoder()[1]
    assert isinstance(encoder, Counted)
    return encoder


def frame(seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)


def test_a_label_is_added_and_only_its_own_prompts_are_embedded(quick: Classifier) -> None:
    before, encoder = quick.require_bank(), counted(quick)
    made = encoder.texts
    quick.add_label("c", {"synonyms": ["c", "see"], "not": ["a toy"]}, groups=["letters"])
    after = quick.require_bank()
    assert encoder.texts == made + 3
    assert after.labels == ("a", "b", "c") and before.labels == ("a", "b")
    np.testing.assert_array_equal(after.embeddings[:2], before.embeddings)
    whole: Any = {
        "labels": {"a": {}, "b": {}, "letters": {"labels": {"c": {"synonyms": ["c", "see"]}}}}
    }
    whole["labels"]["letters"]["labels"]["c"]["not"] = ["a toy"]
    quick.set_labels(whole)
    np.testing.assert_allclose(quick.require_bank().rows, after.rows, atol=1e-6)
    assert quick.require_bank().label_set == after.label_set
    assert quick.classify(frame()).labels == ("a", "b", "c")


def test_a_label_is_removed_with_what_only_it_is_not(quick: Classifier) -> None:
    quick.set_labels({"a": {"not": ["x", "y"]}, "b": {"not": ["y"]}, "c": {}})
    kept = quick.require_bank().rows[[1, 2, 4]]
    quick.remove_label("a")
    assert quick.labels == ("b", "c")
    np.testing.assert_array_equal(quick.require_bank().rows, kept)
    quick.remove_label("b")
    assert quick.require_bank().other_embeddings is None


def test_labels_that_were_added_survive_a_file(quick: Classifier, tmp_path: Path) -> None:
    quick.set_labels({"g": {"labels": ["a", "b"]}, "c": {}})
    quick.add_label("d", groups=["g"])  # after c, though its group stands before
    bank = quick.require_bank()
    save_bank(bank, tmp_path / "bank")
    found = load_bank(tmp_path / "bank", bank.text_encoder, DIM)
    assert found.labels == ("a", "b", "c", "d") and found.label_set == bank.label_set
    assert found.layout.tree and found.layout.tree.members.tolist() == [0, 1, 3]


def test_what_was_fitted_goes_with_a_change_of_labels(quick: Classifier) -> None:
    fitted = {"fp32": Fitted(head=SOFTMAX, threshold=0.99)}
    quick.bank = dataclasses.replace(quick.require_bank(), fitted=fitted)
    assert quick.classify(frame()).unknown
    quick.add_label("c")
    assert not quick.classify(frame()).unknown and not quick.require_bank().fitted


def test_what_cannot_be_added_or_removed(quick: Classifier) -> None:
    bank = quick.bank
    attempts: list[tuple[Callable[[], None], str]] = [
        (lambda: quick.add_label("a"), "'a' already: remove it first"),
        (lambda: quick.add_label(" "), "not empty"),
        (lambda: quick.add_label("c", "d"), "synonyms of 'c' are a list"),
        (lambda: quick.add_label("c", {"labels": ["d"]}), "'c' is a group"),
        (lambda: quick.add_label("c", groups="g"), "groups of 'c' are a list"),
        (lambda: quick.add_label("c", groups=["a"]), "more than once: a"),
        (lambda: quick.add_label("c", {"not": ["b"]}), "a synonym of the label 'b'"),
        (lambda: quick.remove_label("c"), "no label 'c'; there are: a, b"),
    ]
    for change, message in attempts:
        with pytest.raises(DataError, match=message):
            change()
        assert quick.bank is bank
    quick.remove_label("a")
    with pytest.raises(DataError, match="at least one label"):
        quick.remove_label("b")


def test_templates_are_given_once(quick: Classifier) -> None:
    with pytest.raises(DataError, match="templates of its own"):
        quick.set_labels({"labels": ["a"], "templates": ["{}"]}, templates=["a {}"])


def run_all(jobs: Sequence[Callable[[], None]]) -> None:
    """Runs them at once; raises what one of them raised."""
    errors: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_every_prediction_is_of_a_bank_that_was_whole(quick: Classifier) -> None:
    """Eight threads classify while others set, add and remove labels."""
    done, seen = threading.Event(), set[tuple[str, ...]]()
    shared = frame()
    embedding = quick.embed(shared)

    def classify() -> None:
        while not done.is_set():
            found = quick.classify(shared)
            if found.tree:
                assert found.groups["g"] == pytest.approx(found.scores[:2].sum(), rel=1e-5)
            rows = np.stack([known[f"a {label}"] for label in found.labels])
            np.testing.assert_allclose(found.cosines, rows @ embedding, atol=1e-6)
            seen.add(found.labels)

    texts = [f"a {name}" for name in ("a", "b", "c", *(f"n{i}" for i in range(8)))]
    known = dict(zip(texts, quick.embed_text(texts), strict=True))

    def change() -> None:
        try:
            for turn in range(1000):
                if turn >= 8 and len(seen) > 3:  # a busy machine takes its time
                    break
                quick.set_labels({"g": {"labels": ["a", "b"]}, "c": {}})
                for i in range(8):
                    quick.add_label(f"n{i}")
                for i in range(8):
                    quick.remove_label(f"n{i}")
                quick.set_labels(["c", "a"])
        finally:
            done.set()

    run_all([change, *[classify] * 8])
    assert len(seen) > 3


def test_no_change_of_labels_is_lost(quick: Classifier) -> None:
    def add(writer: int) -> None:
        for n in range(10):
            quick.add_label(f"{writer} {n}")

    run_all([lambda writer=writer: add(writer) for writer in range(6)])  # type: ignore[misc]
    assert set(quick.labels) == {"a", "b"} | {f"{w} {n}" for w in range(6) for n in range(10)}
    run_all([lambda w=w: quick.remove_label(f"{w} 3") for w in range(6)])  # type: ignore[misc]
    assert len(quick.labels) == 56
    found = quick.classify(frame())
    assert len(found.scores) == len(found.labels) == 56


# Texts that were embedded before


def loaded(folder: Path) -> Classifier:
    """A classifier as of a process that has just begun."""
    text_cache._at.cache_clear()
    return runtime.load(folder)


def test_known_texts_do_not_open_the_text_encoder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = loaded(folder)
    first.set_labels(EVERYTHING)
    bank = first.require_bank()

    def refuse(*_: Any) -> Any:
        raise AssertionError("the text encoder was opened")

    with monkeypatch.context() as patch:
        patch.setattr(classifier_module, "open_text", refuse)
        patch.setattr(classifier_module, "Tokenizer", refuse)
        second = loaded(folder)
        second.set_labels(EVERYTHING)
        np.testing.assert_array_equal(second.require_bank().rows, bank.rows)
        assert second.embed_text([]).shape == (0, DIM) and second.notes == ()
        with pytest.raises(AssertionError, match="was opened"):
            second.embed_text(["a new text"])
    assert len(second.embed_text(["a cat", "a new text", "a new text"])) == 3
    assert counted(second).texts == 1


def test_a_process_remembers_where_nothing_can_be_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGECLIP_CACHE", str(tmp_path / "file" / "cache"))
    classifier = loaded(folder)
    classifier.set_labels(["a", "b"])
    made = counted(classifier).texts
    classifier.set_labels(["b", "a"])
    assert counted(classifier).texts == made
    (note,) = classifier.notes
    assert "not kept for the next start" in note and "EDGECLIP_CACHE" in note


@pytest.mark.parametrize("content", [b"this is no database", b"SQLite format 3\0" + b"x" * 5000])
def test_a_damaged_file_is_named_and_not_used(folder: Path, content: bytes) -> None:
    path = machine_cache().path
    assert path is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    classifier = loaded(folder)
    for labels in (["a"], ["b"], ["a", "c"]):
        classifier.set_labels(labels)
    (note,) = classifier.notes
    assert str(path) in note and "delete it" in note
    assert path.read_bytes() == content
    np.testing.assert_allclose(np.linalg.norm(classifier.require_bank().rows, axis=1), 1, atol=1e-5)


def test_python_without_sqlite_and_a_machine_without_a_home(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "runtime.row_file")
    monkeypatch.setitem(sys.modules, "sqlite3", None)
    classifier = loaded(folder)
    classifier.set_labels(["a"])
    assert "sqlite3" in classifier.notes[0]

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(text_cache, "cache_folder", homeless)
    classifier = loaded(folder)
    classifier.set_labels(["a"])
    assert "no home folder" in classifier.notes[0] and classifier.labels == ("a",)


def test_a_file_that_can_only_be_read_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(folder).set_labels(["a", "b"])

    def refuse(*_: Any) -> None:
        raise sqlite3.OperationalError("attempt to write a readonly database")

    monkeypatch.setattr(RowFile, "write", refuse)
    classifier = loaded(folder)
    classifier.set_labels(["c"])
    text_cache.machine_cache()._memory.clear()
    classifier.set_labels(["a", "b"])
    assert counted(classifier).texts == 1 and "readonly" in classifier.notes[0]


@pytest.mark.parametrize(
    "damaged",
    [b"", b"\0" * 4 * DIM, np.full(DIM, np.nan, np.float32).tobytes(), unit("a").tobytes()[:-4]],
    ids=["empty", "zero", "nan", "short"],
)
def test_what_is_no_unit_row_is_embedded_anew(folder: Path, damaged: bytes) -> None:
    first = loaded(folder)
    first.set_labels(["a", "b"])
    with sqlite3.connect(str(machine_cache().path)) as file:
        file.execute("UPDATE rows SET row = ?", (damaged,))
    file.close()
    second = loaded(folder)
    second.set_labels(["a", "b"])
    np.testing.assert_array_equal(second.require_bank().rows, first.require_bank().rows)
    assert counted(second).texts == 2
    third = loaded(folder)
    third.set_labels(["a", "b"])
    assert third._text is None  # it was mended


@pytest.mark.parametrize(
    ("used", "row"),
    [(None, b""), ("today", b""), (1, None), (1, 5), (1, "a" * 4 * DIM)],
    ids=["no time", "time as text", "no row", "a number", "text"],
)
def test_what_is_of_another_type_is_embedded_anew(folder: Path, used: Any, row: Any) -> None:
    first = loaded(folder)
    first.set_labels(["a", "b"])
    content = unit("a").tobytes() if row == b"" else row
    with sqlite3.connect(str(machine_cache().path)) as file:
        file.execute("UPDATE rows SET used = ?, row = ?", (used, content))
    file.close()
    second = loaded(folder)
    second.set_labels(["a", "b"])
    np.testing.assert_array_equal(second.require_bank().rows, first.require_bank().rows)
    assert counted(second).texts == 2 and second.notes == ()


def test_a_file_that_another_process_holds_is_not_to_be_deleted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(folder).set_labels(["a", "b"])
    monkeypatch.setattr(row_file, "WAIT", 0.01)
    file = sqlite3.connect(str(machine_cache().path))
    try:
        file.execute("BEGIN EXCLUSIVE")
        classifier = loaded(folder)
        classifier.set_labels(["a", "b"])
    finally:
        file.close()
    (note,) = classifier.notes
    assert "locked" in note and "another process holds it" in note and "delete" not in note


def test_what_is_no_text_is_not_embedded(folder: Path) -> None:
    texts: Any = ["a", 5]
    with pytest.raises(DataError, match="texts are embedded, not 5"):
        loaded(folder).embed_text(texts)


def test_a_row_is_of_one_encoder_and_tokenizer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Bundle(folder).manifest
    others = [
        made,
        msgspec.structs.replace(made, text=msgspec.structs.replace(made.text, pad_id=7)),
        *(
            msgspec.structs.replace(made, files=made.files | {name: made.files["image"]})
            for name in ("text", "tokenizer.json")
        ),
    ]
    assert len({maker_of(other, "text", "onnxruntime") for other in others}) == 4
    assert maker_of(made, "text", "tensorrt") != maker_of(made, "text", "onnxruntime")
    templates = msgspec.structs.replace(made.text, templates=("an {}",))
    same = msgspec.structs.replace(made, text=templates)
    before = maker_of(made, "text", "tensorrt")
    assert maker_of(same, "text", "tensorrt") == before
    monkeypatch.setattr(text_cache, "TOKENIZER", text_cache.TOKENIZER + 1)
    assert maker_of(made, "text", "tensorrt") != before


def test_what_was_not_used_for_longest_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_file, "MOST", 400_000)
    file = RowFile(tmp_path / "rows")
    keys = [n.to_bytes(4, "big") for n in range(1000)]
    for n in range(0, 1000, 50):
        file.write({key: bytes(2048) for key in keys[n : n + 50]}, n)
        file.touch(keys[:1], n)
    assert (tmp_path / "rows").stat().st_size < 600_000
    kept = file.read(keys)
    assert keys[0] in kept and keys[1] not in kept and set(keys[-50:]) <= set(kept)
    assert 100 < len(kept) < 200


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_cache, "IN_MEMORY", 10 * 4 * DIM)
    cache, asked = TextCache(None), list[str]()

    def anew(texts: Sequence[str]) -> Rows:
        asked.extend(texts)
        return embed(texts)

    for n in range(100):
        cache.embed(["kept", f"text {n}"], b"", DIM, anew)
    assert asked.count("kept") == 1 and len(cache._memory) == 10


def test_a_use_is_written_down_once_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000_000.0
    monkeypatch.setattr("time.time", lambda: now)
    touched: list[int] = []
    touch = RowFile.touch

    def noted(self: RowFile, keys: Sequence[bytes], at: int) -> None:
        touched.append(at)
        touch(self, keys, at)

    monkeypatch.setattr(RowFile, "touch", noted)
    for hours in (0, 1, 30, 31):
        now = 1_000_000.0 + hours * 3600
        TextCache(tmp_path / "rows").embed(["a"], b"", DIM, embed)
    assert touched == [1_000_000 + 30 * 3600]


def test_embeddings_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    cache = TextCache(tmp_path / "rows")
    broken = cache.embed(["a", "b"], b"", DIM, lambda t: np.full((len(t), DIM), np.nan, np.float32))
    assert np.isnan(broken).all()
    np.testing.assert_array_equal(cache.embed(["a", "b"], b"", DIM, embed), embed(["a", "b"]))


def test_several_threads_and_files_of_one_machine(tmp_path: Path) -> None:
    """As of several processes: each has a cache of its own on the one file."""
    texts = [f"text {n}" for n in range(200)]

    def use(n: int) -> None:
        cache = TextCache(tmp_path / "rows")
        for start in range(0, 200, 20):
            mine = texts[(start + 37 * n) % 180 :][:20]
            np.testing.assert_array_equal(cache.embed(mine, b"", DIM, embed), embed(mine))
        assert cache.problem is None

    run_all([lambda n=n: use(n) for n in range(6)])  # type: ignore[misc]
    held = TextCache(tmp_path / "rows")
    held.embed(texts[:20], b"", DIM, lambda _: pytest.fail("it was kept"))
