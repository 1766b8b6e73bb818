"""The weights in training: the optimiser's steps, the averages, and the state of it all."""

import math
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from runtime.errors import DataError

from .average import Average
from .batches import Batch
from .cpu import quicken
from .distill_objective import DistillObjective
from .groups import parameter_groups, set_training
from .loss import MAX_SCALE, clamp_scale
from .model import ClipModel
from .objective import Objective
from .options import TrainOptions
from .step import Step
from .towers import Towers

_NAMED = 4


class Run:
    """One model in training on an objective, `total` steps long; `number` steps are done."""

    def __init__(
        self,
        fabric: Fabric,
        clip: ClipModel,
        towers: Towers,
        options: TrainOptions,
        total: int,
        objective: Objective | DistillObjective,
    ) -> None:
        self.fabric, self.clip, self.options = fabric, clip, options
        self.number, self.total = 0, total
        self._warmup = max(1, round(total * options.warmup))
        self.objective = objective.to(fabric.device)
        self.ema = Average(towers, options.ema).to(fabric.device) if options.ema else None
        self.slow = None
        if self.objective.momentum:
            self.slow = Average(towers, options.momentum, ramp=False).to(fabric.device)
        set_training(towers, options.freeze_bn or options.qat)
        if fabric.device.type == "cpu":
            quicken(towers)
        self.towers: Any = fabric.setup_module(towers)
        self._plain = towers
        self._most = max(MAX_SCALE, 1 / self.temperature())  # SigLIPs begin with more
        self.optimizer: Any = fabric.setup_optimizers(self._adamw())
        self.step = Step(
            fabric, self.towers, self.objective, self.slow, options.micro_batch, options.seed
        )

    def _adamw(self) -> torch.optim.Optimizer:
        options = self.options
        groups = parameter_groups(
            self.clip, options.lr, options.weight_decay, options.image_lr, options.layer_decay
        )
        if self._plain.classifier:
            own = {"params": list(self._plain.classifier.parameters()), "weight_decay": 0.0}
            groups.append(own | {"lr": options.lr, "names": ["classifier"]})
        for group in groups:
            group["peak"] = group["lr"]
            del group["names"]
        fused = self.options.precision != "fp16"  # whose scaler clips gradients by itself
        return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=fused)

    def advance(self, batch: Batch) -> dict[str, float]:
        """One step on the own pairs of a batch; returns its figures.

        Raises DataError, naming the pictures, where the loss or the gradient is not finite.
        """
        factor = learning_rate(self.number, self._warmup, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        if self.slow:
            self.slow.update(self._plain)
        result = self.step.backward(batch.to(self.fabric.device), self.number)
        norm = self.fabric.clip_gradients(
            self.towers,
            self.optimizer,
            max_norm=self.options.grad_clip,
            error_if_nonfinite=False,
        )
        mean: Any = self.fabric.all_reduce(result.loss, reduce_op="mean")
        loss = float(mean)
        self._check_finite(loss, norm, batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self._logit_scale().requires_grad:
            clamp_scale(self._logit_scale(), self._most)
        if self.ema:
            self.ema.update(self._plain)
        self.number += 1
        return {
            "loss": loss,
            "lr": self.options.lr * factor,
            "temperature": self.temperature(),
            "accuracy": result.accuracy.item(),
        }

    def _check_finite(self, loss: float, norm: Any, batch: Batch) -> None:
        """Where fp16's gradient overflows its scaler leaves the step out, and scales down: there it
        is a fault when nothing is left to scale down."""
        scaler = getattr(self.fabric._precision, "scaler", None)
        sound = math.isfinite(float(norm)) if scaler is None else scaler.get_scale() >= 1
        if math.isfinite(loss) and sound:
            return
        what = "the gradient is not finite" if math.isfinite(loss) else f"the loss became {loss}"
        names = ", ".join(batch.names[:_NAMED])
        more = f" and {len(batch.names) - _NAMED} more" if len(batch.names) > _NAMED else ""
        everyone = self.options.run / f"batch-{self.fabric.global_rank}.txt"
        everyone.parent.mkdir(parents=True, exist_ok=True)
        everyone.write_text("\n".join(batch.names) + "\n", "utf-8", "replace")
        raise DataError(
            f"{what} at step {self.number + 1}, on the batch of {names}{more} (all of them in "
            f"{everyone}): look at these, or try a smaller --lr, or --precision fp32"
        )

    def _logit_scale(self) -> Tensor:
        scale: Tensor = self.clip.model.logit_scale
        return scale

    def temperature(self) -> float:
        """The softmax temperature, 1 / scale."""
        scale: Any = self._logit_scale().detach()
        whole = scale.full_tensor() if hasattr(scale, "full_tensor") else scale
        return float(torch.exp(-whole))

    @property
    def _sharded(self) -> bool:
        return self.fabric.world_size > 1 and self.options.strategy == "fsdp"

    def weights(self) -> dict[str, Tensor]:
        """The model's weights to evaluate and to write: the averaged ones with --ema. All
        processes must call it together."""
        if self.ema:
            found: dict[str, Tensor] = self.ema.module.model.state_dict()  # type: ignore[union-attr]
            return found
        if self._sharded:
            whole: Any = get_model_state_dict(self.clip.model, options=_WHOLE)
            return {k: v.reshape(()) if k.startswith("logit_") else v for k, v in whole.items()}
        own: dict[str, Tensor] = self.clip.model.state_dict()
        return own

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on. All processes must call it together."""
        if self._sharded:
            model: Any = get_model_state_dict(self._plain, options=_WHOLE)
            optimizer: Any = get_optimizer_state_dict(
                self._plain, self.optimizer.optimizer, options=_WHOLE
            )
        else:
            model, optimizer = _own(self._plain), self.optimizer.state_dict()
        return {
            "step": self.number,
            "model": model,
            "optimizer": optimizer,
            "objective": self.objective.state_dict(),
            "ema": _own(self.ema) if self.ema else {},
            "slow": _own(self.slow) if self.slow else {},
            "scaler": self.fabric._precision.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes up a run of the same options where `state` was taken."""
        self.number = state["step"]
        if self._sharded:
            set_model_state_dict(self._plain, state["model"], options=_WHOLE)
            set_optimizer_state_dict(
                self._plain, self.optimizer.optimizer, state["optimizer"], options=_WHOLE
            )
        else:
            self._plain.load_state_dict(state["model"], strict=False)
            self.optimizer.load_state_dict(state["optimizer"])
        self.objective.load_state_dict(state["objective"])
        for average, name in ((self.ema, "ema"), (self.slow, "slow")):
            if average:
                average.load_state_dict(state[name], strict=False)
        self.fabric._precision.load_state_dict(state["scaler"])


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=False)


def _own(module: torch.nn.Module) -> dict[str, Tensor]:
    """A module's state, without the `rest` that shares the weights of the model."""
    state = module.state_dict()
    return {k: v for k, v in state.items() if not k.startswith(("rest.", "module.rest."))}


def learning_rate(step: int, warmup: int, steps: int) -> float:
    """The factor on the learning rate: linear to 1 over `warmup` steps, then a half cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1, (step - warmup) / max(1, steps - warmup))))
