"""This file is where the slots of a bank are updated: AdamW, every slot by its own learning rate, decay and norm.

K slots.
"""

from collections.abc import Mapping

import torch
from torch.optim.adamw import adamw

from training.bank_adapters import Adapters
from training.rates import learning_rate
from training.recipe import Train

# torch's defaults, which a run trained alone has too
_BETAS, _EPS = (0.9, 0.999), 1e-8


class BankAdam:
    """The optimizer of a bank. What one slot does never shows in another.

    Args:
        adapters: Updated in place.
    """

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters
        slots, device = len(adapters.values), adapters.values.device
        self._counts = list(torch.zeros(slots, device=device))

    def resume(self, slot: int, step: int) -> None:
        """Say how many steps a slot has behind it."""
        self._counts[slot].fill_(step)

    def step(self, steps: Mapping[int, tuple[Train, int]]) -> torch.Tensor:
        """Update some slots by their gradients; the others stay as they are.

        Args:
            steps: The recipe and the step (from 0) of each slot that is updated.

        Returns:
            The norm of each slot's gradient before clipping, float32 [K].
        """
        of, norms = self._adapters, self._adapters.norms()
        for slot, (train, step) in steps.items():
            scale = None
            if train.max_grad_norm is not None:
                # 1e-6 as torch's; a gradient is divided as it is read, which saves a pass over all of them
                scale = ((norms[slot] + 1e-6) / train.max_grad_norm).clamp(min=1.0)
            adamw(
                [of.values[slot]],
                [of.gradients[slot]],
                [of.first_moments[slot]],
                [of.second_moments[slot]],
                [],
                [self._counts[slot]],
                fused=True,
                grad_scale=scale,
                amsgrad=False,
                beta1=_BETAS[0],
                beta2=_BETAS[1],
                lr=learning_rate(train.lr, step, train),
                weight_decay=train.weight_decay,
                eps=_EPS,
                maximize=False,
            )
        return norms
