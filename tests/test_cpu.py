"""What makes steps on a CPU faster changes no result."""

import copy
import platform
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from training.cpu import keep_memory, quicken

FAULTS = """
import resource, torch
from training.cpu import keep_memory
{first}
def touch():
    torch.empty(16 * 2**20).fill_(1.0)
for _ in range(10):
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(first: str) -> int:
    """Pages that were mapped anew for ten tensors of 64 MiB, one after the other."""
    made = subprocess.run(
        [sys.executable, "-c", FAULTS.format(first=first)], capture_output=True, text=True
    )
    assert not made.returncode, made.stderr
    return int(made.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_memory_that_was_freed_is_used_again() -> None:
    assert faults("") > 10 * faults("keep_memory()")


def test_it_can_be_asked_for_twice() -> None:
    keep_memory()
    keep_memory()


def gradients(conv: nn.Module, x: Tensor, precision: torch.dtype) -> list[Tensor]:
    """Output, and its gradients by input, weight and bias."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        y = conv(x)
    weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    found = torch.autograd.grad((y.float() * weights).sum(), [x, *conv.parameters()])
    return [y.float(), *found]


@pytest.mark.parametrize("size", [(17, 20), (16, 16), (9, 11)])
@pytest.mark.parametrize(
    "shape",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 5, "stride": 2, "padding": 2, "bias": True},
        {"kernel_size": 3, "stride": (1, 2), "padding": (0, 1)},
        {"kernel_size": 3, "stride": 3, "padding": 0},
        {"kernel_size": 7, "stride": 4, "padding": 3},
    ],
)
def test_outputs_and_gradients_are_those_of_the_convolution(
    shape: dict[str, object], size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    usual = nn.Conv2d(8, 8, groups=8, **{"bias": False, **shape})  # type: ignore[arg-type]
    quick = copy.deepcopy(usual)
    quicken(quick)
    assert type(quick) is not type(usual)
    x = torch.randn(2, 8, *size)
    exact = gradients(usual, x, torch.float32)
    assert all(map(torch.equal, gradients(quick, x, torch.float32), exact))
    rounded = gradients(usual, x, torch.bfloat16)
    for own, theirs, wanted in zip(
        gradients(quick, x, torch.bfloat16), rounded, exact, strict=True
    ):
        assert own.dtype == theirs.dtype
        # as near the exact values as what PyTorch computes in bfloat16
        scale = wanted.abs().max()
        assert (own - wanted).abs().max() <= (theirs - wanted).abs().max() + 0.01 * scale


def test_only_strided_depthwise_convolutions_are_turned() -> None:
    tower = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2),
        nn.Conv2d(8, 8, 3, 1, groups=8),
        nn.Conv2d(8, 16, 3, 2, groups=8),
        nn.Conv2d(16, 16, 3, 2, groups=16, dilation=2),
        nn.Conv2d(16, 16, 3, 2, groups=16, padding_mode="reflect"),
        nn.Conv2d(16, 16, 1, 2, padding=1, groups=16),
        nn.Conv2d(16, 16, 3, 2, groups=16),
    )
    before = tower.state_dict()
    quicken(tower)
    assert [type(layer) is nn.Conv2d for layer in tower] == [True] * 6 + [False]
    assert list(tower.state_dict()) == list(before)
