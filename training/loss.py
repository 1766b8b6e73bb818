"""Contrastive losses in which one image may have several true captions in the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SCALE = 100.0


def clip_loss(image: Tensor, text: Tensor, scale: Tensor, positives: Tensor) -> Tensor:
    """Symmetric InfoNCE in which no positive is another one's negative.

        logits = scale * image @ text.T
        row_i  = mean over positives p of -log(exp(l_ip) / (exp(l_ip) + sum_negatives n exp(l_in)))
        loss   = (mean over rows + the same over columns) / 2

    With one positive a row it is CLIP's loss (Radford et al. 2021, arXiv:2103.00020, figure 3);
    with several it is the supervised contrastive loss with the mean outside of the logarithm
    (Khosla et al. 2020, arXiv:2004.11362, equation 2), the other positives left out of the
    denominator: those all hold, so none should push another away.

    `image`, `text`: unit rows [N, D]; `scale`: scalar; `positives`: bool [N, N], True where
    caption j is true of image i, at least once in each row and column. Returns a scalar.
    """
    logits = scale * image @ text.T
    return (_one_way(logits, positives) + _one_way(logits.T, positives.T)) / 2


def _one_way(logits: Tensor, positives: Tensor) -> Tensor:
    negatives = logits.masked_fill(positives, float("-inf")).logsumexp(dim=1, keepdim=True)
    per_pair = F.softplus(negatives - logits) * positives
    return (per_pair.sum(dim=1) / positives.sum(dim=1)).mean()


def sigmoid_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, positives: Tensor
) -> Tensor:
    """SigLIP's pairwise sigmoid loss (Zhai et al. 2023, arXiv:2303.15343, equation 1).

        loss = -1/N * sum_ij log sigmoid(z_ij * (scale * image_i . text_j + bias))

    with z = 1 for a true pair and -1 otherwise. Shapes as in `clip_loss`; `bias`: scalar.
    """
    signs = positives.to(image.dtype) * 2 - 1
    logits = scale * image @ text.T + bias
    return -F.logsigmoid(signs * logits).sum() / len(image)


def clamp_scale(log_scale: Tensor) -> None:
    """Keeps the learned temperature's inverse in [1, 100], as CLIP does, in place."""
    with torch.no_grad():
        log_scale.clamp_(0, torch.log(torch.tensor(MAX_SCALE)).item())
