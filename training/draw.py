"""This file is where images are drawn: rows denoised together at a fixed width, with guidance in one forward.

A row's bits depend on its request and on the width alone, neither on its neighbours nor on its position: the
UNet always sees as many rows as the width asks for, each prompt is encoded alone, and each image decoded alone.

W width, C latent channels, H W latent size, L tokens, D text width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cluster.errors import UserError
from training.lora import FILE as LORA_FILE
from training.lora import detach, load_lora
from training.pipeline import (
    BaseInfo,
    decode_latents,
    encode_text,
    load_text_encoder,
    load_tokenizer,
    load_unet,
    load_vae,
    predict,
    token_ids,
)
from training.request import DrawRequest
from training.samplers import SamplerTable, advance, sampler_table
from training.schedule import NoiseSchedule

# Parameters of a UNet below which threads wait for each other longer than they work (pocket: 10 s on two, 3 s on one)
SMALL = 50_000_000
DRAW_WIDTH = {"cpu": 4, "cuda": 8}  # rows of images; part of what the bits depend on


class Drawer:
    """Draws images of the pristine base, or of one artifact of it after the other.

    Args:
        base: What is drawn with.
        artifact: Local folder of an artifact; `None` for the pristine base.
        manifest: The artifact's; its base must be `base`.
        device: `cpu`, `cuda`, or `auto`.
        width: W; `None` takes the device's (`DRAW_WIDTH`).

    Raises:
        UserError: The artifact was trained from another base.
    """

    def __init__(
        self,
        base: BaseInfo,
        artifact: Path | None = None,
        manifest: Mapping[str, Any] | None = None,
        device: str = "auto",
        width: int | None = None,
    ) -> None:
        self.base = base
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.width = width or DRAW_WIDTH[torch.device(self.device).type]
        self._pristine = False  # whether the models are the base's, with or without adapters
        self.wear(artifact, manifest)
        self.vae = load_vae(base).to(self.device)
        self.tokenizer = load_tokenizer(base)
        self.schedule = NoiseSchedule.from_config(base.scheduler)

    def wear(self, artifact: Path | None, manifest: Mapping[str, Any] | None = None) -> None:
        """Draw with another artifact from here on. What does not differ from the last one is not loaded again.

        Args:
            artifact: Local folder of an artifact; `None` for the pristine base.
            manifest: The artifact's; its base must be `base`.

        Raises:
            UserError: The artifact was trained from another base.
            SystemFailure: It does not fit the base.
        """
        trained_from = manifest["base"]["revision"] if manifest else self.base.revision
        if trained_from != self.base.revision:
            raise UserError(
                "the artifact was trained from another base",
                f"from revision {trained_from}, and {self.base.model} is {self.base.revision}",
                "draw it with the base it was trained from",
            )
        is_lora = artifact is not None and (artifact / LORA_FILE).is_file()
        if artifact and not is_lora:
            self._pristine = False
            self._load(replace(self.base, path=artifact))
        elif not self._pristine:
            self._load(self.base)
            self._pristine = True
        else:
            detach(self.unet)
            detach(self.text_encoder)
        if artifact and is_lora:
            load_lora(self.unet, self.text_encoder, artifact)

    def _load(self, source: BaseInfo) -> None:
        unet, text_encoder = load_unet(source), load_text_encoder(source)
        if self.device == "cpu" and sum(p.numel() for p in unet.parameters()) < SMALL:
            torch.set_num_threads(1)
        self.unet, self.text_encoder = unet.to(self.device), text_encoder.to(self.device)

    @torch.inference_mode()
    def draw(
        self, requests: Sequence[DrawRequest], on_step: Callable[[int, int], None] | None = None
    ) -> list[NDArray[np.uint8]]:
        """Images [height, width, 3] uint8, in the order of the requests.

        Args:
            requests: Any mixture of prompts, samplers, steps and guidance.
            on_step: Called with the denoising steps done and in all.

        Raises:
            UserError: A prompt is too long, or a sampler cannot do what is asked.
        """
        texts = self._encode({text for r in requests for text in (r.prompt, r.negative_prompt)})
        tables = [sampler_table(r.sampler, r.steps, self.base.scheduler, r.eta) for r in requests]
        # Rows without guidance go together: a forward of W rows rather than 2 W, whoever the neighbours are.
        chunks = [
            group[start : start + self.width]
            for unguided in (False, True)
            for group in [[i for i, r in enumerate(requests) if (r.guidance == 1.0) is unguided]]
            for start in range(0, len(group), self.width)
        ]
        lengths = [max(len(tables[i]) for i in chunk) for chunk in chunks]
        images: dict[int, NDArray[np.uint8]] = {}
        for number, chunk in enumerate(chunks):
            before = sum(lengths[:number])

            def report(step: int, before: int = before) -> None:
                if on_step:
                    on_step(before + step, sum(lengths))

            latents = self._denoise([requests[i] for i in chunk], [tables[i] for i in chunk], texts, report)
            images |= {
                i: pixels(self.vae, row, self.base.scaling_factor)
                for i, row in zip(chunk, latents, strict=False)
            }
        return [images[i] for i in range(len(requests))]

    def _denoise(
        self,
        requests: Sequence[DrawRequest],
        tables: Sequence[SamplerTable],
        texts: Mapping[str, torch.Tensor],
        report: Callable[[int], None],
    ) -> torch.Tensor:
        """Clean latents [W, C, H, W] of up to W requests; the rows after theirs are padding."""
        rows = [min(row, len(requests) - 1) for row in range(self.width)]
        shape = (self.base.latent_channels, self.base.latent_size, self.base.latent_size)
        generators = [torch.Generator("cpu").manual_seed(requests[row].seed) for row in rows]
        guided = requests[0].guidance != 1.0
        prompts = [requests[row].prompt for row in rows]
        if guided:
            prompts = [requests[row].negative_prompt for row in rows] + prompts
        text = torch.cat([texts[prompt] for prompt in prompts])
        scale = torch.tensor([requests[row].guidance for row in rows], device=self.device).reshape(
            -1, 1, 1, 1
        )

        x = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)
        x0 = torch.zeros_like(x)
        for step in range(max(map(len, tables))):
            now = [_at(tables[row], step) for row in rows]
            timesteps = torch.tensor([t for t, _, _ in now], device=self.device)
            alphas = torch.tensor([a for _, a, _ in now], dtype=torch.float32, device=self.device)
            coefficients = torch.tensor(np.stack([c for _, _, c in now]), dtype=torch.float32)
            noise = torch.stack(
                [
                    torch.randn(shape, generator=g) if tables[row].stochastic else torch.zeros(shape)
                    for row, g in zip(rows, generators, strict=True)
                ]
            ).to(self.device)
            if guided:
                both = predict(self.unet, torch.cat([x, x]), torch.cat([timesteps, timesteps]), text)
                without, conditioned = both.chunk(2)
                output = without + scale * (conditioned - without)
            else:
                output = predict(self.unet, x, timesteps, text)
            x0, previous = self.schedule.clean(output, x, alphas), x0
            x = advance(x, x0, previous, noise, coefficients.to(self.device))
            report(step + 1)
        return x

    def _encode(self, prompts: set[str]) -> dict[str, torch.Tensor]:
        """Hidden states [1, L, D] of each prompt, encoded alone."""
        ids = {p: token_ids(self.tokenizer, [p], self.base.token_limit) for p in sorted(prompts)}
        return {prompt: encode_text(self.text_encoder, row.to(self.device)) for prompt, row in ids.items()}


def pixels(vae: nn.Module, latents: torch.Tensor, scaling_factor: float) -> NDArray[np.uint8]:
    """The image [height, width, 3] uint8 of one row [C, H, W] of scaled latents, rounded as diffusers rounds."""
    image = decode_latents(vae, latents[None], scaling_factor)[0]
    unit = (image / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).float().cpu().numpy()
    return (unit * 255).round().astype(np.uint8)


def _at(table: SamplerTable, step: int) -> tuple[int, float, NDArray[np.float64]]:
    """Timestep, alpha and coefficients of a step; a row that is done keeps its x."""
    if step < len(table):
        return int(table.timesteps[step]), float(table.alphas[step]), table.coefficients[step]
    return int(table.timesteps[-1]), float(table.alphas[-1]), np.array([1.0, 0.0, 0.0, 0.0])
