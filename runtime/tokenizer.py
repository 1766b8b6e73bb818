"""Text to token ids without torch: cleaning in Python, byte-pair merges by Hugging Face tokenizers.

Gives the ids of open_clip's own tokenizers. Special tokens, truncation and padding are applied
here, not by the library, so that one code path serves CLIP's and SentencePiece vocabularies. A
special token's name inside a text ("<end_of_text>") is plain text here.
"""

import contextlib
import html
import string
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .errors import UnsupportedFormat
from .manifest import TextSpec

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean(text: str, how: str) -> str:
    """open_clip's text cleaning: `lower`, `whitespace` or `canonicalize`."""
    import ftfy  # 40 ms that a runtime with ready prompts never pays

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    if how == "canonicalize":
        text = text.replace("_", " ").translate(_NO_PUNCTUATION)
    text = " ".join(text.split())
    return text if how == "whitespace" else text.lower()


class Tokenizer:
    """Tokenizer from the content of a `tokenizer.json`.

    `tokenizer(["a cat"])` returns int32 [N, context_length]. Raises UnsupportedFormat where the
    content is not a tokenizer.
    """

    def __init__(self, content: bytes, spec: TextSpec) -> None:
        import tokenizers

        self.spec = spec
        with _guarded():
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int32]:
        ids = np.full((len(texts), self.spec.context_length), self.spec.pad_id, dtype=np.int32)
        cleaned = [clean(text, self.spec.cleaning) for text in texts]
        with _guarded():
            encodings = self._tokenizer.encode_batch(cleaned, add_special_tokens=False)
            for row, encoding in zip(ids, encodings, strict=True):
                tokens = self._framed(encoding.ids)
                row[: len(tokens)] = tokens
        return ids

    def _framed(self, tokens: list[int]) -> list[int]:
        start = [] if self.spec.start_id is None else [self.spec.start_id]
        end = [] if self.spec.end_id is None else [self.spec.end_id]
        room = max(self.spec.context_length - len(start) - len(end), 0)
        return (start + tokens[:room] + end)[: self.spec.context_length]


@contextlib.contextmanager
def _guarded() -> Iterator[None]:
    """Turns what a malformed tokenizer.json does to the library into one error. The library
    raises bare Exceptions, and panics, which are no Exceptions at all."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise UnsupportedFormat(f"this is not a valid tokenizer.json: {error}") from error
        raise
