"""The losses against plain NumPy transcriptions of their formulas, and against open_clip's."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from training import torchvision_ops as torchvision_ops
from training.loss import (
    Contrast,
    clamp_scale,
    clip_loss,
    itc_loss,
    label_loss,
    margin_loss,
    positives,
    siglip_loss,
    triplet_loss,
)
from training.options import Mining

# isort: split
from open_clip.loss import ClipLoss, SigLipLoss

Matrix = NDArray[np.float64]
Mask = NDArray[np.bool_]
SCALE, BIAS, ALPHA, MARGIN = 9.0, -3.0, 0.4, 0.9


def unit(count: int, seed: int, width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1)


def batch(n: int = 8, *, queue: int = 0, several: bool = False) -> Contrast:
    """One process's rows, and `queue` more; each true of its partner, or of a few others too."""
    rng = np.random.default_rng(3)
    image, text = unit(n, 0), unit(n, 1)
    to_text, to_image = np.eye(n, n + queue, dtype=bool), np.eye(n, n + queue, dtype=bool)
    if several:
        to_text |= rng.random(to_text.shape) < 0.2
        to_image |= rng.random(to_image.shape) < 0.2
        to_image[:, :n] = to_text[:, :n].T
    return Contrast(
        image=image,
        text=text,
        all_image=torch.cat([image, unit(queue, 2)]),
        all_text=torch.cat([text, unit(queue, 3)]),
        to_text=torch.from_numpy(to_text),
        to_image=torch.from_numpy(to_image),
    )


BATCHES = {
    "one positive": batch(),
    "several positives": batch(several=True),
    "a queue": batch(5, queue=7),
    "several positives and a queue": batch(5, queue=7, several=True),
}


def momentum(rows: Tensor) -> Tensor:
    """Other unit rows, each of which depends on its own row only."""
    return rows[:, [1, 0, *range(2, rows.shape[1])]]


LOSSES: dict[str, Callable[[Contrast, Tensor], Tensor]] = {
    "clip": clip_loss,
    "siglip": lambda c, scale: siglip_loss(c, scale, torch.tensor(BIAS)),
    "itc": lambda c, scale: itc_loss(c, momentum(c.image), momentum(c.text), scale, ALPHA),
    "hardest": lambda c, scale: triplet_loss(c, MARGIN, "hardest"),
    "semi-hard": lambda c, scale: triplet_loss(c, MARGIN, "semi-hard"),
    "margin": lambda c, scale: margin_loss(c, MARGIN),
}
each_loss = pytest.mark.parametrize("name", LOSSES)
each_batch = pytest.mark.parametrize("kind", BATCHES)


def cast(c: Contrast, dtype: torch.dtype) -> Contrast:
    image, text, images, texts = (x.detach().to(dtype) for x in c[:4])
    return Contrast(image, text, images, texts, c.to_text, c.to_image)


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


# Each formula again, for one row at a time, without a matrix.


class Row(NamedTuple):
    own: Matrix  # [D]
    own_m: Matrix  # [D], the momentum encoder's
    others: Matrix  # [M, D]
    true: Mask  # [M]

    def of_positives(self, values: list[float]) -> list[float]:
        return [value for value, true in zip(values, self.true, strict=True) if true]

    def of_negatives(self, values: list[float]) -> list[float]:
        return [value for value, true in zip(values, self.true, strict=True) if not true]


def cosines(row: Matrix, others: Matrix) -> list[float]:
    return [sum(a * b for a, b in zip(row, other, strict=True)) for other in others]


def mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def clip_row(row: Row) -> float:
    powers = [math.exp(SCALE * s) for s in cosines(row.own, row.others)]
    negatives = sum(row.of_negatives(powers))
    return mean(-math.log(p / (p + negatives)) for p in row.of_positives(powers))


def siglip_row(row: Row) -> float:
    total = 0.0
    for s, true in zip(cosines(row.own, row.others), row.true, strict=True):
        z = 1 if true else -1
        total -= math.log(1 / (1 + math.exp(-z * (SCALE * s + BIAS))))
    return total


def softmax(row: Matrix, others: Matrix) -> list[float]:
    powers = [math.exp(SCALE * s) for s in cosines(row, others)]
    return [power / sum(powers) for power in powers]


def itc_row(row: Row) -> float:
    found, soft = softmax(row.own, row.others), softmax(row.own_m, row.others)
    total = 0.0
    for p, q, true in zip(found, soft, row.true, strict=True):
        hard = 1 / sum(row.true) if true else 0
        total -= (ALPHA * q + (1 - ALPHA) * hard) * math.log(p)
    return total


def hardest_row(row: Row) -> float:
    values = cosines(row.own, row.others)
    hardest = max(row.of_negatives(values))
    return mean(max(0, MARGIN + hardest - s) for s in row.of_positives(values))


