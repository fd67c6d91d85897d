"""This file is where the pocket's CLIP is shaped and trained: words and pictures in one space, individuals apart.

Shape letters: B batch, D embedding, L tokens, N pictures in the album.
"""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from pocket.album import load_album, varied
from pocket.autoencoder import to_tensor
from pocket.diffusion import tokenize
from pocket.individuals import view, view_facts
from pocket.replicas import Machine, Replicas
from pocket.scenes import SCENES
from pocket.sprites import NOUNS, STYLES, Sprites
from pocket.stage import Stage
from pocket.vocabulary import MAX_TOKENS, write_tokenizer
from pocket.world import PLACES, SIZE, Facts, caption_words, show, some_place, with_article

FOLDER = Path(__file__).parent / "clip"
MAX_BYTES = 8 * 1024**2
PEAK_LR = 1e-3
SEED, UNSEEN_SEED = 6, 7
INDIVIDUALS = 3072
VIEWS = 4  # pictures of each; the odd ones look drawn
NOUNS_PER_BATCH = 16  # so that a class is told from others and an individual from its class
INDIVIDUAL_TEMPERATURE = 0.1
DIMENSIONS = 128


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP: a vision transformer over 4x4 patches, a text transformer over captions.

    Few patches, because on a CPU the number of steps decides.
    """
    torch.manual_seed(SEED)
    vision = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=5,
        image_size=SIZE,
        patch_size=16,
        projection_dim=DIMENSIONS,
    )
    text = CLIPTextConfig(
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=2,
        num_attention_heads=3,
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=DIMENSIONS,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=DIMENSIONS)
    return CLIPModel(config)


def train_clip(
    sprites: Sprites,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    album: Path,
    stage: Stage,
    machine: Machine,
) -> CLIPModel:
    """Trains until the budget is spent, on pictures of which half look drawn, kept at `album`."""
    model = build_clip(tokenizer).to(machine.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), PEAK_LR, betas=(0.9, 0.98), weight_decay=5e-2, fused=True
    )
    if state := stage.restore():
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    batches = Batches(sprites, vae, tokenizer, album, machine)
    replicas = Replicas(model, machine.replicas)
    share = stage.batch_size // machine.replicas

    for tick in stage.steps():
        if tick.save_due:
            stage.save(model=model.state_dict(), optimizer=optimizer.state_dict())
            continue
        for group in optimizer.param_groups:
            group["lr"] = stage.lr(PEAK_LR, decay_from=0.4)

        def loss_of(replica: CLIPModel, rank: int, first: int = tick.first) -> Tensor:
            return batches.loss(replica, first + rank * share, share)

        tick.loss = replicas.gradients(loss_of)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    stage.save(model=model.state_dict(), optimizer=optimizer.state_dict())
    return model.cpu().eval()


class Batches:
    """Every sample of the training as a function of the sample's number: two views of each of a few individuals."""

    def __init__(
        self,
        sprites: Sprites,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        album: Path,
        machine: Machine,
    ) -> None:
        count = INDIVIDUALS * VIEWS

        def render(index: int) -> Image.Image:
            return view(sprites, SEED, index // VIEWS, index % VIEWS)

        self.device = machine.device
        self.pixels = load_album(render, vae, album, count, machine.replicas)
        shown = [view_facts(SEED, index // VIEWS, index % VIEWS) for index in range(count)]
        self.tokens = torch.cat(
            [tokenize(tokenizer, [one.caption for one in shown[i : i + 1024]]) for i in range(0, count, 1024)]
        )
        self.traits, self.named = traits_of(shown)

    def loss(self, model: CLIPModel, first: int, count: int) -> Tensor:
        """Captions against pictures, plus pictures against pictures."""
        rng = torch.Generator().manual_seed(SEED * 1_000_003 + first)
        individuals = draw_individuals(count // 2, rng)
        angles = torch.rand(len(individuals), VIEWS, generator=rng).argsort(dim=1)[:, :2]
        picked = (individuals.unsqueeze(1) * VIEWS + angles).flatten()
        seen = model(
            input_ids=self.tokens[picked].to(self.device),
            pixel_values=varied(self.pixels[picked], rng).to(self.device),
        )
        scale = model.logit_scale.exp().clamp(max=100.0)
        words, pictures = seen.text_embeds.float(), seen.image_embeds.float()
        true = is_true_of(self.traits[picked], self.named[picked]).to(self.device)
        logits = scale * words @ pictures.T
        by_caption, by_picture = contrast(logits, true), contrast(logits.T, true.T)
        owner = individuals.repeat_interleave(2).to(self.device)
        same = owner.unsqueeze(0) == owner.unsqueeze(1)
        itself = torch.eye(count, dtype=torch.bool, device=self.device)
        alike = (pictures @ pictures.T / INDIVIDUAL_TEMPERATURE).masked_fill(itself, -1e4)
        return 0.5 * (by_caption + by_picture) + contrast(alike, same & ~itself)


def draw_individuals(count: int, rng: torch.Generator) -> Tensor:
    """[count] int64: different individuals of NOUNS_PER_BATCH classes."""
    classes = torch.randperm(len(NOUNS), generator=rng)[:NOUNS_PER_BATCH]
    members = torch.randperm(INDIVIDUALS // len(NOUNS), generator=rng)[: -(-count // NOUNS_PER_BATCH)]
    return (classes.unsqueeze(1) + len(NOUNS) * members).flatten()[:count]


def traits_of(shown: Sequence[Facts]) -> tuple[Tensor, Tensor]:
    """What pictures show and what of it their captions say.

    Returns:
        traits [N, 3] int64: noun, style and place as numbers; named [N, 3] bool: whether the caption says it.
    """
    traits = [
        (tuple(NOUNS).index(one.noun), STYLES.index(one.style), PLACES.index(one.place)) for one in shown
    ]
    named = [
        (True, f"{one.style} {one.noun}" in one.caption, one.caption.endswith(one.place)) for one in shown
    ]
    return torch.tensor(traits), torch.tensor(named)


def is_true_of(traits: Tensor, named: Tensor) -> Tensor:
    """[B, B] bool: whether all that caption i says is true of picture j, so that j is no wrong answer to i.

    Args:
        traits: [B, 3] int64, of `traits_of`.
        named: [B, 3] bool.
    """
    same = traits.unsqueeze(1) == traits.unsqueeze(0)
    return (same | ~named.unsqueeze(1)).all(dim=2)


def contrast(logits: Tensor, right: Tensor) -> Tensor:
    """The mean, over rows that have a right answer, of the cross-entropy to all right answers alike.

    Source: Khosla et al. 2020, "Supervised contrastive learning", equation 2.

    Args:
        logits: [B, B] float32.
        right: [B, B] bool.
    """
    wanted = right.float()
    per_row = -(F.log_softmax(logits, dim=1) * wanted).sum(dim=1) / wanted.sum(dim=1).clamp(min=1.0)
    return per_row.sum() / right.any(dim=1).sum().clamp(min=1)


@dataclass(frozen=True)
class Eyesight:
    """How well CLIP tells things apart that it never saw, as shares from 0 to 1."""

    noun: float
    """Pictures nearest to "a photo of a <noun>" with their own noun, of all nouns."""
    scene: float
    """Pictures of scenes nearest to "a photo of a <noun> <scene>" with their own scene, of all ten."""
    individual: float
    """Pictures nearest to another view of the same individual, among 16 individuals of the class."""
    spread: float
    """Cosine distance of two pictures of the world that show the same noun and style at the same place."""


@torch.inference_mode()
def embed_images(model: CLIPModel, images: Sequence[Image.Image]) -> Tensor:
    """[B, D] float32 of unit length, of RGB pictures of 64x64 pixels."""
    parts = [
        model.get_image_features(pixel_values=to_tensor(list(images[first : first + 128]))).pooler_output
        for first in range(0, len(images), 128)
    ]
    return F.normalize(torch.cat([torch.zeros(0, DIMENSIONS), *parts]), dim=1)


@torch.inference_mode()
def embed_texts(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """[B, D] float32 of unit length."""
    features: Tensor = model.get_text_features(input_ids=tokenize(tokenizer, texts)).pooler_output
    return F.normalize(features, dim=1)


def examine_clip(model: CLIPModel, tokenizer: CLIPTokenizer, sprites: Sprites) -> Eyesight:
    """Measures the model on individuals that it never saw: 16 of each class, in two views."""
    members, classes = 16, len(NOUNS)
    numbers = range(members * classes)
    first, second = (
        embed_images(model, [view(sprites, UNSEEN_SEED, number, angle) for number in numbers])
        for angle in (0, 1)
    )
    shown = [view_facts(UNSEEN_SEED, number, 0) for number in numbers]
    noun_texts = embed_texts(model, tokenizer, [f"a photo of {with_article(noun)}" for noun in NOUNS])
    nouns = (first @ noun_texts.T).argmax(dim=1) == torch.arange(len(first)) % classes
    scenes = list[bool]()
    for vector, one in zip(first, shown, strict=True):
        if one.place in SCENES:
            texts = [f"a photo of {with_article(one.noun)} {scene}" for scene in SCENES]
            best = (embed_texts(model, tokenizer, texts) @ vector).argmax().item()
            scenes.append(tuple(SCENES)[int(best)] == one.place)
    by_class = [vectors.view(members, classes, -1).transpose(0, 1) for vectors in (first, second)]
    nearest = (by_class[0] @ by_class[1].transpose(1, 2)).argmax(dim=2)
    return Eyesight(
        noun=nouns.float().mean().item(),
        scene=sum(scenes) / len(scenes),
        individual=(nearest == torch.arange(members)).float().mean().item(),
        spread=_spread(model, sprites),
    )


def _spread(model: CLIPModel, sprites: Sprites) -> float:
    rng = random.Random(UNSEEN_SEED)
    kinds = [(noun, style, some_place(rng)) for noun in NOUNS for style in STYLES]
    one, other = (embed_images(model, [show(sprites, *kind, rng) for kind in kinds]) for _ in range(2))
    return (1.0 - (one * other).sum(dim=1)).mean().item()


def save_clip(model: CLIPModel, eyesight: Eyesight, folder: Path) -> None:
    """Writes model, tokenizer and image processor as transformers reads them (fp16), replacing what was there.

    Raises:
        RuntimeError: the folder is larger than MAX_BYTES.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.half().save_pretrained(partial, safe_serialization=True)
    model.float()
    write_tokenizer(partial, caption_words())
    config = json.loads((partial / "config.json").read_text())
    _write(partial / "config.json", {**config, "dtype": "float32"})  # what it is loaded as
    _write(partial / "preprocessor_config.json", PROCESSOR)
    _write(partial / "eyesight.json", vars(eyesight))
    (partial / "model.safetensors").chmod(0o644)
    size = sum(path.stat().st_size for path in partial.iterdir())
    if size > MAX_BYTES:
        raise RuntimeError(
            f"the CLIP has {size / 1024**2:.1f} MiB, the limit is {MAX_BYTES / 1024**2:.0f} MiB"
        )
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": SIZE},
    "resample": 3,  # bicubic
    "do_center_crop": True,
    "crop_size": {"height": SIZE, "width": SIZE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def load_clip(folder: Path = FOLDER) -> tuple[CLIPModel, Eyesight]:
    """The trained CLIP, in float32, and how well it saw when it was examined."""
    model: CLIPModel = CLIPModel.from_pretrained(folder, local_files_only=True)
    return model.eval(), Eyesight(**json.loads((folder / "eyesight.json").read_text()))
