"""Contrastive losses for batches in which an image may have several true captions, and a caption
several images.

They take one rank's share of the batch (`Contrast`). Rows are averaged before anything else, so
that the mean over equal ranks of these losses is the loss of the whole batch in one process.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .options import Mining

MAX_SCALE = 100.0
# The root's derivative is infinite where a negative coincides with its image: below, it is cut.
_MIN_SQUARED_DISTANCE = 1e-6


class Contrast(NamedTuple):
    """What one of the ranks contrasts: its own n rows with M others, its own among them.

    M is the size of the whole batch, plus that of the queue where there is one. In one process
    without a queue the own rows and all rows are the same. All features are unit rows.
    """

    image: Tensor  # own images [n, D]
    text: Tensor  # own captions [n, D]
    all_image: Tensor  # what own captions are held against [M, D]
    all_text: Tensor  # what own images are held against [M, D]
    to_text: Tensor  # bool [n, M]: caption j is true of own image i; at least one a row
    to_image: Tensor  # bool [n, M]: own caption i is true of image j; at least one a row


def positives(own: Tensor, drawn: Tensor) -> Tensor:
    """Which of the drawn captions are true of which image: bool [n, M].

    `own`: int64 [n, K], the ids of all captions of each image, padded with -1;
    `drawn`: int64 [M], the id of the caption that each row shows; -1 is true of no image.
    """
    found = torch.zeros(len(own), len(drawn), dtype=torch.bool, device=drawn.device)
    for ids in own.T:  # comparing all at once would take K times the memory
        found |= ids[:, None] == drawn
    return found & (drawn >= 0)


def clip_loss(c: Contrast, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE in which no positive is another one's negative.

        l_ij   = scale * image_i . all_text_j
        row_i  = mean over positives p of -log(exp(l_ip) / (exp(l_ip) + sum_negatives n exp(l_in)))
        loss   = (mean over own images + the same over own captions) / 2

    With one positive a row it is CLIP's loss (Radford et al. 2021, arXiv:2103.00020, figure 3);
    with several it is the supervised contrastive loss with the mean outside of the logarithm
    (Khosla et al. 2020, arXiv:2004.11362, equation 2), the other positives left out of the
    denominator: those all hold, so none should push another away. `scale`: scalar.
    """
    to_text = _info_nce(scale * _cosines(c.image, c.all_text), c.to_text)
    to_image = _info_nce(scale * _cosines(c.text, c.all_image), c.to_image)
    return (to_text + to_image) / 2


def _info_nce(logits: Tensor, true: Tensor) -> Tensor:
    negatives = logits.masked_fill(true, -math.inf).logsumexp(dim=1, keepdim=True)
    return _row_means(F.softplus(negatives - logits), true).mean()


