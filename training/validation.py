"""This file is where the validation loss is: that of fixed images, noise and timesteps, comparable between steps."""

from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from training.batches import Batches
from training.engine import TrainingEngine


@dataclass(frozen=True)
class ValidationLoss:
    """The terms of the loss apart, and what is minimised."""

    loss: float
    """`loss_subject + prior_weight * loss_class`."""
    loss_subject: float
    loss_class: float

    def as_json(self) -> dict[str, float]:
        """What the event holds besides the step."""
        return asdict(self)


def validation_loss(engine: TrainingEngine, batches: Batches, samples: int) -> ValidationLoss:
    """The validation loss of `samples` pairs, of the weights that would be published; all ranks call this together.

    Nothing of the training changes by it, not one bit.
    """
    parts = torch.zeros(3, device=batches.device)
    with engine.evaluating():
        for batch in batches.of_validation(samples):
            parts += torch.stack(engine.module(batch))
    if batches.world > 1:
        dist.all_reduce(parts)
    loss, subject, of_class = parts.tolist()
    return ValidationLoss(loss, subject, of_class)
