"""One row of a distillation: a view of a picture, and what the teacher says of it.

The teacher's embedding stands where a training has its captions: as the first text of the picture,
the captions' embeddings behind it. So a batch, a step and several devices do as in training.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .augment import names_a_side
from .rows import NO_LABEL, Maker, Row, TableRows
from .teacher import Reader, Seen
from .views import FIELDS, apply_view

NO_TEXT = -1
_MIRRORED = FIELDS.index("mirrored")


class DistillRows(TableRows):
    """Rows of pictures, any of the views of each that their teacher has seen.

    `embeddings` [T, D] are the teacher's of the captions. Each row has as many captions as the
    maker draws, where any picture has some: zeros, with the id -1, stand for those that lack.
    """

    def __init__(
        self,
        seen: Seen,
        maker: Maker,
        reader: Reader,
        embeddings: NDArray[np.float32],
    ) -> None:
        super().__init__(seen.pairs, maker, embeddings=embeddings)
        self.reader, self.seen = reader, seen
        self._each = maker.captions if seen.pairs.texts else 0
        self.most += 1

    def _row(self, row: int, rng: np.random.Generator) -> Row:
        pairs = self.pairs
        places = self.seen.places[row]
        said, drawn = self.seen.store.row(int(places[rng.integers(len(places))]))
        pictures = self.reader.pictures
        image = apply_view(pictures.file(pairs.files[row]), drawn, self.reader.spec)
        own = pairs.captions[row]
        if drawn[_MIRRORED]:
            own = tuple(c for c in own if not names_a_side(pairs.texts[c]))
        chosen = self.maker.draw(own, rng) if own and self._each else []
        assert self._embeddings is not None
        text = np.zeros((1 + self._each, len(said)), np.float32)
        text[0] = said
        text[1 : 1 + len(chosen)] = self._embeddings[chosen]
        lacking = [NO_TEXT] * (self._each - len(chosen))
        ids: Sequence[int] = [row, *(self._ids[c] for c in chosen), *lacking]
        every = [row, *(self._ids[c] for c in pairs.captions[row])]
        return Row(image, text, ids, every, NO_LABEL, str(pairs.files[row]))
