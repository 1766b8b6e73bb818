"""The tokenizer gives open_clip's own ids."""

import contextlib
import json
import random

import numpy as np
import pytest

from runtime.errors import UnsupportedFormat
from runtime.manifest import TextSpec
from runtime.tokenizer import Tokenizer, clean
from training import torchvision_ops as torchvision_ops
from training.text import clip_tokenizer

# isort: split
from open_clip.tokenizer import SimpleTokenizer, get_clean_fn

WORDS = (
    "a photo of the cat dog's DON'T they'll I'm we've he'd naïve café Straße 2024 3.14 x2 "
    "under_score hy-phen e-mail@site.org #tag $5 100% ½ the,comma (paren) \"quote\" 'single' "
    "&amp; &lt;b&gt; &amp;amp; &eacute; fi \u2019s \u201cq\u201d \u2026 ſ 東京 日本語 한국어 "
    "привет ελληνικά עברית العربية हिन्दी ไทย 🙂 👩‍👩‍👧 🇩🇪 ❤️ \u200b \xa0 \t \n"
).split(" ")
RANGES = [(0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x4E00, 0x9FFF),
          (0x1F300, 0x1F64F), (0x2000, 0x206F), (0xAC00, 0xD7A3)]  # fmt: skip


def varied_strings(count: int) -> list[str]:
    """Plain, mixed, wild and overlong texts in turn."""
    rng = random.Random(0)
    texts = ["", " ", "a", "A " * 100]
    while len(texts) < count:
        kind = len(texts) % 4
        if kind == 3:
            low, high = rng.choice(RANGES)
            texts.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 30))))
        else:
            length = rng.randint(60, 120) if kind == 2 else rng.randint(1, 14)
            texts.append(" ".join(rng.choice(WORDS) for _ in range(length)))
    return texts


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    spec = TextSpec(
        context_length=77, start_id=49406, end_id=49407, pad_id=0, cleaning="lower",
        templates=("{}",),
    )  # fmt: skip
    return Tokenizer(clip_tokenizer(), spec)


def test_ids_equal_open_clips(tokenizer: Tokenizer) -> None:
    texts = varied_strings(2000)
    expected = SimpleTokenizer()(texts).numpy()
    found = tokenizer(texts)
    assert found.dtype == np.int32 and found.shape == (2000, 77)
    wrong = [text for text, a, b in zip(texts, expected, found, strict=True) if (a != b).any()]
    assert not wrong


@pytest.mark.parametrize("how", ["lower", "whitespace", "canonicalize"])
def test_cleaning_equals_open_clips(how: str) -> None:
    reference = get_clean_fn(how)
    assert all(clean(text, how) == reference(text) for text in varied_strings(500))


def test_length_and_frame(tokenizer: Tokenizer) -> None:
    short, long = tokenizer(["cat", "cat " * 200])
    assert short[0] == 49406 and short[2] == 49407 and not short[3:].any()
    assert long[0] == 49406 and long[-1] == 49407 and (long[1:-1] == long[1]).all()
    assert tokenizer([]).shape == (0, 77)


@pytest.mark.parametrize("content", [b"", b"{}", b"no json", b"\xff\xfe"])
def test_not_a_tokenizer(content: bytes, tokenizer: Tokenizer) -> None:
    with pytest.raises(UnsupportedFormat, match=r"tokenizer\.json"):
        Tokenizer(content, tokenizer.spec)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}},
        {"model": {"type": "WordLevel", "vocab": {"a": 4_294_967_000}, "unk_token": "a"}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b" * 9}},
    ],
)
def test_a_hostile_tokenizer_is_one_error(change: dict[str, object], tokenizer: Tokenizer) -> None:
    base: dict[str, object] = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
    }
    content = json.dumps(base | change).encode()
    with contextlib.suppress(UnsupportedFormat):
        assert Tokenizer(content, tokenizer.spec)(["a", "b" + "a" * 40 + "!"]).shape == (2, 77)
