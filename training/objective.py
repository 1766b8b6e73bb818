"""From the embeddings of a batch to its loss: the chosen contrast, over all devices."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from runtime.errors import DataError

from .batches import NO_ID, Batch
from .loss import (
    Contrast,
    clip_loss,
    itc_loss,
    label_loss,
    margin_loss,
    positives,
    siglip_loss,
    triplet_loss,
)
from .model import ClipModel
from .options import TrainOptions
from .towers import Embeddings

MARGIN, DISTANCE = 0.2, 1.2  # of the triplet loss in cosine, of the margin loss in 0 to 2
Gather = Callable[[Tensor], Tensor]
"""The same rows of every device, one after the other, with their gradients."""


class Pool(NamedTuple):
    """Rows that own rows are held against: everybody's, and for itc the queue's."""

    image: Tensor
    text: Tensor
    drawn: Tensor
    own: Tensor


class Objective(nn.Module):
    """The loss that `--loss` names, plus the classification of labels with `--label-weight`.

    Its buffers are the queue of ALBEF's loss: the last `queue` pairs' momentum features.
    """

    image: Tensor
    text: Tensor
    drawn: Tensor
    own: Tensor

    def __init__(self, options: TrainOptions, clip: ClipModel, most: int, gather: Gather) -> None:
        super().__init__()
        self.options, self.gather = options, gather
        has_bias = clip.model.logit_bias is not None
        self.name = ("siglip" if has_bias else "clip") if options.loss == "auto" else options.loss
        if self.name == "siglip" and not has_bias:
            raise DataError(
                f"--loss siglip needs a model with a bias, which {clip.name} has not: choose a "
                'SigLIP model, or put "init_logit_bias": -10 into its config'
            )
        if has_bias and self.name != "siglip":
            raise DataError(
                f"{clip.name} has a bias: its scores are sigmoids, which --loss {self.name} does "
                "not train; leave out --loss, or take siglip"
            )
        width, length = int(clip.config["embed_dim"]), options.queue if self.momentum else 0
        self.register_buffer("image", torch.zeros(length, width))
        self.register_buffer("text", torch.zeros(length, width))
        self.register_buffer("drawn", torch.full((length,), NO_ID))
        self.register_buffer("own", torch.full((length, most), NO_ID))

    @property
    def momentum(self) -> bool:
        """Whether the loss needs the embeddings of a momentum encoder."""
        return self.name == "itc"

    def forward(self, out: Embeddings, batch: Batch, slow: Embeddings | None = None) -> Tensor:
        """The loss of this device's share of the batch; the mean over the devices is that of the
        whole batch. `slow` is what the momentum encoder says of the same pairs."""
        pool = self._pool(out if slow is None else slow, batch)
        contrast = Contrast(
            out.image,
            out.text,
            pool.image,
            pool.text,
            positives(batch.own, pool.drawn),
            positives(pool.own, batch.drawn).T,
        )
        loss = self._contrast(contrast, out, slow)
        if out.classes is not None:
            loss = loss + self.options.label_weight * label_loss(out.classes, batch.targets)
        if slow is not None:
            self._enqueue(pool)
        return loss

    def _contrast(self, c: Contrast, out: Embeddings, slow: Embeddings | None) -> Tensor:
        options = self.options
        if self.name == "siglip":
            assert out.bias is not None
            return siglip_loss(c, out.scale, out.bias)
        if self.name == "itc":
            assert slow is not None
            return itc_loss(c, slow.image, slow.text, out.scale, options.alpha)
        if self.name == "triplet":
            loss = triplet_loss(c, options.margin or MARGIN, options.mining)
        elif self.name == "margin":
            loss = margin_loss(c, options.margin or DISTANCE)
        else:
            return clip_loss(c, out.scale)
        return loss + _of_scale_alone(c, out.scale)

    def _pool(self, out: Embeddings, batch: Batch) -> Pool:
        everybody = Pool(
            self.gather(out.image),
            self.gather(out.text),
            self.gather(batch.drawn),
            self.gather(batch.own),
        )
        if not self.momentum:
            return everybody
        queue = Pool(self.image, self.text, self.drawn, self.own)
        filled = self.drawn >= 0
        pairs = zip(everybody, queue, strict=True)
        return Pool(*(torch.cat([now, old[filled]]) for now, old in pairs))

    @torch.no_grad()
    def _enqueue(self, pool: Pool) -> None:
        """Puts the batch at the queue's head; the oldest go."""
        length = len(self.drawn)
        fresh = len(pool.drawn) - int((self.drawn >= 0).sum())
        for name, rows in zip(Pool._fields, pool, strict=True):
            queue = getattr(self, name)
            queue.copy_(torch.cat([rows[:fresh].detach(), queue])[:length])


def _of_scale_alone(c: Contrast, scale: Tensor) -> Tensor:
    """Zero, with the gradient of CLIP's loss at the temperature: what has no use for one learns it
    all the same, or scores would mean nothing."""
    loss = clip_loss(Contrast(*(rows.detach() for rows in c)), scale)
    return loss - loss.detach()


@torch.no_grad()
def accuracy(out: Embeddings, batch: Batch) -> Tensor:
    """Share of the own images whose most similar own caption is true of them."""
    best = (out.image @ out.text.T).argmax(dim=1)
    return positives(batch.own, batch.drawn).gather(1, best[:, None]).float().mean()
