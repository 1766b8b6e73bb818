"""From the embeddings of a batch to the loss of a distillation, over all devices."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .batches import Batch
from .distill_loss import affinity_loss, embedding_loss, soft_label_loss
from .distill_options import DistillOptions
from .loss import Contrast, clip_loss, positives
from .towers import Embeddings

Gather = Callable[[Tensor], Tensor]


class DistillObjective(nn.Module):
    """The weighted sum of the losses in `distill_loss`, and of the contrast with captions.

    `bank` are the teacher's embeddings of the labels [C, D], or None.
    Each device takes the loss of the whole batch: the mean of their gradients is its gradient.
    """

    momentum = False
    bank: Tensor | None

    def __init__(self, options: DistillOptions, bank: Tensor | None, gather: Gather) -> None:
        super().__init__()
        self.options, self.gather = options, gather
        self.register_buffer("bank", bank, persistent=False)

    def forward(self, out: Embeddings, batch: Batch, _: Embeddings | None = None) -> Tensor:
        """The loss of the batch: a picture's first text is the teacher's embedding of it, those
        with an id from 0 up behind it are captions (see `DistillRows`)."""
        each = len(batch.texts) // len(batch.images)
        options, scale = self.options, out.scale.detach()
        image, text = self.gather(out.image), self.gather(out.text)
        student, teacher = image[::each], text[::each]
        loss: Tensor = options.embedding * embedding_loss(student, teacher)
        if options.affinity:
            loss = loss + options.affinity * self._affinity(batch, student, teacher, text, scale)
        if options.soft_labels and self.bank is not None:
            soft = soft_label_loss(student, teacher, self.bank, scale, options.temperature)
            loss = loss + options.soft_labels * soft
        if options.contrast and each > 1:
            loss = loss + options.contrast * self._contrast(batch, image, text, scale)
        if out.words is not None and out.said is not None:
            loss = loss + self._of_texts(self.gather(out.words), self.gather(out.said), scale)
        return loss

    def _of_texts(self, student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
        """What a text tower of the student's own learns by, weighted as for pictures."""
        loss: Tensor = self.options.embedding * embedding_loss(student, teacher)
        if self.options.affinity:
            loss = loss + self.options.affinity * affinity_loss(student, teacher, teacher, scale)
        return loss

    def _captions(self, batch: Batch) -> Tensor:
        """Which rows of the whole batch hold a caption: bool [n * K]."""
        each = len(batch.texts) // len(batch.images)
        drawn: Tensor = self.gather(batch.drawn)
        first = torch.arange(len(drawn), device=drawn.device) % each == 0
        return (drawn >= 0) & ~first

    def _affinity(
        self, batch: Batch, student: Tensor, teacher: Tensor, text: Tensor, scale: Tensor
    ) -> Tensor:
        loss = affinity_loss(student, teacher, teacher, scale)
        captions = text[self._captions(batch)]
        if not len(captions):
            return loss
        return (loss + affinity_loss(student, teacher, captions, scale)) / 2

    def _contrast(self, batch: Batch, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        rows = self._captions(batch)
        if not rows.any():
            return image.sum() * 0
        own, drawn = self.gather(batch.own)[rows], self.gather(batch.drawn)[rows]
        image, text, true = image[rows], text[rows], positives(own, drawn)
        return clip_loss(Contrast(image, text, image, text, true, true.T), scale)
