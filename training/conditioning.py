"""This file is where a base's conditioning is: what a denoiser is told beside the latents, row by row.

A prompt becomes token ids (those of each tokenizer, one after the other), and those become a `Conditioning`. Stable
Diffusion 1.x/2.x is told the hidden states of one text encoder. SDXL is told those of two, side by side, a pooled
embedding of the second, and sizes (arXiv 2307.01952, section 2.2). SD3 is told those of two CLIPs, side by side, and
those of a T5 after them, and what both CLIPs pool (arXiv 2403.03206, section 4).

B rows, L tokens of a tokenizer, D text width, P pooled width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from training.basekind import DENOISERS

SILENT = -1
"""The id that fills the row of a prompt that is not said at all: zeros instead of what the empty prompt becomes."""


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told of each row."""

    text: torch.Tensor
    """[B, L, D], hidden states."""
    pooled: torch.Tensor | None = None
    """[B, P], of a base that is told it."""
    sizes: torch.Tensor | None = None
    """float32 [B, 6], in pixels, of a base that is told them: height and width of the picture that a row was made of,
    top and left of the part that it shows, height and width of the row itself."""

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, rows: Any) -> "Conditioning":
        """Some of the rows, as a tensor is indexed."""
        return self.map(lambda column: column[rows])

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Conditioning":
        """The same change of every column."""
        columns = (None if c is None else change(c) for c in (self.text, self.pooled, self.sizes))
        return Conditioning(
            *cast(tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None], tuple(columns))
        )

    def copy_(self, other: "Conditioning") -> None:
        """Put the values of `other` into these columns."""
        for name in ("text", "pooled", "sizes"):
            if (column := getattr(self, name)) is not None:
                column.copy_(getattr(other, name))

    def of_sizes(self, sizes: torch.Tensor | None) -> "Conditioning":
        """With the sizes of each row; `None` for a base that is told none."""
        return Conditioning(self.text, self.pooled, sizes)

    @classmethod
    def cat(cls, parts: Sequence["Conditioning"], dim: int = 0) -> "Conditioning":
        """The rows of all parts, in order."""
        first = parts[0]
        columns = [
            None if getattr(first, name) is None else torch.cat([getattr(part, name) for part in parts], dim)
            for name in ("text", "pooled", "sizes")
        ]
        return cls(*cast(list[Any], columns))

    @property
    def arguments(self) -> dict[str, Any]:
        """What diffusers' models take beside latents and timesteps.

        Of the two that are told pooled text the `SD3Transformer2DModel` is the one that is told no sizes.
        """
        told: dict[str, Any] = {"encoder_hidden_states": self.text}
        if self.pooled is not None and self.sizes is None:
            told["pooled_projections"] = self.pooled
        elif self.pooled is not None:
            told["added_cond_kwargs"] = {"text_embeds": self.pooled, "time_ids": self.sizes}
        return told


class TwinEncoder(nn.Module):
    """The two text encoders of SDXL as one module, so that it is trained, sharded and saved as one.

    Args:
        text_encoder: A `CLIPTextModel`.
        text_encoder_2: A `CLIPTextModelWithProjection`.
    """

    def __init__(self, text_encoder: nn.Module, text_encoder_2: nn.Module) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2

    @property
    def clips(self) -> dict[str, nn.Module]:
        """The encoders that may be trained, by their parts, in the order in which they read a prompt."""
        return {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}

    def forward(self, ids: torch.Tensor) -> Conditioning:
        """What prompts become: the last hidden states but one of both, and the pooled embedding of the second.

        Args:
            ids: [B, 2 L] int64, of the two tokenizers; rows of `SILENT` become zeros.

        Source:
            `encode_prompt` of diffusers' `StableDiffusionXLPipeline`.
        """
        silent = ids[:, :1] == SILENT
        first, second = (
            model(half, output_hidden_states=True)
            for model, half in zip(self.clips.values(), ids.clamp(min=0).chunk(2, dim=1), strict=True)
        )
        text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return Conditioning(text.masked_fill(silent[:, :, None], 0), second[0].masked_fill(silent, 0))

    def activation_checkpointing_enable(self) -> None:
        """As that of transformers' models."""
        for model in self.clips.values():
            cast(Any, model).activation_checkpointing_enable()


