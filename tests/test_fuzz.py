"""Whatever comes in, a result or one of our errors comes out: frames, manifests, banks, tokenizers.

Derandomised: the same examples every time.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import runtime
from runtime import manifest
from runtime.bank_file import load_bank
from runtime.bundle import Bundle, describe
from runtime.classifier import Classifier
from runtime.errors import BundleError, DataError, EdgeClipError, FrameError
from runtime.frames import Color
from runtime.manifest import TextSpec
from runtime.tokenizer import Tokenizer

FRAMES, FILES = 2000, 500
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
DTYPES = ["u1", "u1", "u1", "u1", "i1", "u2", "i8", "f2", "f4", "f8", "c8", "?", "S3", "O", "M8[s]"]
COLORS: list[Color] = ["bgr", "rgb", "bgra", "gray", "nv12"]


def fuzz(number: int) -> settings:
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=QUIET,
    )


@pytest.fixture(scope="module")
def classifier(bundle: Path) -> Classifier:
    return runtime.load(bundle, backend="onnxruntime", precision="fp32")


# Frames

sides = st.integers(0, 70) | st.sampled_from([1, 2, 3, 96, 300])
lasts = st.sampled_from([1, 2, 3, 4, 5])
regions = st.none() | st.tuples(*[st.integers(-3, 80)] * 4)
any_shape = (
    st.tuples(sides, sides, lasts)
    | st.tuples(sides, sides)
    | st.lists(st.integers(0, 9), max_size=5)
)


@st.composite
def frames(draw: st.DrawFn) -> tuple[NDArray[Any], Color]:
    """Noise of any shape and type, half of it as its colour order asks; views with any strides."""
    color = draw(st.sampled_from(COLORS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        height, width = draw(st.tuples(sides, sides))
        shape = {"bgra": (height, width, 4), "gray": (height, width)}
        shape["nv12"] = (height // 2 * 3, width // 2 * 2)
        made = rng.integers(0, 256, shape.get(color, (height, width, 3))).astype("u1")
        return _viewed(draw, made), color
    kind = np.dtype(draw(st.sampled_from(DTYPES)))
    made = rng.integers(0, 256, draw(any_shape)).astype("u1").astype(kind)
    if kind.kind in "fc" and made.size and draw(st.booleans()):
        made.flat[0] = draw(st.sampled_from([np.nan, np.inf, -1.0]))
    return _viewed(draw, made), color


def _viewed(draw: st.DrawFn, made: NDArray[Any]) -> NDArray[Any]:
    steps = tuple(slice(None, None, draw(st.sampled_from([1, 1, -1, 2]))) for _ in made.shape)
    view = np.asarray(made[steps])
    how = draw(st.sampled_from(["as it is", "fortran", "turned", "repeated", "read-only"]))
    if how == "fortran":
        view = np.asfortranarray(view)
    elif how == "turned" and view.ndim > 1:
        view = view.swapaxes(0, 1)
    elif how == "repeated" and view.ndim > 1:
        view = np.broadcast_to(view[:1], view.shape) if view.shape[0] else view
    elif how == "read-only":
        view.flags.writeable = False
    return view


@fuzz(FRAMES)
@given(drawn=frames(), roi=regions)
def test_any_array(classifier: Classifier, drawn: tuple[Any, Color], roi: Any) -> None:
    frame, color = drawn
    try:
        found = classifier.classify(frame, color, roi=roi)
    except FrameError as error:
        assert str(error)
        return
    assert np.isfinite(found.scores).all() and found.label in classifier.labels
    plain = classifier.classify(np.array(frame, order="C"), color, roi=roi)
    np.testing.assert_array_equal(found.cosines, plain.cosines)  # whatever the strides are
    event("classified")


anything = st.none() | st.integers() | st.text() | st.binary() | st.lists(st.integers())


@fuzz(100)
@given(frame=anything, color=anything)
def test_what_is_no_array_at_all(classifier: Classifier, frame: Any, color: Any) -> None:
    with pytest.raises(FrameError):
        classifier.classify(frame, color)


# Files

junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../../etc/passwd", "/dev/zero", "\0", "1.0", "{}", "softmax"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


@st.composite
def damaged_json(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of which some are changed, cut off or doubled; or JSON with a value that is not its."""
    if draw(st.booleans()):
        return _damaged_bytes(draw, content)
    tree = json.loads(content)
    for _ in range(draw(st.integers(1, 3))):
        _change(draw, tree)
    return json.dumps(tree).encode()


def _damaged_bytes(draw: Any, content: bytes) -> bytes:
    at: int = draw(st.integers(0, len(content)))
    new: bytes = draw(st.binary(max_size=4))
    gone: int = draw(st.integers(0, 40))
    if draw(st.integers(0, 3)) == 0:
        return content[:at] + new
    return content[:at] + new + content[at + gone :]


