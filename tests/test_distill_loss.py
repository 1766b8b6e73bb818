"""The losses of a distillation against their formulas, written out."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.batches import Batch
from training.distill_loss import affinity_loss, embedding_loss, soft_label_loss
from training.distill_objective import DistillObjective
from training.loss import Contrast, clip_loss
from training.towers import Embeddings

SCALE = torch.tensor(7.0)


def rows(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, 5, generator=generator, dtype=torch.float64), dim=1)


STUDENT, TEACHER, OTHERS = rows(4, 0), rows(4, 1), rows(3, 2)


def divergence(wanted: Tensor, found: Tensor) -> float:
    """KL(softmax(wanted) || softmax(found)) of two vectors."""
    p, q = [v.exp() / v.exp().sum() for v in (wanted, found)]
    return sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))


def test_each_loss_is_zero_at_the_teacher() -> None:
    assert embedding_loss(TEACHER, TEACHER).item() == pytest.approx(0)
    assert affinity_loss(TEACHER, TEACHER, OTHERS, SCALE).item() == pytest.approx(0)
    assert soft_label_loss(TEACHER, TEACHER, OTHERS, SCALE, 2.0).item() == pytest.approx(0)


def test_embedding_loss() -> None:
    cosines = [float(STUDENT[i] @ TEACHER[i]) for i in range(4)]
    assert embedding_loss(STUDENT, TEACHER).item() == pytest.approx(1 - sum(cosines) / 4)


def test_affinity_loss_goes_both_ways() -> None:
    own, wanted = 7 * STUDENT @ OTHERS.T, 7 * TEACHER @ OTHERS.T
    of_rows = sum(divergence(wanted[i], own[i]) for i in range(4)) / 4
    of_others = sum(divergence(wanted[:, j], own[:, j]) for j in range(3)) / 3
    found = affinity_loss(STUDENT, TEACHER, OTHERS, SCALE)
    assert found.item() == pytest.approx((of_rows + of_others) / 2)


def test_soft_labels_at_a_temperature() -> None:
    own, wanted = 7 / 3 * STUDENT @ OTHERS.T, 7 / 3 * TEACHER @ OTHERS.T
    expected = 9 * sum(divergence(wanted[i], own[i]) for i in range(4)) / 4
    found = soft_label_loss(STUDENT, TEACHER, OTHERS, SCALE, 3.0)
    assert found.item() == pytest.approx(expected)


def weighted(**weights: float) -> Any:
    none = dict.fromkeys(("embedding", "affinity", "soft_labels", "contrast"), 0.0)
    return SimpleNamespace(**(none | {"temperature": 1.0} | weights))


def batch_of(teacher: Tensor, captions: Tensor, drawn: list[list[int]]) -> tuple[Tensor, Batch]:
    """The texts and the batch of pictures with one caption each, or -1 for none."""
    text = torch.stack([teacher, captions], dim=1).flatten(0, 1)
    ids = torch.tensor(drawn)
    own = ids.repeat_interleave(2, dim=0)
    none = torch.full((len(ids),), -1)
    names = ("",) * len(ids)
    return text, Batch(torch.zeros(len(ids)), text, ids.flatten(), own, none, names, ())


def loss(options: Any, bank: Tensor | None = None, drawn: list[list[int]] | None = None) -> Tensor:
    captions = rows(4, 3)
    drawn = drawn or [[0, 100], [1, -1], [2, 102], [3, -1]]
    text, batch = batch_of(TEACHER, captions, drawn)
    out = Embeddings(STUDENT.repeat_interleave(2, dim=0), text, SCALE, None, None)
    found: Tensor = DistillObjective(options, bank, lambda own: own)(out, batch)
    return found


def test_the_objective_is_the_weighted_sum() -> None:
    known = loss(weighted(embedding=1))
    assert known.item() == pytest.approx(embedding_loss(STUDENT, TEACHER).item())
    soft = loss(weighted(embedding=1, soft_labels=0.5), OTHERS)
    expected = 0.5 * soft_label_loss(STUDENT, TEACHER, OTHERS, SCALE, 1.0)
    assert (soft - known).item() == pytest.approx(expected.item())
    assert loss(weighted(soft_labels=1)).item() == 0  # without a bank


def test_pictures_without_captions_take_no_part_in_their_contrast() -> None:
    captioned = [0, 2]
    images, texts = STUDENT[captioned], rows(4, 3)[captioned]
    true = torch.eye(2, dtype=torch.bool)
    expected = clip_loss(Contrast(images, texts, images, texts, true, true), SCALE)
    assert loss(weighted(contrast=1)).item() == pytest.approx(expected.item())
    none = [[0, -1], [1, -1], [2, -1], [3, -1]]
    assert loss(weighted(contrast=1), drawn=none).item() == 0


def test_affinity_is_to_pictures_and_to_captions() -> None:
    captions = rows(4, 3)[[0, 2]]
    to_pictures = affinity_loss(STUDENT, TEACHER, TEACHER, SCALE)
    to_captions = affinity_loss(STUDENT, TEACHER, captions, SCALE)
    found = loss(weighted(affinity=1))
    assert found.item() == pytest.approx(((to_pictures + to_captions) / 2).item())
