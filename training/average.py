"""A copy of a network that follows it slowly: the mean of its weights over the last steps."""

import copy

import torch
from torch import nn


class Average(nn.Module):
    """Exponential moving average of a module's parameters; buffers are copied.

        average <- decay * average + (1 - decay) * weights

    With `ramp` the decay starts small and rises, min(decay, (1 + t) / (10 + t)) after t updates,
    so that the random start is soon forgotten. It is what evaluation and export see with `--ema`,
    and, without the ramp, the momentum encoder of ALBEF (Li et al. 2021, arXiv:2107.07651).
    """

    updates: torch.Tensor

    def __init__(self, module: nn.Module, decay: float, ramp: bool = True) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay, self.ramp = decay, ramp
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Moves the average towards `module`, which has the same layout."""
        t = int(self.updates)
        decay = min(self.decay, (1 + t) / (10 + t)) if self.ramp else self.decay
        mine = [p.detach() for p in self.module.parameters()]
        its = [p.detach() for p in module.parameters()]
        torch._foreach_lerp_(mine, its, 1 - decay)
        for own, other in zip(self.module.buffers(), module.buffers(), strict=True):
            own.copy_(other)
        self.updates += 1
