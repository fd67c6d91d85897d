"""This file is where images are denoised: a number of rows in a forward pass, each with everything its own.

Rows may differ in prompt, seed, timestep, sampler, number of steps, guidance and adapter; they may join and leave
between two steps. A row's bits depend on its request, on what it wears and on W alone, neither on its neighbours nor
on when it joined: the UNet always sees W rows, each prompt is encoded alone, and each image decoded alone. Whoever
would rather have an image soon than always the same to the bit gets narrower passes while there are few rows.

W rows of a forward, K latents that a sampler remembers, C latent channels, H W latent size.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from training.conditioning import (
    Conditioning,
    encode_text,
    predict,
    text_parts,
    trained_parts,
    whole_frame,
)
from training.denoising import MEMORY, SamplerTable, advance
from training.new_tokens import knowing
from training.noise import noise_process
from training.outfit import PLAIN, Outfit, Weights, read_outfit
from training.pipeline import (
    BaseInfo,
    decode_latents,
    end_id,
    load_text_encoder,
    load_tokenizer,
    load_unet,
    load_vae,
    token_ids,
    tokenizers,
    unsaid_ids,
)
from training.request import FORWARD_ROWS, DrawRequest
from training.row_linear import RowAdapters
from training.samplers import sampler_table

# Parameters of a UNet below which threads wait for each other longer than they work (pocket: 10 s on two, 3 s on one)
SMALL = 50_000_000
PROMPTS_KEPT = 256  # encoded prompts of each subject


@dataclass(eq=False)
class Row:
    """One image on its way. `None` is not yet: it becomes so when the row first takes part in a step."""

    request: DrawRequest
    outfit: Outfit
    table: SamplerTable
    generator: torch.Generator
    x: torch.Tensor
    """[C, H, W] latents."""
    x0: torch.Tensor
    """[C, H, W]: the clean latents that the model implied in the last step."""
    kept: torch.Tensor
    """[K, C, H, W]: what its sampler remembers."""
    step: int = 0
    told: list[Conditioning] = field(default_factory=list)
    """Of each of its forward rows: of the negative prompt, if it is guided, and of the prompt."""

    @property
    def cost(self) -> int:
        """Rows of a forward pass that it takes."""
        return self.request.rows

    @property
    def done(self) -> bool:
        """Whether it has all of its steps."""
        return self.step == len(self.table)


class Studio:
    """The models of one base, resident, that denoise rows.

    Args:
        base: What is drawn with.
        device: `cpu`, `cuda`, or `auto`.
        width: W; `None` takes the device's (`FORWARD_ROWS`).
        exact: Whether every forward pass has W rows. Else it has no more than there are, and a row's bits depend on
            how many were beside it, to 1/255 of an image.
        models: The base's UNet and text encoder, frozen, for a studio alone; `None` loads them.
    """

    def __init__(
        self,
        base: BaseInfo,
        device: str = "auto",
        width: int | None = None,
        exact: bool = True,
        models: tuple[nn.Module, nn.Module] | None = None,
    ) -> None:
        self.base = base
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.width = width or FORWARD_ROWS[torch.device(self.device).type]
        if self.width < 2:
            raise ValueError("a guided image takes two rows")
        self._exact = exact
        self.unet, self.text_encoder = models or (load_unet(base), load_text_encoder(base))
        if self.device == "cpu" and sum(p.numel() for p in self.unet.parameters()) < SMALL:
            torch.set_num_threads(1)
        self.models = trained_parts(self.unet.to(self.device), self.text_encoder.to(self.device))
        self.vae = load_vae(base).to(self.device)
        if self.device == "cpu":  # oneDNN decodes an image in 19 rather than 24 ms so
            self.vae = self.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.schedule = noise_process(base.scheduler)
        self._tokenizer, self._tokenizing = load_tokenizer(base), threading.Lock()
        self._end = end_id(self._tokenizer)
        self._parameters = {
            f"{part}.{name}": parameter
            for part, model in self.models.items()
            for name, parameter in model.named_parameters()
        }
        self._pristine: Weights = {name: p.data for name, p in self._parameters.items()}
        self._weights = PLAIN.weights
        self._adapters = RowAdapters(self.unet, self.width)
        self._text_adapters = {
            part: RowAdapters(model, 1) for part, model in text_parts(self.text_encoder).items()
        }
        self._texts: WeakKeyDictionary[Outfit, OrderedDict[str | None, Conditioning]] = WeakKeyDictionary()
        self._places: list[Row] = []  # the rows of the last forward pass
        self._told: Conditioning | None = None  # of them

    def read(self, folder: Path, manifest: Mapping[str, Any] | None) -> Outfit:
        """What rows of an artifact wear; raises as `read_outfit`. Any thread may call it."""
        return read_outfit(self.base, self.models, self._pristine, folder, manifest)

    def check(self, request: DrawRequest, outfit: Outfit = PLAIN) -> SamplerTable:
        """The steps of an image in an outfit, if it can be drawn. Any thread may call it.

        Raises:
            UserError: A prompt is too long, the sampler cannot do what is asked, or the size cannot be had.
        """
        for prompt in (request.prompt, request.negative_prompt):
            self._ids(prompt, outfit)
        request.check_size(self.base.image_size, self.base.vae_factor, self.base.longest_side)
        scheduler = outfit.scheduler or self.base.scheduler
        return sampler_table(request.sampler or self.base.sampler, request.steps, scheduler, request.eta)

    def row(self, request: DrawRequest, outfit: Outfit) -> Row:
        """An image before its first step; raises as `check`."""
        table = self.check(request, outfit)
        request = replace(request, sampler=request.sampler or self.base.sampler)
        height, width = (side or self.base.image_size for side in (request.height, request.width))
        factor = self.base.vae_factor
        shape = (self.base.latent_channels, height // factor, width // factor)
        generator = torch.Generator("cpu").manual_seed(request.seed)
        x = torch.randn(shape, generator=generator).to(self.device)
        if table.start != 1.0:
            x = x * table.start
        return Row(request, outfit, table, generator, x, torch.zeros_like(x), x.new_zeros(MEMORY, *shape))

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> None:
        """Take each row one step further.

        Args:
            rows: Some that take W rows of a forward pass at most, all of one size and with the same whole weights.
        """
        self._wear(rows[0].outfit.weights)
        places = [i for i, row in enumerate(rows) for _ in range(row.cost)]
        if self._exact:
            places += [places[-1]] * (self.width - len(places))  # padding
        if rows != self._places:
            self._take_places(rows, places)
        now = [(float(r.table.timesteps[r.step]), float(r.table.levels[r.step])) for r in rows]
        x = torch.stack([row.x for row in rows])
        timesteps = torch.tensor([now[i][0] for i in places], dtype=torch.float32, device=self.device)
        assert self._told is not None  # there are rows
        output = predict(self.unet, x[places], timesteps, self._told)
        first = [places.index(i) for i in range(len(rows))]
        last = [start + row.cost - 1 for start, row in zip(first, rows, strict=True)]
        scale = torch.tensor([row.request.guidance for row in rows], device=self.device).reshape(-1, 1, 1, 1)
        without, conditioned = output[first], output[last]
        output = without + scale * (conditioned - without)
        levels = torch.tensor([level for _, level in now], dtype=torch.float32, device=self.device)
        x0 = self.schedule.clean(output, x, levels)
        noise = torch.stack([_noise(row) for row in rows]).to(self.device)
        coefficients = torch.tensor(
            np.stack([row.table.coefficients[row.step] for row in rows]), dtype=torch.float32
        )
        kept = torch.stack([row.kept for row in rows])
        x, kept = advance(x, x0, kept, noise, coefficients.to(self.device))
        for i, row in enumerate(rows):
            row.x, row.x0, row.kept, row.step = x[i], x0[i], kept[i], row.step + 1

    @torch.inference_mode()
    def rest(self) -> None:
        """Take everything off: nothing of a subject is kept for want of another one."""
        if self._places:
            self._adapters.wear([PLAIN.unet] * self.width)
            self._wear_text(PLAIN)
            self._wear(PLAIN.weights)
            self._places, self._told = [], None

    @torch.inference_mode()
    def pixels(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        """The image [height, width, 3] uint8 of scaled latents [C, H, W], decoded alone."""
        return pixels(self.vae, latents, self.base.scaling_factor)

    def _take_places(self, rows: Sequence[Row], places: Sequence[int]) -> None:
        """Have every place of the forward pass its row's adapter, and be told what its row is."""
        for row in rows:
            if not row.told:
                prompts: list[str | None] = [row.request.prompt]
                if row.cost == 2:
                    prompts.insert(0, row.request.negative_prompt or None)
                sizes = self._sizes(row)
                row.told = [self._encoded(prompt, row.outfit).of_sizes(sizes) for prompt in prompts]
        self._adapters.wear([rows[i].outfit.unet for i in places])
        told = [one for row in rows for one in row.told]
        self._told = Conditioning.cat(told + [told[-1]] * (len(places) - len(told)))
        self._places = list(rows)

    def _sizes(self, row: Row) -> torch.Tensor | None:
        """The sizes [1, 6] of an image, of a base that is told them: one that was made as large as it is drawn."""
        if not self.base.kind.sized:
            return None
        height, width = (side * self.base.vae_factor for side in row.x.shape[1:])
        return torch.tensor([whole_frame(height, width)], dtype=torch.float32, device=self.device)

    def _encoded(self, prompt: str | None, outfit: Outfit) -> Conditioning:
        """What a prompt becomes, one row; `None` is none at all. The outfit's weights are worn."""
        own = f"{self.base.kind.denoiser}."
        of_base = not (
            outfit.text or outfit.tokens or any(not name.startswith(own) for name in outfit.weights)
        )
        kept = self._texts.setdefault(PLAIN if of_base else outfit, OrderedDict())
        if prompt not in kept:
            self._wear_text(outfit)
            with knowing(self.text_encoder, outfit.tokens, self._end):
                kept[prompt] = encode_text(self.text_encoder, self._ids(prompt, outfit).to(self.device))
            if len(kept) > PROMPTS_KEPT:
                kept.popitem(last=False)
        kept.move_to_end(prompt)
        return kept[prompt]

    def _ids(self, prompt: str | None, outfit: Outfit) -> torch.Tensor:
        with self._tokenizing:  # a tokenizer is borrowed by one thread at a time
            if prompt is None:
                return unsaid_ids(self.base, self._tokenizer)
            words = outfit.tokens.words(len(tokenizers(self._tokenizer)[0])) if outfit.tokens else {}
            return token_ids(self._tokenizer, [prompt], self.base.token_limit, words)

    def _wear_text(self, outfit: Outfit) -> None:
        for part, adapters in self._text_adapters.items():
            adapters.wear([outfit.text.get(part, PLAIN.unet)])

    def _wear(self, weights: Weights) -> None:
        """Give the models these parameters in place of the base's."""
        if weights is self._weights:
            return
        for name in self._weights.keys() - weights.keys():
            self._parameters[name].data = self._pristine[name]
        for name, value in weights.items():
            self._parameters[name].data = value.to(self.device)
        self._weights = weights


def pixels(vae: nn.Module, latents: torch.Tensor, scaling_factor: float) -> NDArray[np.uint8]:
    """The image [height, width, 3] uint8 of one row [C, H, W] of scaled latents, rounded as diffusers rounds."""
    image = decode_latents(vae, latents[None], scaling_factor)[0]
    unit = (image / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).float().cpu().numpy()
    return (unit * 255).round().astype(np.uint8)


def _noise(row: Row) -> torch.Tensor:
    """What a step of the row adds, [C, H, W]."""
    if not row.table.stochastic:
        return torch.zeros(row.x.shape)
    return torch.randn(row.x.shape, generator=row.generator)
