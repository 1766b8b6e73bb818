"""What a step runs where the student learns a text tower of its own: texts beside the pictures."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from .model import ClipModel
from .towers import Embeddings, Towers


class TextTowers(Towers):
    """Towers that also embed texts, as many as there are texts in the batch, drawn by lot from
    `tokens` (int [T, L]); `said` [T, D] are the teacher's embeddings of them all.

    What is drawn hangs on torch's seed, which the step sets: it is the same when a run goes on.
    """

    def __init__(self, clip: ClipModel, tokens: Tensor, said: Tensor) -> None:
        super().__init__(clip)
        self._tokens, self._said = tokens, said  # no buffers: an average would copy them each step

    def forward(self, images: Tensor, texts: Tensor) -> Embeddings:
        """As Towers, with `words` and what the teacher says of them, both [n * K, D]."""
        rows = torch.randint(len(self._tokens), (len(texts),))
        out = super().forward(images, texts)
        words = encode_short(self.model, self._tokens[rows].long().to(images.device))
        said = self._said[rows].to(images.device)
        return out._replace(words=F.normalize(words.float(), dim=-1), said=said)


def encode_short(model: Any, tokens: Tensor) -> Tensor:
    """`model.encode_text` of tokens [n, L], at the cost of the longest text's length and not of L:
    in a causal tower that is read at the last token, nothing behind it matters. Returns [n, D]."""
    prefix = "text." if hasattr(model, "text") else ""
    tower = getattr(model, "text", model)
    pool = getattr(tower, "pool_type", None) or getattr(tower, "text_pool_type", None)
    plain = getattr(tower, "cls_emb", None) is None and pool == "argmax"
    if not plain or tower.attn_mask is None:
        found: Tensor = model.encode_text(tokens)
        return found
    length = int(tokens.argmax(dim=-1).max()) + 1
    cut = {
        f"{prefix}positional_embedding": tower.positional_embedding[:length],
        f"{prefix}attn_mask": tower.attn_mask[:length, :length],
    }
    unit: Tensor = functional_call(model, cut, (None, tokens[:, :length]))[1]
    return unit