def siglip_loss(c: Contrast, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's pairwise sigmoid loss (Zhai et al. 2023, arXiv:2303.15343, equation 1).

        loss = -1/n * sum_ij log sigmoid(z_ij * (scale * image_i . all_text_j + bias))

    with z = 1 for a true pair and -1 otherwise, over own images and all captions: over the ranks,
    each pair once. `scale`, `bias`: scalars.
    """
    logits = scale * _cosines(c.image, c.all_text) + bias
    return -F.logsigmoid(torch.where(c.to_text, logits, -logits)).sum() / len(logits)


def itc_loss(
    c: Contrast, image_m: Tensor, text_m: Tensor, scale: Tensor, alpha: float | Tensor
) -> Tensor:
    """ALBEF's image-text contrast with momentum distillation (Li et al. 2021, arXiv:2107.07651,
    equations 2 and 6, as cross-entropies: without the entropy of the targets, which has no
    gradient). BLIP's is the same (Li et al. 2022, arXiv:2201.12086).

        target_i = alpha * softmax_j(scale * image_m_i . all_text_j) + (1 - alpha) * hard_i
        row_i    = -sum_j target_ij * log softmax_j(scale * image_i . all_text_j)
        loss     = (mean over own images + the same over own captions) / 2

    with hard_ij = 1 / (number of positives of row i) for a positive and 0 otherwise.

    Here `all_image` and `all_text` are the momentum encoders' rows: the whole batch's, then the
    queue's. `image_m`, `text_m`: those encoders' rows of the own pairs [n, D]; `scale`: scalar;
    `alpha`: in [0, 1]. The targets carry no gradient.
    """
    to_text = _distil(c.image, image_m, c.all_text, c.to_text, scale, alpha)
    to_image = _distil(c.text, text_m, c.all_image, c.to_image, scale, alpha)
    return (to_text + to_image) / 2


def _distil(
    own: Tensor,
    own_m: Tensor,
    others: Tensor,
    true: Tensor,
    scale: Tensor,
    alpha: float | Tensor,
) -> Tensor:
    with torch.no_grad():
        soft = (scale * _cosines(own_m, others)).softmax(dim=1)
        hard = true.to(soft.dtype) / true.sum(dim=1, keepdim=True)
        targets = alpha * soft + (1 - alpha) * hard
    return F.cross_entropy(scale * _cosines(own, others), targets)


def triplet_loss(c: Contrast, margin: float, mining: Mining) -> Tensor:
    """Hinge on one mined negative for each positive pair, by cosine similarity s.

        row_i = mean over positives p of max(0, margin + s_in(p) - s_ip)
        loss  = (mean over own images + the same over own captions) / 2

    "hardest": n is the most similar negative of the row (VSE++, Faghri et al. 2018,
    arXiv:1707.05612, section 2.2, where the two directions are summed). "semi-hard": n(p) is the
    most similar one of those that are less similar than p (FaceNet, Schroff et al. 2015,
    arXiv:1503.03832, equation 4); where all are at least as similar, the least similar one, which
    is the nearest to being semi-hard, as in TensorFlow's `triplet_semihard_loss`. A row without a
    negative counts as 0.
    """
    to_text = _triplets(_cosines(c.image, c.all_text), c.to_text, margin, mining)
    to_image = _triplets(_cosines(c.text, c.all_image), c.to_image, margin, mining)
    return (to_text + to_image) / 2


def _triplets(cosines: Tensor, true: Tensor, margin: float, mining: Mining) -> Tensor:
    if mining == "hardest":
        negatives = cosines.masked_fill(true, -math.inf).amax(dim=1, keepdim=True)
    else:
        negatives = _semi_hard(cosines, true)
    pairs = true & ~true.all(dim=1, keepdim=True)
    return _row_means(F.relu(margin + negatives - cosines), pairs).mean()


def _semi_hard(cosines: Tensor, true: Tensor) -> Tensor:
    """For each entry [n, M]: its row's largest negative below it, or else the smallest one.

    By sorting rows: comparing each positive with each negative would take M times the memory.
    """
    negatives = cosines.masked_fill(true, math.inf).sort(dim=1).values
    below = torch.searchsorted(negatives.detach(), cosines.detach()) - 1
    return negatives.gather(1, below.clamp(min=0))


def margin_loss(c: Contrast, margin: float) -> Tensor:
    """Pairwise contrastive loss with a margin (Hadsell et al. 2006, CVPR, equation 4).

        D_ij  = |image_i - all_text_j| = sqrt(2 - 2 * cosine), in [0, 2]
        row_i = mean over positives p of D_ip^2 / 2
              + mean over negatives n of max(0, margin - D_in)^2 / 2
        loss  = mean over own images

    over own images and all captions: over the ranks, each pair once. Positives and negatives are
    averaged apart, unlike in the paper, or the few positives would hardly count in a large batch.
    A row without a negative has the first term only.
    """
    cosines = _cosines(c.image, c.all_text)
    distances = (2 - 2 * cosines).clamp(min=_MIN_SQUARED_DISTANCE).sqrt()
    together = _row_means(1 - cosines, c.to_text)
    apart = _row_means(F.relu(margin - distances).square() / 2, ~c.to_text)
    return (together + apart).mean()


def label_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, averaged over the rows that have a label; 0 where no row has one.

    Over the ranks it is the mean of such means: ranks with fewer labels weigh theirs more.
    `logits`: [n, C]; `targets`: int64 [n], -1 for a row without a label.
    """
    total = F.cross_entropy(_wide(logits), targets, ignore_index=-1, reduction="sum")
    return total / (targets != -1).sum().clamp(min=1)


def clamp_scale(log_scale: Tensor, most: float = MAX_SCALE) -> None:
    """Keeps the learned temperature's inverse in [1, 100], as CLIP does, in place; or below
    `most`."""
    with torch.no_grad():
        log_scale.clamp_(0, math.log(most))


def _cosines(rows: Tensor, columns: Tensor) -> Tensor:
    """Inner products [n, M] of [n, D] and [M, D], in float32 or more.

    Autocast would round them to 8 bits: at a scale of 100 an error of up to 0.2 in a logit.
    """
    with torch.autocast(rows.device.type, enabled=False):
        return _wide(rows) @ _wide(columns).T


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _row_means(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of each row's chosen entries [n]; 0, without a gradient, where a row has none."""
    # Not `values * chosen`: what is not chosen may be infinite.
    total = values.masked_fill(~chosen, 0).sum(dim=1)
    return total / chosen.sum(dim=1).clamp(min=1)
