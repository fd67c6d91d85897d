"""This file is where the pocket's autoencoder is shaped and trained: 64x64 pictures to 8x8 latents of 16 channels.

Shape letters: B batch.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from pocket.replicas import Machine, Replicas
from pocket.sprites import Sprites
from pocket.stage import Stage
from pocket.world import SIZE, picture

PEAK_LR = 1.5e-3
KL_WEIGHT = 2e-4  # enough to keep latents near unit scale, too little to blur
EDGE_WEIGHT = 4.0  # outlines are a few pixels among flat colour: weigh them up or they stay soft
DRAWN_LATENT_ERROR = 0.1  # in units of the latents' own spread
SEED = 1  # the autoencoder sees other pictures than the UNet

Loss = Callable[[AutoencoderKL, Tensor, torch.Generator], Tensor]


def build_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder: 61 pictures/s in training on two cores."""
    torch.manual_seed(SEED)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 96, 160),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def train_autoencoder(sprites: Sprites, stage: Stage, machine: Machine) -> None:
    """Trains until the budget is spent, going on from the stage's checkpoint where there is one."""
    _train(build_autoencoder(), autoencoder_loss, SEED, sprites, stage, machine)


def polish_decoder(sprites: Sprites, work: Path, stage: Stage, machine: Machine) -> None:
    """Trains the decoder alone, so that latents the UNet has learned from stay what they were."""
    model = settled_autoencoder(sprites, work)
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)
    _train(model, decoder_loss, SEED + 1000, sprites, stage, machine)


def _train(
    model: AutoencoderKL, loss: Loss, seed: int, sprites: Sprites, stage: Stage, machine: Machine
) -> None:
    model = model.to(machine.device, memory_format=torch.channels_last).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, PEAK_LR, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    if state := stage.restore():
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    replicas = Replicas(model, machine.replicas)
    share = stage.batch_size // machine.replicas

    for tick in stage.steps():
        if tick.save_due:
            stage.save(model=model.state_dict(), optimizer=optimizer.state_dict())
            continue
        for group in optimizer.param_groups:
            group["lr"] = stage.lr(PEAK_LR, decay_from=0.6)

        def loss_of(replica: AutoencoderKL, rank: int, first: int = tick.first) -> Tensor:
            begin = first + rank * share
            pictures = [picture(sprites, seed, index)[0] for index in range(begin, begin + share)]
            noise = torch.Generator().manual_seed(begin)
            return loss(replica, to_tensor(pictures).to(machine.device), noise)

        tick.loss = replicas.gradients(loss_of)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    stage.save(model=model.state_dict(), optimizer=optimizer.state_dict())


def settled_autoencoder(sprites: Sprites, work: Path) -> AutoencoderKL:
    """The trained autoencoder as the UNet knows it, settled at the first call; its decoder may still improve.

    Latents are centred on zero, and `scaling_factor` makes them of unit scale.
    """
    folder = work / "vae"
    if not folder.exists():
        partial = work / "vae.partial"
        _centred(sprites, work / "vae.pt").save_pretrained(partial)
        partial.replace(folder)
    model: AutoencoderKL = AutoencoderKL.from_pretrained(folder)
    polished = work / "decoder.pt"
    if polished.exists():
        model.load_state_dict(torch.load(polished, weights_only=True)["model"])
    return model.eval()


def _centred(sprites: Sprites, path: Path) -> AutoencoderKL:
    model = build_autoencoder()
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    model.eval()
    pixels = to_tensor([picture(sprites, SEED, index)[0] for index in range(1024)])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        latents = torch.cat([model.encode(part).latent_dist.mean.float() for part in torch.split(pixels, 64)])
    centre = latents.mean(dim=(0, 2, 3))
    # The 1x1 convolutions around the latents take the shift in and out: no reader has to know of it.
    with torch.no_grad():
        model.quant_conv.bias[: len(centre)] -= centre
        model.post_quant_conv.bias += model.post_quant_conv.weight[:, :, 0, 0] @ centre
    scale = (latents - centre.view(-1, 1, 1)).std().item()
    model.register_to_config(scaling_factor=1.0 / scale)
    return model


def autoencoder_loss(model: AutoencoderKL, pixels: Tensor, noise: torch.Generator) -> Tensor:
    """The decoder's loss on a draw from the posterior, plus a small KL term.

    Args:
        pixels: [B, 3, 64, 64] float32 in [-1, 1].
    """
    mean, log_variance = model.quant_conv(model.encoder(pixels)).float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-20, 10)
    latents = mean + torch.randn(mean.shape, generator=noise).to(mean.device) * (0.5 * log_variance).exp()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
    loss: Tensor = _reconstruction_loss(model, latents, pixels) + KL_WEIGHT * kl
    return loss


def decoder_loss(model: AutoencoderKL, pixels: Tensor, noise: torch.Generator) -> Tensor:
    """The decoder's loss on latents as blurred as the ones that a UNet draws."""
    with torch.no_grad():
        mean = model.quant_conv(model.encoder(pixels)).float().chunk(2, dim=1)[0]
    blur = DRAWN_LATENT_ERROR / model.config.scaling_factor
    drawn = mean + blur * torch.randn(mean.shape, generator=noise).to(mean.device)
    return _reconstruction_loss(model, drawn, pixels)


def _reconstruction_loss(model: AutoencoderKL, latents: Tensor, pixels: Tensor) -> Tensor:
    """Absolute error, weighted towards outlines, plus the error of the gradients."""
    decoded: Tensor = model.decoder(model.post_quant_conv(latents)).float()
    error = (decoded - pixels).abs() * _outline_weight(pixels)
    return error.mean() + _gradient_error(decoded, pixels)


def _outline_weight(pixels: Tensor) -> Tensor:
    """[B, 1, 64, 64], 1 in flat areas, up to 1 + 2 * EDGE_WEIGHT beside hard edges."""
    brightest = F.max_pool2d(pixels, 3, stride=1, padding=1)
    darkest = -F.max_pool2d(-pixels, 3, stride=1, padding=1)
    return 1.0 + EDGE_WEIGHT * (brightest - darkest).mean(dim=1, keepdim=True)


def _gradient_error(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and vertical steps, at full and at half size."""
    total = torch.zeros((), device=decoded.device)
    for _ in range(2):
        for axis in (-2, -1):
            total = total + (decoded.diff(dim=axis) - pixels.diff(dim=axis)).abs().mean()
        decoded, pixels = F.avg_pool2d(decoded, 2), F.avg_pool2d(pixels, 2)
    return total


def to_tensor(pictures: list[Image.Image]) -> Tensor:
    """[B, 3, 64, 64] float32 in [-1, 1], channels last."""
    pixels = torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) for image in pictures]))
    return pixels.permute(0, 3, 1, 2) / 127.5 - 1.0


def to_images(pixels: Tensor) -> list[Image.Image]:
    """RGB pictures from [B, 3, H, W] in [-1, 1]; values outside are cut."""
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(np.asarray(level)) for level in levels]
