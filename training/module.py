"""This file is where denoiser and text encoder become one module whose forward pass is the loss.

One module, because DeepSpeed takes one model, and because ZeRO-3 gathers weights in hooks of the forward pass.

B rows, K prompts, C latent channels, H W latent size, L token ids of a prompt.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import nn

from training.conditioning import Conditioning, encode_text, predict
from training.criterion import Criterion
from training.dataplan import Role
from training.new_tokens import learned
from training.noise import NoiseProcess
from training.objective import PairBatch, dreambooth_loss
from training.objective_settings import Objective
from training.teacher import Teacher

UNET, TEXT_ENCODER, NEW_TOKENS = "unet", "text_encoder", "new_tokens"


class DreamBoothModule(nn.Module):
    """Denoiser and text encoder, trained on pairs.

    Text is encoded once per prompt and not once per row, and only once in a run when nothing in the text encoder is
    trained: then the encoder is not part of the module, which saves its memory too.

    Args:
        unet: Predicts; some of its parameters require a gradient.
        text_encoder: Encodes prompts; trained when any of its parameters requires a gradient.
        prompts: The token ids that rows may carry, int64 [K, L].
        schedule: Noise process of the base.
        prior_weight: Weight of the class term.
        autocast: Compute type of the forward pass; `None` is fp32. Parameters stay fp32.
        objective: Loss and weighting.
        teacher: Says what the base predicts, where the class's rows or what is outside of a mask hold on to that.
        teaches_class: Whether the class's rows do; else their target is the noise process, as for the subject's.
    """

    def __init__(
        self,
        unet: nn.Module,
        text_encoder: nn.Module,
        prompts: torch.Tensor,
        schedule: NoiseProcess,
        prior_weight: float,
        autocast: torch.dtype | None = None,
        objective: Objective = Objective(),
        teacher: Teacher | None = None,
        teaches_class: bool = False,
    ) -> None:
        super().__init__()
        self.criterion = Criterion(objective, schedule)
        self.teacher, self.teaches_class = teacher, teaches_class
        self.unet = unet
        self.schedule = schedule
        self.prior_weight = prior_weight
        self.autocast = autocast
        trained = any(p.requires_grad for p in text_encoder.parameters())
        self.text_encoder = text_encoder if trained else None
        self.prompts: torch.Tensor
        self.text: torch.Tensor | None
        self.pooled: torch.Tensor | None
        self.register_buffer("prompts", prompts, persistent=False)
        with torch.no_grad():
            cached = None if trained else encode_text(text_encoder, prompts)
        self.register_buffer("text", cached.text if cached else None, persistent=False)
        self.register_buffer("pooled", cached.pooled if cached else None, persistent=False)

    def parameter_groups(self) -> Mapping[str, list[nn.Parameter]]:
        """Trained parameters of each part, in a fixed order; a part without any is left out."""
        parts = {UNET: self.unet, TEXT_ENCODER: self.text_encoder}
        groups = {
            name: [p for p in part.parameters() if p.requires_grad] for name, part in parts.items() if part
        }
        if self.text_encoder is not None and (tokens := learned(self.text_encoder)):
            own = cast(list[nn.Parameter], list(tokens.embeddings.values()))
            groups[TEXT_ENCODER] = [p for p in groups[TEXT_ENCODER] if not any(p is one for one in own)]
            groups[NEW_TOKENS] = own
        return {name: parameters for name, parameters in groups.items() if parameters}

    def recompute_activations(self) -> None:
        """Have the backward pass compute activations again instead of finding them kept: less memory, more time."""
        self.unet.enable_gradient_checkpointing()  # type: ignore[operator]
        if self.text_encoder is not None:
            self.text_encoder.activation_checkpointing_enable()  # type: ignore[operator]

    def forward(self, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """This batch's part of the loss, and of the subject's and the class's term (see `dreambooth_loss`)."""
        shown = batch.noise if batch.shown_noise is None else batch.shown_noise
        noisy = self.schedule.add_noise(batch.latents, shown, batch.timesteps)
        with self.computing(noisy.device):
            told = self._told()
            # each row looks up its own prompt, so neither the order of rows nor of roles can misalign them
            row = (batch.token_ids[:, None] == self.prompts).all(dim=2).int().argmax(dim=1)
            target, taught = self._targets(batch, noisy, row)
            asked = self.schedule.asked(batch.timesteps)
            prediction = predict(self.unet, noisy, asked, told[row].of_sizes(batch.sizes))
        losses = self.criterion.row_losses(prediction, target, batch.timesteps, batch.mask, taught)
        return dreambooth_loss(losses, batch.weight, batch.role, self.prior_weight)

    def _told(self) -> Conditioning:
        """What the prompts become, K rows."""
        if self.text_encoder is not None:
            return encode_text(self.text_encoder, self.prompts)
        assert self.text is not None  # cached exactly when there is no encoder
        return Conditioning(self.text, self.pooled)

    def _targets(
        self, batch: PairBatch, noisy: torch.Tensor, prompt: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What each row should come to, float32 [B, C, H, W], and outside of its mask, if that holds on to anything."""
        target = self.schedule.target(batch.latents, batch.noise, batch.timesteps)
        if self.teacher is None:
            return target, None
        of_class = batch.role == Role.CLASS
        asked = of_class if not self.criterion.mask_prior else torch.ones_like(of_class)
        sizes = None if batch.sizes is None else batch.sizes[asked]
        timesteps = self.schedule.asked(batch.timesteps[asked])
        said = self.teacher(noisy[asked], timesteps, prompt[asked], sizes)
        taught = torch.zeros_like(target).masked_scatter(asked.reshape(-1, 1, 1, 1), said)
        if self.teaches_class:
            target = torch.where(of_class.reshape(-1, 1, 1, 1), taught, target)
        return target, taught if self.criterion.mask_prior else None

    def computing(self, device: torch.device) -> AbstractContextManager[object]:
        """The context of the forward pass."""
        return nullcontext() if self.autocast is None else torch.autocast(device.type, self.autocast)