def _change(draw: st.DrawFn, tree: Any) -> None:
    """Changes a value somewhere in the tree, takes it out, or adds one."""
    at = tree
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(min(len(at), 40)))
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        deeper = isinstance(at[key], dict | list) and at[key]
        if not deeper or draw(st.integers(0, 2)) == 0:
            break
        at = at[key]
    if draw(st.integers(0, 3)) == 0:
        del at[key]
    elif isinstance(at, dict) and draw(st.integers(0, 3)) == 0:
        at[draw(st.text(max_size=5))] = draw(junk)
    else:
        at[key] = draw(junk)


@fuzz(FILES)
@given(data=st.data())
def test_any_manifest(bundle: Path, bundle_copy: Path, data: st.DataObject) -> None:
    content = (bundle / manifest.NAME).read_bytes()
    (bundle_copy / manifest.NAME).write_bytes(data.draw(damaged_json(content)))
    try:
        opened = Bundle(bundle_copy)
        for name in opened.manifest.files:
            opened.file(name)
    except BundleError as error:
        assert str(error)


@fuzz(60)
@given(data=st.data())
def test_any_manifest_as_a_whole(bundle: Path, bundle_copy: Path, data: st.DataObject) -> None:
    content = (bundle / manifest.NAME).read_bytes()
    (bundle_copy / manifest.NAME).write_bytes(data.draw(damaged_json(content)))
    frame = np.zeros((40, 50, 3), np.uint8)
    try:
        found = runtime.load(bundle_copy, backend="onnxruntime").classify(frame)
    except EdgeClipError as error:
        assert str(error)
    else:
        assert len(found.scores) == len(found.labels) and found.scores.min() >= 0


def _bank(bundle: Path) -> tuple[Path, str, int]:
    opened = Bundle(bundle)
    made = opened.manifest
    encoder = made.files[made.text_encoder].sha256
    return opened.file(made.prompts["default"]), encoder, made.model.embedding_dim


@fuzz(FILES)
@given(data=st.data())
def test_any_bank(bundle: Path, tmp_path: Path, data: st.DataObject) -> None:
    path, encoder, dim = _bank(bundle)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = data.draw(damaged_json(content[8 : 8 + size]))
    changed = len(header).to_bytes(8, "little") + header + content[8 + size :]
    if data.draw(st.booleans()):
        changed = _damaged_bytes(data.draw, content)
    (tmp_path / "bank").write_bytes(changed)
    try:
        bank = load_bank(tmp_path / "bank", encoder, dim)
    except BundleError as error:
        assert str(error)
    else:
        assert bank.embeddings.shape == (len(bank.labels), dim)


@pytest.fixture(scope="module")
def small_tokenizer() -> tuple[bytes, TextSpec]:
    """Byte pairs of a few letters, as small as it gets: a change is likely to matter."""
    vocabulary = {letter: n for n, letter in enumerate("abcdefgh")}
    vocabulary |= {"a</w>": 8, "ab": 9, "abc</w>": 10, "<s>": 11, "</s>": 12}
    made: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Removed",
                 "invert": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                 "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>", "fuse_unk": False, "byte_fallback": False,
            "vocab": vocabulary, "merges": [["a", "b"], ["ab", "c</w>"]],
        },
    }  # fmt: skip
    spec = TextSpec(
        context_length=6,
        start_id=11,
        end_id=12,
        pad_id=0,
        cleaning="lower",
        templates=("a {}",),
    )
    return json.dumps(made).encode(), spec


@fuzz(FILES)
@given(data=st.data())
def test_any_tokenizer(small_tokenizer: tuple[bytes, TextSpec], data: st.DataObject) -> None:
    content, spec = small_tokenizer
    try:
        ids = Tokenizer(data.draw(damaged_json(content)), spec)(["abc ab", "", "zz"])
    except BundleError as error:
        assert str(error)
    else:
        assert ids.shape == (3, 6) and ids.dtype == np.int32


@fuzz(300)
@given(labels=junk)
def test_any_labels(classifier: Classifier, labels: Any) -> None:
    before = classifier.bank
    try:
        classifier.set_labels(labels)
    except DataError as error:
        assert str(error) and classifier.bank is before


# A bundle of a stranger: files that fit their hashes, and yet are not what they should be


@fuzz(40)
@given(data=st.data())
def test_a_bundle_whose_tokenizer_was_changed(
    bundle: Path, bundle_copy: Path, data: st.DataObject
) -> None:
    raw = json.loads((bundle / manifest.NAME).read_text())
    name = raw["tokenizer"]
    content = (bundle / name).read_bytes()
    (bundle_copy / name).write_bytes(_damaged_bytes(data.draw, content))
    entry = describe(bundle_copy / name)
    raw["files"][name] = {"bytes": entry.bytes, "sha256": entry.sha256}
    (bundle_copy / manifest.NAME).write_text(json.dumps(raw))
    try:
        rows = Classifier(Bundle(bundle_copy), backend="onnxruntime", precision="fp32").embed_text(
            ["a red square"]
        )
    except EdgeClipError as error:
        assert str(error)
    else:
        assert math.isclose(float(np.linalg.norm(rows[0])), 1, abs_tol=1e-3)
