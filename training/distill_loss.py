"""What a student is to have of its teacher: losses on unit embeddings.

`student` and `teacher` are the embeddings [n, D] of the same views; what comes from the teacher
carries no gradient. `scale` is the inverse temperature, a scalar.
"""

import torch.nn.functional as F
from torch import Tensor


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine, averaged: feature distillation (CLIP-KD, Yang et al. 2024, arXiv:2307.12732,
    section 3.3, there the squared distance; of unit rows that is 2 - 2 * cosine)."""
    return 1 - (student * teacher).sum(dim=1).mean()


def affinity_loss(student: Tensor, teacher: Tensor, others: Tensor, scale: Tensor) -> Tensor:
    """Affinity mimicking (TinyCLIP, Wu et al. 2023, arXiv:2309.12314, equations 1 to 4).

        A_ij = scale * row_i . others_j, for the student's rows and the teacher's
        loss = (KL of the softmaxes over j + KL of those over i) / 2

    both averaged. In the paper `others` are the captions' embeddings, and the loss is the
    cross-entropy, which differs by a constant. Without captions they are the teacher's embeddings
    of the batch's pictures: how alike pictures look to it. `others`: [m, D].
    """
    own, wanted = scale * student @ others.T, scale * teacher @ others.T
    return (_divergence(own, wanted) + _divergence(own.T, wanted.T)) / 2


def soft_label_loss(
    student: Tensor, teacher: Tensor, bank: Tensor, scale: Tensor, temperature: float
) -> Tensor:
    """The teacher's scores over a prompt bank [C, D] as soft labels (Hinton et al. 2015,
    arXiv:1503.02531): temperature^2 * KL of the softmaxes at scale / temperature."""
    scale = scale / temperature
    found = _divergence(scale * student @ bank.T, scale * teacher @ bank.T)
    return found * temperature**2


def _divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """KL(softmax(wanted) || softmax(logits)) over columns, averaged over rows."""
    return F.kl_div(
        logits.log_softmax(dim=1), wanted.log_softmax(dim=1), reduction="batchmean", log_target=True
    )
