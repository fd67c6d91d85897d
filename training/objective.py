"""This file is where the DreamBooth loss is written down: mean(subject) + prior_weight * mean(class).

B rows, C latent channels, H W latent size, L tokens.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch

from training.dataplan import Role


@dataclass(frozen=True)
class PairBatch:
    """Rows of one forward pass. Every row carries its own prompt, role and weight, so their order means nothing."""

    latents: torch.Tensor
    """float32 [B, C, H, W], scaled."""
    noise: torch.Tensor
    """float32 [B, C, H, W], standard normal."""
    timesteps: torch.Tensor
    """int64 [B]."""
    token_ids: torch.Tensor
    """int64 [B, L]."""
    role: torch.Tensor
    """int64 [B], a `Role`."""
    weight: torch.Tensor
    """float32 [B], the row's share of the global loss."""
    sample_index: torch.Tensor
    """int64 [B], what the row was drawn from."""
    shown_noise: torch.Tensor | None = None
    """float32 [B, C, H, W]: what is added in place of `noise`, which is still what is asked for."""
    mask: torch.Tensor | None = None
    """float32 [B, 1, H, W], 0 to 1: where the row shows what is learnt."""
    sizes: torch.Tensor | None = None
    """float32 [B, 6] of a base that is told them: `Conditioning.sizes`."""

    def to(self, device: torch.device) -> "PairBatch":
        """The batch on `device`; itself when it is there already."""
        if self.latents.device == device:
            return self
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            name: None if column is None else column.to(device, non_blocking=True)
            for name, column in columns.items()
        }
        return PairBatch(**moved)


def dreambooth_loss(
    losses: torch.Tensor, weight: torch.Tensor, role: torch.Tensor, prior_weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch's part of the loss, and of its two terms apart.

    Because the weights hold 1/P and prior_weight/P with P the pairs of the whole step, the parts of all micro-batches
    and ranks add up to the loss of the step, whatever their sizes.

    Args:
        losses: Row losses, float32 [B].
        weight: Weights, float32 [B].
        role: Roles, int64 [B].
        prior_weight: Weight of the class term, taken out of its logged part again.

    Returns:
        The loss with its gradient; the subject's and the class's part, detached and without the prior weight.

    Source:
        Ruiz et al., DreamBooth (2023), equation 2.
    """
    weighted = losses * weight
    total = weighted.sum()
    is_class = (role == Role.CLASS).float()
    parts = weighted.detach()
    of_class = torch.dot(parts, is_class)
    return total, torch.dot(parts, 1.0 - is_class), of_class / prior_weight if prior_weight > 0 else of_class