class JointEncoder(TwinEncoder):
    """The text encoders of SD3 as one module. Its T5 is never trained.

    Args:
        text_encoder: A `CLIPTextModelWithProjection`.
        text_encoder_2: Another one.
        text_encoder_3: A `T5EncoderModel`; `None` reads nothing, and its hidden states are zeros.
        clip_tokens: Tokens of a prompt in each CLIP.
        t5_tokens: Tokens of a prompt in a T5.
        width: That of T5, to which the CLIPs' hidden states are filled up with zeros.
    """

    def __init__(
        self,
        text_encoder: nn.Module,
        text_encoder_2: nn.Module,
        text_encoder_3: nn.Module | None,
        clip_tokens: int,
        t5_tokens: int,
        width: int,
    ) -> None:
        super().__init__(text_encoder, text_encoder_2)
        self.text_encoder_3 = text_encoder_3
        self._clip_tokens, self._t5_tokens, self._width = clip_tokens, t5_tokens, width

    def train(self, mode: bool = True) -> "JointEncoder":
        """As of every module; T5 stays in eval mode, as it would drop values out."""
        super().train(mode)
        if self.text_encoder_3 is not None:
            self.text_encoder_3.eval()
        return self

    def forward(self, ids: torch.Tensor) -> Conditioning:
        """What prompts become: the last hidden states but one of the CLIPs, T5's last ones, and what the CLIPs pool.

        Args:
            ids: [B, 2 L] int64 of the CLIPs' tokenizers, and T5's after them if it is there.

        Source:
            `encode_prompt` of diffusers' `StableDiffusion3Pipeline`.
        """
        one, two, rest = ids.tensor_split((self._clip_tokens, 2 * self._clip_tokens), dim=1)
        first, second = (
            model(part, output_hidden_states=True)
            for model, part in zip(self.clips.values(), (one, two), strict=True)
        )
        clips = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        clips = nn.functional.pad(clips, (0, self._width - clips.shape[-1]))
        if self.text_encoder_3 is None:
            read = clips.new_zeros(len(ids), self._t5_tokens, self._width)
        else:
            with torch.no_grad():
                read = self.text_encoder_3(rest)[0]
        pooled = torch.cat([first[0], second[0]], dim=-1)
        return Conditioning(torch.cat([clips, read.to(clips.dtype)], dim=1), pooled)


def encode_text(text_encoder: nn.Module, ids: torch.Tensor) -> Conditioning:
    """What prompts become, as stock diffusers computes it; without sizes.

    Args:
        text_encoder: A base's, of `load_text_encoder`.
        ids: [B, ids of a prompt] int64, of `token_ids`.
    """
    told = text_encoder(ids)
    return told if isinstance(told, Conditioning) else Conditioning(told[0])


def predict(
    unet: nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, told: Conditioning
) -> torch.Tensor:
    """The denoiser's output [B, C, H, W] for noisy latents.

    Args:
        unet: Of `load_unet`.
        latents: [B, C, H, W], scaled.
        timesteps: [B], what the noise process asks it by.
        told: Of B rows.
    """
    return cast(torch.Tensor, unet(latents, timestep=timesteps, return_dict=False, **told.arguments)[0])


def text_parts(text_encoder: nn.Module) -> dict[str, nn.Module]:
    """The models of a base's text encoder that may be trained, by the names of their parts."""
    return text_encoder.clips if isinstance(text_encoder, TwinEncoder) else {"text_encoder": text_encoder}


def never_trained(text_encoder: nn.Module) -> list[nn.Parameter]:
    """The parameters of a base's text encoder that no run trains: a T5's."""
    third = text_encoder.text_encoder_3 if isinstance(text_encoder, JointEncoder) else None
    return [] if third is None else list(third.parameters())


def leave_unread(text_encoder: nn.Module) -> None:
    """Have what nobody reads or trains of a base's text encoder require no gradient: it would get none."""
    if isinstance(text_encoder, JointEncoder):
        for parameter in never_trained(text_encoder):
            parameter.requires_grad_(False)
    elif isinstance(text_encoder, TwinEncoder):
        first = cast(Any, text_encoder.text_encoder)
        for part in (first.encoder.layers[-1], first.final_layer_norm):
            part.requires_grad_(False)


def trained_parts(unet: nn.Module, text_encoder: nn.Module) -> dict[str, nn.Module]:
    """The models of a base that can be trained by the names of their parts; the denoiser is the first."""
    return {denoiser_part(unet): unet, **text_parts(text_encoder)}


def denoiser_part(unet: nn.Module) -> str:
    """The part of a base that a denoiser is."""
    return DENOISERS[type(unet).__name__]


def whole_frame(height: int, width: int) -> tuple[int, ...]:
    """The sizes of a picture that is all there and as large as it was made; see `Conditioning.sizes`."""
    return (height, width, 0, 0, height, width)
