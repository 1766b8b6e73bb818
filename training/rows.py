"""One training pair at a time: its picture, one of its captions, and all that are true of it."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from calibration.pairs import Bad, Pairs
from runtime.errors import DataError, FrameError
from runtime.frames import Frame
from runtime.tokenizer import Tokenizer

from .augment import drop_tokens
from .pictures import PictureReader
from .samples import Sample

Array = NDArray[np.generic]
NO_LABEL = -1
T = TypeVar("T")
IN_A_ROW = 50_000  # so many useless samples, one after the other, end a run


class Row(NamedTuple):
    """A picture with K of its captions. `image`: the model's input, uint8 [H, W, 3], or a cached
    feature; `text`: token ids [K, L], or cached embeddings [K, D]; `drawn`: the ids of these K
    captions; `own`: those of all captions that are true of the picture; `target`: its class, or
    -1."""

    image: Array
    text: Array
    drawn: Sequence[int]
    own: Sequence[int]
    target: int
    name: str


class Rows(Protocol):
    """Where rows come from. `bad` collects what could not be used."""

    bad: list[Bad]

    def take(self, index: int, seed: Sequence[int]) -> Row:
        """Row `index` (of a stream: the next), drawn and changed at random as `seed` has it,
        whatever had to be passed over."""
        ...


def caption_id(text: str) -> int:
    """A number, from 0 up, that stands for a caption: equal texts are the same caption."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class Maker:
    """Turns pictures and captions into what the model takes, changed at random."""

    def __init__(
        self,
        reader: PictureReader,
        tokenizer: Tokenizer,
        captions: int = 1,
        token_drop: float = 0.0,
    ) -> None:
        self.reader, self.tokenizer = reader, tokenizer
        self.captions, self.token_drop = captions, token_drop

    def draw(self, own: Sequence[T], rng: np.random.Generator) -> list[T]:
        """As many of a picture's captions as a step takes, none again before all had their turn."""
        turns = -(-self.captions // len(own))
        order = np.concatenate([rng.permutation(len(own)) for _ in range(turns)])
        return [own[i] for i in order[: self.captions]]

    def image(
        self, read: Callable[[], Frame], captions: Sequence[str], rng: np.random.Generator
    ) -> Frame:
        """The picture that `read` gives, changed. Raises FrameError."""
        seed = int(rng.integers(2**62))
        return self.reader.augmentation.apply(read(), seed, " ".join(captions))

    def text(self, tokens: NDArray[np.int32], rng: np.random.Generator) -> NDArray[np.int32]:
        """The tokens [K, L] of captions, some left out."""
        if not self.token_drop:
            return tokens
        spec = self.tokenizer.spec
        return np.stack([drop_tokens(row, self.token_drop, spec, rng) for row in tokens])


class TableRows:
    """Rows of a table or folder. Where a tower is locked, `features` [N, views, ...] stand for
    the pictures, `embeddings` [T, D] for the texts."""

    def __init__(
        self,
        pairs: Pairs,
        maker: Maker,
        features: NDArray[np.floating] | None = None,
        embeddings: NDArray[np.float32] | None = None,
    ) -> None:
        self.pairs, self.maker = pairs, maker
        self._features, self._embeddings = features, embeddings
        self._tokens = maker.tokenizer(pairs.texts) if embeddings is None else None
        self._ids = [caption_id(text) for text in pairs.texts]
        self._unreadable: dict[int, str] = {}
        self.bad: list[Bad] = []
        self.most = max(map(len, pairs.captions))
        """The most captions that a picture has."""

    def take(self, index: int, seed: Sequence[int]) -> Row:
        """Row `index`; where its picture cannot be read, the next that can."""
        count = len(self.pairs)
        for row in ((index + step) % count for step in range(count)):
            if row not in self._unreadable:
                try:
                    return self._row(row, np.random.default_rng(seed))
                except (FrameError, OSError) as error:
                    self._unreadable[row] = str(error)
                    self.bad.append(Bad(str(self.pairs.files[row]), "unreadable picture"))
        reason = self._unreadable[index]
        raise DataError(f"none of the {count} pictures could be read: {reason}")

    def _row(self, row: int, rng: np.random.Generator) -> Row:
        pairs = self.pairs
        own, path = pairs.captions[row], pairs.files[row]
        drawn = self.maker.draw(own, rng)
        image: Array
        if self._features is not None:
            image = self._features[row, rng.integers(self._features.shape[1])]
        else:
            read = self.maker.reader.file
            image = self.maker.image(lambda: read(path), [pairs.texts[c] for c in drawn], rng)
        text: Array
        if self._tokens is None:
            assert self._embeddings is not None
            text = self._embeddings[drawn]
        else:
            text = self.maker.text(self._tokens[drawn], rng)
        target = NO_LABEL if pairs.targets is None else pairs.targets[row]
        ids = [self._ids[c] for c in own]
        return Row(image, text, [self._ids[c] for c in drawn], ids, target, str(path))


class StreamRows:
    """Rows of a stream of samples."""

    def __init__(self, stream: Iterator[Sample | Bad], maker: Maker) -> None:
        self._stream, self._maker = stream, maker
        self.bad: list[Bad] = []

    def take(self, index: int, seed: Sequence[int]) -> Row:
        """The next row whose picture can be read; `index` has no meaning here."""
        for item in itertools.islice(self._stream, IN_A_ROW):
            if isinstance(item, Bad):
                self.bad.append(item)
                continue
            try:
                return self._row(item, np.random.default_rng(seed))
            except FrameError:
                self.bad.append(Bad(item.name, "unreadable picture"))
        last = self.bad[-1]
        raise DataError(
            f"{IN_A_ROW} samples in a row cannot be used; the last is {last.item}: {last.reason}"
        )

    def pass_over(self, count: int) -> None:
        """Leaves out what was trained on before."""
        for _ in range(count):
            next(item for item in self._stream if isinstance(item, Sample))

    def _row(self, sample: Sample, rng: np.random.Generator) -> Row:
        drawn = self._maker.draw(sample.texts, rng)
        member = self._maker.reader.member
        image = self._maker.image(lambda: member(sample.picture), drawn, rng)
        text = self._maker.text(self._maker.tokenizer(drawn), rng)
        ids = [caption_id(text) for text in sample.texts]
        return Row(image, text, [caption_id(text) for text in drawn], ids, NO_LABEL, sample.name)
