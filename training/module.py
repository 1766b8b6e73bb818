"""One training step on Lightning: the loss, AdamW, and a warm-up followed by a cosine."""

import math
from collections.abc import Callable
from typing import Any

from . import torchvision_ops as torchvision_ops  # before lightning, which imports torchvision

# isort: split
import lightning
import torch
from torch import Tensor

from runtime.errors import DataError

from .batches import Batch
from .evaluate import normalise
from .loss import clamp_scale, clip_loss, sigmoid_loss
from .model import ClipModel
from .options import TrainOptions


class ClipTraining(lightning.LightningModule):
    """Contrastive training of one model.

    `end_epoch(epoch, mean loss)` is called after each epoch, with the model in evaluation mode.
    """

    def __init__(
        self, clip: ClipModel, options: TrainOptions, end_epoch: Callable[[int, float], None]
    ) -> None:
        super().__init__()
        self.clip, self.model, self.options = clip, clip.model, options
        self._end_epoch = end_epoch
        self._losses: list[Tensor] = []

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """The contrastive loss of one batch; the sigmoid one where the model has a bias."""
        model = self.model
        image = model.encode_image(normalise(batch.frames, self.clip.image), normalize=True)
        text = model.encode_text(batch.tokens, normalize=True)
        scale = model.logit_scale.exp()
        if model.logit_bias is None:
            loss = clip_loss(image, text, scale, batch.positives)
        else:
            loss = sigmoid_loss(image, text, scale, model.logit_bias, batch.positives)
        self._losses.append(loss.detach())
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        clamp_scale(self.model.logit_scale)

    def on_train_epoch_end(self) -> None:
        loss = torch.stack(self._losses).mean().item()
        self._losses.clear()
        if not math.isfinite(loss):
            raise DataError(f"the loss became {loss}: try a smaller --lr, or --precision fp32")
        self.model.eval()
        self._end_epoch(self.current_epoch, loss)
        self.model.train()

    def configure_optimizers(self) -> Any:
        """AdamW, and the learning rate's warm-up and cosine, a step at a time."""
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, self.options.weight_decay),
            lr=self.options.lr,
            betas=(0.9, 0.98),
            eps=1e-6,
        )
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = max(1, round(steps * self.options.warmup))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate(step, warmup, steps)
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def learning_rate(step: int, warmup: int, steps: int) -> float:
    """The factor on the learning rate: linear to 1 over `warmup` steps, then a half cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1, (step - warmup) / max(1, steps - warmup))))


def parameter_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices and kernels; none on biases, norms, embeddings and scales."""
    exempt = model.no_weight_decay()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = [p for n, p in named if p.ndim < 2 or n in exempt]
    decayed = [p for n, p in named if not (p.ndim < 2 or n in exempt)]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
