"""Fine-tuning that keeps what the model could: a guard on other data, and mixing with the start."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.errors import GateFailed

ALPHAS = tuple(i / 10 for i in range(11))
Figures = dict[str, float]


@dataclass
class Guard:
    """Zero-shot top-1 on data that the model is not trained on must not fall more than `drop`
    below the start's."""

    start: float
    drop: float

    def holds(self, top1: float) -> bool:
        """Whether the model may go on."""
        return top1 >= self.start - self.drop


def mix(
    start: Mapping[str, Tensor], trained: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """WiSE-FT (Wortsman et al. 2022, arXiv:2109.01903): (1 - alpha) * start + alpha * trained, in
    weight space; what is not a floating-point number is taken from the trained weights."""
    return {
        name: torch.lerp(start[name].to(own.device), own, alpha) if own.is_floating_point() else own
        for name, own in trained.items()
    }


def curve(
    start: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    measure: Callable[[dict[str, Tensor]], Figures],
) -> list[Figures]:
    """What each mixture from start (alpha 0) to trained (alpha 1) reaches."""
    return [{"alpha": a, **measure(mix(start, trained, a))} for a in ALPHAS]


def no_epoch_holds(guard: Guard, top1: float) -> GateFailed:
    """The error of a run whose very first epoch loses too much."""
    return GateFailed(
        f"after the first epoch the zero-shot accuracy on --guard fell from {guard.start:.1%} to "
        f"{top1:.1%}, more than --guard-drop {guard.drop:g} allows; nothing was written. Try a "
        "smaller --lr, --lock-text, or --wise-ft 0.5"
    )


def mixture_fails(guard: Guard, top1: float, points: Sequence[Figures]) -> GateFailed:
    """The error of a mixture that loses too much; it names the largest alpha that does not."""
    held = [point["alpha"] for point in points if guard.holds(point["guard_top1"])]
    way_out = f"--wise-ft {max(held):g} would hold" if held else "no alpha holds"
    return GateFailed(
        f"the mixture's zero-shot accuracy on --guard is {top1:.1%}, the start's {guard.start:.1%}:"
        f" more than --guard-drop {guard.drop:g} is lost; {way_out}"
    )
