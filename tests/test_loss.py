"""The losses against plain NumPy transcriptions of their formulas, and against open_clip's."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from calibration.metrics import recall_at_k, row_cosines, top_k_accuracy
from training import torchvision_ops as torchvision_ops
from training.loss import clamp_scale, clip_loss, sigmoid_loss

# isort: split
from open_clip.loss import ClipLoss, SigLipLoss

Matrix = NDArray[np.float64]


def unit(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1)


def positives(count: int) -> torch.Tensor:
    rng = np.random.default_rng(3)
    return torch.from_numpy(np.eye(count, dtype=bool) | (rng.random((count, count)) < 0.2))


def transcription(image: Matrix, text: Matrix, scale: float, true: NDArray[np.bool_]) -> float:
    logits, total = scale * image @ text.T, 0.0
    for matrix, mask in ((logits, true), (logits.T, true.T)):
        rows = []
        for row, own in zip(matrix, mask, strict=True):
            negatives = np.exp(row[~own]).sum()
            rows.append(np.mean([-np.log(np.exp(p) / (np.exp(p) + negatives)) for p in row[own]]))
        total += float(np.mean(rows)) / 2
    return total


def test_clip_loss_is_its_formula() -> None:
    image, text, true = unit(8, 0), unit(8, 1), positives(8)
    found = clip_loss(image, text, torch.tensor(9.0), true)
    expected = transcription(image.numpy(), text.numpy(), 9.0, true.numpy())
    assert found.item() == pytest.approx(expected, abs=1e-9)


def test_with_one_positive_a_row_it_is_clips_loss() -> None:
    image, text, scale = unit(16, 0), unit(16, 1), torch.tensor(14.0)
    found = clip_loss(image, text, scale, torch.eye(16, dtype=torch.bool))
    assert found.item() == pytest.approx(ClipLoss()(image, text, scale).item(), abs=1e-9)


def test_sigmoid_loss_is_siglips() -> None:
    image, text = unit(16, 0), unit(16, 1)
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    found = sigmoid_loss(image, text, scale, bias, torch.eye(16, dtype=torch.bool))
    expected = SigLipLoss()(image, text, scale, bias)
    assert found.item() == pytest.approx(expected.item(), abs=1e-9)


def test_a_true_caption_is_not_a_negative() -> None:
    """Moving an image nearer to a second caption that is true of it must not raise its loss."""
    image, text = unit(4, 0), unit(4, 1)
    text[1] = image[0]
    true = torch.eye(4, dtype=torch.bool)
    alone = clip_loss(image, text, torch.tensor(10.0), true)
    true[0, 1] = True
    assert clip_loss(image, text, torch.tensor(10.0), true) < alone


def test_gradients() -> None:
    image, text = unit(5, 0).requires_grad_(), unit(5, 1).requires_grad_()
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    true = positives(5)
    assert torch.autograd.gradcheck(lambda i, t, s: clip_loss(i, t, s, true), (image, text, scale))


def test_a_batch_in_which_everything_is_true_has_no_gradient() -> None:
    image = unit(3, 0).requires_grad_()
    loss = clip_loss(image, unit(3, 1), torch.tensor(5.0), torch.ones(3, 3, dtype=torch.bool))
    torch.autograd.backward(loss)
    assert loss.item() == 0
    assert image.grad is not None and not image.grad.any()


def test_scale_is_clamped() -> None:
    for value, expected in ((9.0, 100.0), (-3.0, 1.0), (2.0, float(np.exp(2.0)))):
        scale = torch.tensor(value)
        clamp_scale(scale)
        assert scale.exp().item() == pytest.approx(expected, rel=1e-5)


def test_metrics() -> None:
    similarity = np.array([[0.9, 0.1, 0.3], [0.2, 0.5, 0.5], [0.1, 0.2, 0.0]], dtype=np.float32)
    targets = np.array([0, 1, 2])
    assert top_k_accuracy(similarity, targets, 1) == pytest.approx(1 / 3)  # the tie counts against
    assert top_k_accuracy(similarity, targets, 2) == pytest.approx(2 / 3)
    true = np.array([[0, 0, 1], [1, 1, 0], [0, 0, 1]], dtype=bool)
    assert recall_at_k(similarity, true, (1, 2, 3)) == {
        1: 0.0,
        2: pytest.approx(2 / 3),
        3: pytest.approx(1.0),
    }
    a = np.array([[1, 0], [1, 1], [np.nan, 0]], dtype=np.float32)
    b = np.array([[2, 0], [-1, -1], [1, 0]], dtype=np.float32)
    np.testing.assert_allclose(row_cosines(a, b), [1, -1, np.nan], atol=1e-7)


def test_a_broken_model_has_no_accuracy() -> None:
    nan = np.full((4, 3), np.nan, dtype=np.float32)
    assert top_k_accuracy(nan, np.array([0, 1, 2, 0]), 5) == 0
    assert recall_at_k(nan, np.eye(4, 3, dtype=bool), (1, 10)) == {1: 0, 10: 0}