def semi_hard_row(row: Row) -> float:
    values, hinges = cosines(row.own, row.others), []
    for s in row.of_positives(values):
        further = [n for n in row.of_negatives(values) if n < s]
        mined = max(further) if further else min(row.of_negatives(values))
        hinges.append(max(0, MARGIN + mined - s))
    return mean(hinges)


def margin_row(row: Row) -> float:
    distances = [math.sqrt(sum((row.own - other) ** 2)) for other in row.others]
    together = mean(d**2 / 2 for d in row.of_positives(distances))
    return together + mean(max(0, MARGIN - d) ** 2 / 2 for d in row.of_negatives(distances))


ROWS = {
    "clip": clip_row,
    "siglip": siglip_row,
    "itc": itc_row,
    "hardest": hardest_row,
    "semi-hard": semi_hard_row,
    "margin": margin_row,
}


def transcription(name: str, c: Contrast) -> float:
    def one_way(own: Tensor, others: Tensor, true: Tensor) -> float:
        rows = zip(own.numpy(), momentum(own).numpy(), true.numpy(), strict=True)
        return mean(ROWS[name](Row(row, row_m, others.numpy(), mask)) for row, row_m, mask in rows)

    to_text = one_way(c.image, c.all_text, c.to_text)
    if name in ("siglip", "margin"):
        return to_text
    return (to_text + one_way(c.text, c.all_image, c.to_image)) / 2


@each_batch
@each_loss
def test_a_loss_is_its_formula(name: str, kind: str) -> None:
    found = LOSSES[name](BATCHES[kind], torch.tensor(SCALE))
    assert found.item() == pytest.approx(transcription(name, BATCHES[kind]), rel=1e-7)
    single = LOSSES[name](cast(BATCHES[kind], torch.float32), torch.tensor(SCALE))
    assert single.item() == pytest.approx(found.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["one positive", "several positives and a queue"])
@pytest.mark.parametrize("name", [*LOSSES])
def test_gradients(name: str, kind: str) -> None:
    c = BATCHES[kind]
    scale = torch.tensor(5.0, dtype=torch.float64)

    def loss(
        scale: Tensor, bias: Tensor, image: Tensor, text: Tensor, images: Tensor, texts: Tensor
    ) -> Tensor:
        own = Contrast(image, text, images, texts, c.to_text, c.to_image)
        if name == "siglip":
            return siglip_loss(own, scale, bias)
        if name == "itc":  # with alpha 0: the targets have no gradient, but they have differences
            return itc_loss(own, momentum(c.image), momentum(c.text), scale, 0.0)
        return LOSSES[name](own, scale)

    inputs = [scale, scale - 8, *c[:4]]
    assert torch.autograd.gradcheck(loss, [x.clone().requires_grad_() for x in inputs])


def test_gradient_towards_soft_targets() -> None:
    c, scale = BATCHES["several positives and a queue"], torch.tensor(5.0, dtype=torch.float64)

    def loss(image: Tensor, text: Tensor) -> Tensor:
        own = c._replace(image=image, text=text)
        return itc_loss(own, momentum(c.image), momentum(c.text), scale, ALPHA)

    own = (c.image.clone().requires_grad_(), c.text.clone().requires_grad_())
    assert torch.autograd.gradcheck(loss, own)


def test_soft_targets_carry_no_gradient() -> None:
    c = BATCHES["a queue"]
    image_m, text_m = c.image.clone().requires_grad_(), c.text.clone().requires_grad_()
    image = c.image.clone().requires_grad_()
    loss = itc_loss(c._replace(image=image), image_m, text_m, torch.tensor(SCALE), 1.0)
    of_image, of_image_m, of_text_m = gradients(loss, image, image_m, text_m)
    assert of_image.any() and not of_image_m.any() and not of_text_m.any()


def test_with_one_positive_a_row_it_is_clips_loss() -> None:
    image, text = unit(16, 0).requires_grad_(), unit(16, 1).requires_grad_()
    scale = torch.tensor(14.0, requires_grad=True)
    true = torch.eye(16, dtype=torch.bool)
    expected = ClipLoss()(image, text, scale)
    c = Contrast(image, text, image, text, true, true)
    for found in (clip_loss(c, scale), itc_loss(c, image, text, scale, 0.0)):
        torch.testing.assert_close(found, expected)
        inputs = (image, text, scale)
        torch.testing.assert_close(
            gradients(found, *inputs),
            torch.autograd.grad(expected, inputs, retain_graph=True),
        )


