"""This file is where a run draws what it has learned so far: the sample grid, by all ranks in step.

Every prompt is a row drawn with guidance and one without (`validate.unguided`), every seed a column.

n images of a forward pass, C latent channels, h w latent size.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from training.batches import Batches
from training.conditioning import Conditioning, encode_text, predict, whole_frame
from training.denoising import MEMORY, advance
from training.engine import TrainingEngine
from training.lease import Lease
from training.module import DreamBoothModule
from training.noise import noise_process, trained_scheduler
from training.pipeline import BaseInfo, load_vae
from training.png import Pixels, encode_png, grid
from training.recipe import Validate
from training.request import FORWARD_ROWS
from training.samplers import sampler_table
from training.studio import pixels


class Decoder:
    """A base's autoencoder, loaded when the first picture is decoded, and kept."""

    def __init__(self, base: BaseInfo, device: torch.device) -> None:
        self._base, self._device = base, device
        self._vae: nn.Module | None = None

    def pixels(self, latents: torch.Tensor) -> Pixels:
        """The image [H, W, 3] uint8 of scaled latents [C, h, w]."""
        self._vae = self._vae or load_vae(self._base).to(self._device)
        return pixels(self._vae, latents, self._base.scaling_factor)


class Samples:
    """Draws the grids of a run.

    Args:
        lease: The run; its `sample_ids` are the prompts, the empty one first.
        base: What it is trained from.
        text_encoder: The base's, which encodes prompts where the run does not train one.
        batches: Tell the rank, the world and the device.
        decoder: Of the base.
        wanted: What is drawn; `None` is the sample grid of the recipe.
        ids: Token ids of the prompts of `wanted`, the empty one first; `None` are the lease's `sample_ids`.
    """

    def __init__(
        self,
        lease: Lease,
        base: BaseInfo,
        text_encoder: nn.Module,
        batches: Batches,
        decoder: Decoder,
        wanted: Validate | None = None,
        ids: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._wanted = wanted or lease.recipe.validate_
        self._base, self._text_encoder = base, text_encoder
        self._rank, self._world, self._device = batches.rank, batches.world, batches.device
        self._ids = torch.tensor(ids or lease.sample_ids, device=self._device)
        scheduler = trained_scheduler(base.scheduler, lease.recipe.train.objective)
        self._table = sampler_table(base.sampler, self._wanted.steps, scheduler)
        self._schedule = noise_process(scheduler)
        self._shape = (base.latent_channels, base.latent_size, base.latent_size)
        self._decoder = decoder  # rank 0 alone uses it

    def draw(self, engine: TrainingEngine) -> bytes | None:
        """The grid of the weights that would be published, as PNG bytes on rank 0; all ranks call this together."""
        images = self.images(engine)
        return encode_png(grid(images, columns=self._wanted.num_images), None) if images else None

    def images(self, engine: TrainingEngine) -> list[Pixels] | None:
        """What the grid is made of, row by row, [H, W, 3] uint8 each."""
        with engine.evaluating():
            return self._decoded(self._latents(engine.module, engine.module.unet))

    def of_base(self, unet: nn.Module, engine: TrainingEngine) -> list[Pixels] | None:
        """The same by the pristine base, which `unet` and the text encoder are of, as the engine computes."""
        with torch.no_grad():
            return self._decoded(self._latents(engine.module, unet, self._text_encoder))

    def _decoded(self, latents: torch.Tensor) -> list[Pixels] | None:
        if self._rank:
            return None
        return [self._decoder.pixels(row) for row in latents]

    def _latents(
        self, module: DreamBoothModule, unet: nn.Module, text_encoder: nn.Module | None = None
    ) -> torch.Tensor:
        """Clean latents [cells, C, h, w] of the whole grid, row by row, on every rank.

        Each rank draws a part. It goes through as many forward passes as the others, because with ZeRO-3 they gather
        weights from all.
        """
        text = encode_text(text_encoder or module.text_encoder or self._text_encoder, self._ids)
        if self._base.kind.sized:
            frame = torch.tensor([whole_frame(self._base.image_size, self._base.image_size)] * len(text))
            text = text.of_sizes(frame.float().to(self._device))
        scales = list(dict.fromkeys((self._wanted.guidance, *([1.0] if self._wanted.unguided else []))))
        seeds, prompts = self._wanted.num_images, len(self._ids) - 1
        canvas = torch.zeros(prompts, len(scales), seeds, *self._shape, device=self._device)
        cells = [(prompt, seed) for prompt in range(prompts) for seed in range(seeds)]
        each = -(-len(cells) // self._world)
        mine = cells[self._rank * each : (self._rank + 1) * each]
        width = FORWARD_ROWS[self._device.type] // (
            2 if scales != [1.0] else 1
        )  # a guided cell takes two rows
        for number, scale in enumerate(scales):
            for start in range(0, each, width):
                chunk = mine[start : start + width]
                drawn = self._denoise(module, unet, text, chunk or cells[:1], scale)
                for (prompt, seed), row in zip(chunk, drawn, strict=False):
                    canvas[prompt, number, seed] = row
        if self._world > 1:
            dist.all_reduce(canvas)
        return canvas.flatten(0, 2)

    def _denoise(
        self,
        module: DreamBoothModule,
        unet: nn.Module,
        text: Conditioning,
        cells: Sequence[tuple[int, int]],
        scale: float,
    ) -> torch.Tensor:
        """Clean latents [n, C, h, w] of n cells (prompt, seed); `text` is of the prompts, the empty one first."""
        noise = [torch.randn(self._shape, generator=torch.Generator().manual_seed(seed)) for _, seed in cells]
        x = torch.stack(noise).to(self._device)
        guided = scale != 1.0
        prompts = [1 + prompt for prompt, _ in cells]
        states = text[[0] * len(cells) + prompts if guided else prompts]
        kept = x.new_zeros(len(x), MEMORY, *self._shape)
        for t, level, coefficients in zip(
            self._table.timesteps, self._table.levels, torch.from_numpy(self._table.coefficients), strict=True
        ):
            rows = torch.cat([x, x]) if guided else x
            timesteps = torch.full((len(rows),), float(t), device=self._device)
            with module.computing(self._device):
                output = predict(unet, rows, timesteps, states).float()
            if guided:
                without, conditioned = output.chunk(2)
                output = without + scale * (conditioned - without)
            clean = self._schedule.clean(output, x, torch.full((len(x),), level, device=self._device))
            matrix = coefficients.expand(len(x), *coefficients.shape)
            x, kept = advance(x, clean, kept, torch.zeros_like(x), matrix)
        return x
