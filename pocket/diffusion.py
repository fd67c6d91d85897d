"""This file is where the pocket's UNet and text encoder are shaped and trained together, by v-prediction.

Shape letters: B batch, N pictures in the pool, L tokens.
"""

import random

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pocket.latents import Pool
from pocket.replicas import Machine, Replicas
from pocket.stage import Stage
from pocket.vocabulary import MAX_TOKENS

PEAK_LR = 1e-3
EMA_DECAY = 0.999
EMPTY_CAPTION_RATE = 0.10  # what guidance subtracts at drawing time
STRANGE_WORD_RATE = 0.04  # a word nobody knows must not spoil the picture: subjects are named by such words
SEED = 3
TEXT_WIDTH = 160


class Denoiser(nn.Module):
    """UNet and text encoder, trained as one."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """The predicted velocity [B, 16, 8, 8] of `noisy` [B, 16, 8, 8] under `tokens` [B, L]."""
        words = self.text_encoder(tokens)[0]
        velocity: Tensor = self.unet(noisy, timesteps, words, return_dict=False)[0]
        return velocity


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, predicting v."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def build_denoiser(tokenizer: CLIPTokenizer) -> Denoiser:
    """An untrained UNet and text encoder."""
    torch.manual_seed(SEED)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        layers_per_block=1,
        block_out_channels=(128, 224),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
        norm_num_groups=16,
    )
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=3 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=5,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Denoiser(unet, CLIPTextModel(config))


def train_denoiser(pool: Pool, tokenizer: CLIPTokenizer, stage: Stage, machine: Machine) -> None:
    """Trains until the budget is spent; the checkpoint holds weights, their average and the optimizer."""
    model = build_denoiser(tokenizer).to(machine.device)
    model.unet.to(memory_format=torch.channels_last)
    average = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(
        model.parameters(), PEAK_LR, betas=(0.9, 0.98), weight_decay=1e-2, fused=True
    )
    if state := stage.restore():
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average = state["average"]
    replicas = Replicas(model, machine.replicas)
    batches = Batches(pool, tokenizer, machine.device)
    share = stage.batch_size // machine.replicas

    def save() -> None:
        stage.save(model=model.state_dict(), average=average, optimizer=optimizer.state_dict())

    for tick in stage.steps():
        if tick.save_due:
            save()
            continue
        for group in optimizer.param_groups:
            group["lr"] = stage.lr(PEAK_LR, decay_from=0.7)

        def loss_of(replica: Denoiser, rank: int, first: int = tick.first) -> Tensor:
            return batches.loss(replica, first + rank * share, share)

        tick.loss = replicas.gradients(loss_of)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step = tick.first // stage.batch_size
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 1 - decay)
    save()


class Batches:
    """Every sample of the training: latents, caption, noise and timestep as functions of the sample's number."""

    def __init__(self, pool: Pool, tokenizer: CLIPTokenizer, device: torch.device) -> None:
        self.pool = pool
        self.device = device
        self.tokenizer = tokenizer
        self.signal = build_scheduler().alphas_cumprod.sqrt()
        self.noise = (1 - self.signal.square()).sqrt()

    def loss(self, model: Denoiser, first: int, count: int) -> Tensor:
        """Mean squared error of the velocity over samples `first` to `first + count`."""
        rng = torch.Generator().manual_seed(SEED * 1_000_003 + first)
        picked = torch.randint(0, len(self.pool.captions), (count,), generator=rng)
        clean = self.pool.latents[picked].float()
        drawn = torch.randn(clean.shape, generator=rng)
        # One timestep per equal slice of the schedule: the same mean as free draws, a quieter gradient.
        slices = (torch.arange(count) + torch.rand(count, generator=rng)) / count
        timesteps = (slices * len(self.signal)).long()
        signal, noise = (table[timesteps].view(-1, 1, 1, 1) for table in (self.signal, self.noise))
        tokens = self.tokens([self.pool.captions[index] for index in picked.tolist()], random.Random(first))
        noisy = (signal * clean + noise * drawn).contiguous(memory_format=torch.channels_last)
        target = signal * drawn - noise * clean
        velocity = model(*(tensor.to(self.device) for tensor in (noisy, timesteps, tokens)))
        return F.mse_loss(velocity.float(), target.to(self.device))

    def tokens(self, captions: list[str], rng: random.Random) -> Tensor:
        """[B, L] int64; some captions are emptied, some get a word that nobody knows."""
        varied = []
        for caption in captions:
            fate = rng.random()
            if fate < EMPTY_CAPTION_RATE:
                caption = ""
            elif fate < EMPTY_CAPTION_RATE + STRANGE_WORD_RATE:
                caption = _with_strange_word(caption, rng)
            varied.append(caption)
        return tokenize(self.tokenizer, varied)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """[B, L] int64, padded to MAX_TOKENS as Stable Diffusion does it."""
    encoded = tokenizer(
        texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    )
    tokens: Tensor = encoded.input_ids
    return tokens


def _with_strange_word(caption: str, rng: random.Random) -> str:
    """The caption with two or three random letters after its article: "a photo of a xq dog"."""
    strange = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 3)))
    photo = "a photo of "
    opening = photo if caption.startswith(photo) else ""
    article, _, thing = caption.removeprefix(photo).partition(" ")
    return f"{opening}{article} {strange} {thing}"