def test_sigmoid_loss_is_siglips() -> None:
    image, text = unit(16, 0).requires_grad_(), unit(16, 1).requires_grad_()
    scale = torch.tensor(10.0, requires_grad=True)
    bias = torch.tensor(-10.0, requires_grad=True)
    true = torch.eye(16, dtype=torch.bool)
    found = siglip_loss(Contrast(image, text, image, text, true, true), scale, bias)
    expected = SigLipLoss()(image, text, scale, bias)
    torch.testing.assert_close(found, expected)
    inputs = (image, text, scale, bias)
    torch.testing.assert_close(gradients(found, *inputs), gradients(expected, *inputs))


@pytest.mark.parametrize("ranks", [2, 4])
@each_batch
@each_loss
def test_the_mean_over_ranks_is_the_loss_of_the_whole_batch(
    name: str, kind: str, ranks: int
) -> None:
    whole = batch(8, queue=5 * ("queue" in kind), several="several" in kind)
    image, text = whole.image.clone().requires_grad_(), whole.text.clone().requires_grad_()
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    whole = whole._replace(
        image=image,
        text=text,
        all_image=torch.cat([image, whole.all_image[8:]]),
        all_text=torch.cat([text, whole.all_text[8:]]),
    )

    def own(rank: int) -> Contrast:
        rows = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
        return Contrast(
            image[rows],
            text[rows],
            whole.all_image,
            whole.all_text,
            whole.to_text[rows],
            whole.to_image[rows],
        )

    found = torch.stack([LOSSES[name](own(rank), scale) for rank in range(ranks)]).mean()
    expected = LOSSES[name](whole, scale)
    torch.testing.assert_close(found, expected)
    inputs = (image, text, scale)
    torch.testing.assert_close(gradients(found, *inputs), gradients(expected, *inputs))


@each_loss
def test_the_order_of_the_rows_does_not_matter(name: str) -> None:
    c = BATCHES["several positives and a queue"]
    rng = np.random.default_rng(0)
    own, images, texts = (
        torch.from_numpy(rng.permutation(n))
        for n in (len(c.image), len(c.all_image), len(c.all_text))
    )
    moved = Contrast(
        c.image[own],
        c.text[own],
        c.all_image[images],
        c.all_text[texts],
        c.to_text[own][:, texts],
        c.to_image[own][:, images],
    )
    scale = torch.tensor(SCALE)
    torch.testing.assert_close(LOSSES[name](moved, scale), LOSSES[name](c, scale))


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "itc"])
def test_no_positive_is_pushed_away(name: str) -> None:
    """Against the columns of an identity a row's features are its cosines, each free to move."""
    true = batch(8, several=True).to_text
    for seed in range(8):
        image = (unit(8, seed, width=8) * 1.5).clamp(-1, 1).requires_grad_()
        text = (unit(8, seed + 99, width=8) * 1.5).clamp(-1, 1).requires_grad_()
        identity = torch.eye(8, dtype=torch.float64)
        c = Contrast(image, text, identity, identity, true, true.T)
        of_image, of_text = gradients(LOSSES[name](c, torch.tensor(SCALE)), image, text)
        for gradient, positive in ((of_image, true), (of_text, true.T)):
            assert (gradient[positive] <= 0).all() and (gradient[~positive] >= 0).all()
        assert (of_image[true] < 0).any() and (of_image[~true] > 0).any()


def test_a_true_caption_is_not_a_negative() -> None:
    """Moving an image nearer to a second caption that is true of it must not raise its loss."""
    image, text = unit(4, 0), unit(4, 1)
    text[1] = image[0]
    true = torch.eye(4, dtype=torch.bool)
    alone = clip_loss(Contrast(image, text, image, text, true, true), torch.tensor(10.0))
    true[0, 1] = True
    both = clip_loss(Contrast(image, text, image, text, true, true.T), torch.tensor(10.0))
    assert both < alone


def test_itc_shares_its_hard_target_among_the_positives() -> None:
    """Equally near positives are at rest as soon as the negatives are far away."""
    true = torch.tensor([[True, True, False]])
    image = torch.tensor([[1.0, 1.0, -1.0]], requires_grad=True)
    c = Contrast(image, image, torch.eye(3), torch.eye(3), true, true)
    loss = itc_loss(c, image, image, torch.tensor(50.0), 0.0)
    assert loss.item() == pytest.approx(math.log(2))
    assert gradients(loss, image)[0].abs().max() < 1e-9


@pytest.mark.parametrize(
    ("negatives", "mining", "mined"),
    [
        ([0.7, 0.3, 0.1], "hardest", 0.7),
        ([0.7, 0.3, 0.1], "semi-hard", 0.3),
        ([0.9, 0.7, 0.8], "semi-hard", 0.7),
        ([0.5, 0.9, 0.2], "semi-hard", 0.2),  # as near as the positive is not further
        ([0.1, -0.2, 0.0], "hardest", 0.1),
        ([0.1, -0.2, 0.0], "semi-hard", 0.1),
    ],
)
def test_mined_negative(negatives: list[float], mining: Mining, mined: float) -> None:
    image = torch.tensor([[0.5, *negatives]])
    to_text, everything = torch.tensor([[True, False, False, False]]), torch.ones(1, 4).bool()
    c = Contrast(image, image, torch.eye(4), torch.eye(4), to_text, everything)
    loss = 2 * triplet_loss(c, 0.45, mining)  # the captions have no negative: half of it is 0
    assert loss.item() == pytest.approx(max(0.0, 0.45 + mined - 0.5))


