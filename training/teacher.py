"""This file is where the pristine base says what it would have predicted: the class term without class images."""

from dataclasses import dataclass

import torch
from torch import nn

from training.conditioning import Conditioning, encode_text, predict


@dataclass(frozen=True)
class Teacher:
    """The pristine base. No module, so that nothing of it is trained, sharded or saved with what is."""

    unet: nn.Module
    told: Conditioning
    """Of the K prompts that rows may carry, by its own text encoder."""

    @classmethod
    def of(cls, unet: nn.Module, text_encoder: nn.Module, prompts: torch.Tensor) -> "Teacher":
        """The teacher of a base, frozen.

        Args:
            unet: Of the pristine base.
            text_encoder: Likewise.
            prompts: Token ids, int64 [K, L].
        """
        with torch.no_grad():
            return cls(unet, encode_text(text_encoder, prompts))

    @torch.no_grad()
    def __call__(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        prompt: torch.Tensor,
        sizes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the base predicts, float32 [B, C, H, W].

        Args:
            noisy: [B, C, H, W].
            timesteps: [B], what the noise process asks it by.
            prompt: int64 [B], the prompt of each row.
            sizes: float32 [B, 6], of a base that is told them.
        """
        return predict(self.unet, noisy, timesteps, self.told[prompt].of_sizes(sizes)).float()
