"""This file is where a base's conditioning is: what a UNet is told beside the latents, row by row.

A prompt becomes token ids (those of each tokenizer, one after the other), and those become a `Conditioning`. Stable
Diffusion 1.x/2.x is told the hidden states of one text encoder. SDXL is told those of two, side by side, a pooled
embedding of the second, and sizes (arXiv 2307.01952, section 2.2).

B rows, L tokens of a tokenizer, D text width, P pooled width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

SILENT = -1
"""The id that fills the row of a prompt that is not said at all: zeros instead of what the empty prompt becomes."""


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told of each row."""

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
        """What diffusers' `UNet2DConditionModel` takes beside latents and timesteps."""
        told: dict[str, Any] = {"encoder_hidden_states": self.text}
        if self.pooled is not None:
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
            for model, half in zip(self.children(), ids.clamp(min=0).chunk(2, dim=1), strict=True)
        )
        text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return Conditioning(text.masked_fill(silent[:, :, None], 0), second[0].masked_fill(silent, 0))

    def activation_checkpointing_enable(self) -> None:
        """As that of transformers' models."""
        for model in self.children():
            cast(Any, model).activation_checkpointing_enable()


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
    """The UNet's output [B, C, H, W] for noisy latents.

    Args:
        unet: Of `load_unet`.
        latents: [B, C, H, W], scaled.
        timesteps: [B] int64.
        told: Of B rows.
    """
    return cast(torch.Tensor, unet(latents, timesteps, return_dict=False, **told.arguments)[0])


def text_parts(text_encoder: nn.Module) -> dict[str, nn.Module]:
    """The models of a base's text encoder by the names of their parts."""
    if isinstance(text_encoder, TwinEncoder):
        return dict(text_encoder.named_children())
    return {"text_encoder": text_encoder}


def leave_unread(text_encoder: nn.Module) -> None:
    """Have what nobody reads of a base's text encoder require no gradient: it would get none, and has no moments."""
    if isinstance(text_encoder, TwinEncoder):
        first = cast(Any, text_encoder.text_encoder)
        for part in (first.encoder.layers[-1], first.final_layer_norm):
            part.requires_grad_(False)


def trained_parts(unet: nn.Module, text_encoder: nn.Module) -> dict[str, nn.Module]:
    """The models of a base that can be trained by the names of their parts."""
    return {"unet": unet, **text_parts(text_encoder)}


def whole_frame(height: int, width: int) -> tuple[int, ...]:
    """The sizes of a picture that is all there and as large as it was made; see `Conditioning.sizes`."""
    return (height, width, 0, 0, height, width)