def test_negatives_beyond_the_margin_do_not_count() -> None:
    identity, true = torch.eye(6), torch.eye(6, dtype=torch.bool)
    image = identity.clone().requires_grad_()
    c = Contrast(image, identity, image, identity, true, true)
    for loss in (
        triplet_loss(c, 0.99, "hardest"),
        triplet_loss(c, 0.99, "semi-hard"),
        margin_loss(c, 1.41),
    ):
        assert loss.item() == 0
    assert triplet_loss(c, 1.01, "hardest") > 0 and triplet_loss(c, 1.01, "semi-hard") > 0
    assert margin_loss(c, 1.42) > 0


APART = [[1.0, 0.0], [-1.0, 0.0]]
EXTREMES = {
    "identical rows": ([[1.0, 0.0]] * 4, [[1.0, 0.0]] * 4, np.eye(4)),
    "all right": (APART, APART, np.eye(2)),
    "all wrong": (APART, APART[::-1], np.eye(2)),
    "everything true": (APART, APART, np.ones((2, 2))),
}


@pytest.mark.parametrize("extreme", EXTREMES)
@each_loss
def test_extremes_are_finite(name: str, extreme: str) -> None:
    images, texts, true = EXTREMES[extreme]
    image, text = torch.tensor(images, requires_grad=True), torch.tensor(texts, requires_grad=True)
    scale = torch.tensor(100.0, requires_grad=True)
    mask = torch.from_numpy(true > 0)
    loss = LOSSES[name](Contrast(image, text, image, text, mask, mask.T), scale)
    found = gradients(loss, image, text, scale)
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in found)
    if extreme == "everything true" and name in ("clip", "hardest", "semi-hard"):
        assert loss == 0 and not any(gradient.any() for gradient in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@each_loss
def test_autocast_rounds_nothing(name: str, dtype: torch.dtype) -> None:
    c = cast(BATCHES["several positives and a queue"], dtype)
    image, text, scale = c.image.requires_grad_(), c.text.requires_grad_(), torch.tensor(100.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = LOSSES[name](c, scale)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, LOSSES[name](cast(c, torch.float32), scale))
    assert all(gradient.isfinite().all() for gradient in gradients(found, image, text))


def test_features_may_differ_in_precision() -> None:
    """As with a queue in float32 beside features in half precision."""
    c = cast(BATCHES["a queue"], torch.float32)
    half = c._replace(image=c.image.half(), text=c.text.half())
    found = itc_loss(half, c.image, c.text, torch.tensor(SCALE), ALPHA)
    expected = itc_loss(c, c.image, c.text, torch.tensor(SCALE), ALPHA)
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)


def test_label_loss() -> None:
    logits = unit(5, 0).half().requires_grad_()
    targets = torch.tensor([2, -1, 0, -1, 5])
    rows = [row for row, target in zip(logits.tolist(), targets, strict=True) if target >= 0]
    expected = mean(
        -math.log(math.exp(row[target]) / sum(math.exp(value) for value in row))
        for row, target in zip(rows, (2, 0, 5), strict=True)
    )
    loss = label_loss(logits, targets)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    (gradient,) = gradients(loss, logits)
    assert gradient[targets >= 0].all() and not gradient[targets < 0].any()
    wide = logits.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: label_loss(x, targets), wide)


def test_without_a_label_there_is_no_label_loss() -> None:
    logits = unit(3, 0).requires_grad_()
    loss = label_loss(logits, torch.full((3,), -1))
    assert loss == 0 and not gradients(loss, logits)[0].any()


def test_positives() -> None:
    own = torch.tensor([[4, 7, -1], [7, -1, -1], [1, 2, 3]])
    drawn = torch.tensor([7, 4, 2, 9, -1])
    expected = [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 1, 0, 0]]
    found = positives(own, drawn)
    assert found.dtype == torch.bool and found.int().tolist() == expected


def test_scale_is_clamped() -> None:
    for value, expected in ((9.0, 100.0), (-3.0, 1.0), (2.0, float(np.exp(2.0)))):
        scale = torch.tensor(value)
        clamp_scale(scale)
        assert scale.exp().item() == pytest.approx(expected, rel=1e-5)
    scale = torch.tensor(9.0)
    clamp_scale(scale, 112.3)  # where a SigLIP began
    assert scale.exp().item() == pytest.approx(112.3, rel=1e-5)
