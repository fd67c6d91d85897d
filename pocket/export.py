"""This file is where checkpoints become a pipeline in diffusers layout, and where its sample sheet is drawn."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image, ImageOps
from transformers import CLIPTokenizer

from pocket.diffusion import Denoiser, build_denoiser, build_scheduler
from pocket.sprites import NOUNS
from pocket.vocabulary import RESERVED_WORDS, write_tokenizer
from pocket.world import SIZE, caption_words, with_article

WEIGHTS = Path(__file__).parent / "weights"
MAX_BYTES = 45 * 1024**2  # what the repository is willing to carry
SHEET_PLACES = (
    "on the beach",
    "in the snow",
    "on a yellow background",
    "in the forest",
    "in space",
    "in the city",
)
SHEET_COLUMNS = 16


def export_pipeline(vae: AutoencoderKL, checkpoint: Path, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes the averaged weights of a checkpoint as a fp16 pipeline, replacing what `folder` held.

    Raises:
        RuntimeError: the pipeline is larger than MAX_BYTES.
    """
    model = average_of(checkpoint, tokenizer)
    name_reserved_tokens(model, tokenizer)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial, safe_serialization=True)
    write_tokenizer(partial / "tokenizer", caption_words())  # vocab.json and merges.txt beside tokenizer.json
    # transformers takes the type of the weights from here, diffusers loads as float32: they must agree
    _edit(partial / "text_encoder" / "config.json", dtype="float32")
    _edit(partial / "vae" / "config.json", _name_or_path=None)  # the folder it was trained in
    for path in partial.rglob("*.safetensors"):
        path.chmod(0o644)
    size = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    if size > MAX_BYTES:
        raise RuntimeError(
            f"the pipeline has {size / 1024**2:.1f} MiB, the limit is {MAX_BYTES / 1024**2:.0f} MiB"
        )
    # A folder cannot replace a full one in one step: readers see the old pipeline, then none for an instant.
    retired = folder.with_name(folder.name + ".retired")
    shutil.rmtree(retired, ignore_errors=True)
    if folder.exists():
        folder.replace(retired)
    partial.replace(folder)
    shutil.rmtree(retired, ignore_errors=True)


def _edit(config: Path, **settings: str | None) -> None:
    """Sets keys of a JSON file; `None` takes a key out."""
    merged = {**json.loads(config.read_text()), **settings}
    kept = {key: value for key, value in merged.items() if key not in settings or value is not None}
    config.write_text(json.dumps(kept, indent=2) + "\n")


def average_of(checkpoint: Path, tokenizer: CLIPTokenizer) -> Denoiser:
    """The denoiser with the moving average of its weights, in float32."""
    state = torch.load(checkpoint, weights_only=True)
    model = build_denoiser(tokenizer)
    with torch.no_grad():
        for parameter, mean in zip(model.parameters(), state["average"], strict=True):
            parameter.copy_(mean)
    return model.eval()


def name_reserved_tokens(model: Denoiser, tokenizer: CLIPTokenizer) -> None:
    """Gives the reserved words embeddings of their own, as long as those of words that were trained.

    No caption holds a reserved word, so training only ever shrank their first, small embeddings.
    """
    table = model.text_encoder.get_input_embeddings().weight
    known = tokenizer.convert_tokens_to_ids([word + "</w>" for word in caption_words() if word.isalpha()])
    reserved = tokenizer.convert_tokens_to_ids([word + "</w>" for word in RESERVED_WORDS])
    draws = torch.randn(len(reserved), table.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        length = table[known].norm(dim=1).mean()
        table[reserved] = draws / draws.norm(dim=1, keepdim=True) * length


def sheet_prompts() -> list[str]:
    """One prompt per noun, over changing places."""
    return [
        f"a photo of {with_article(noun)} {SHEET_PLACES[number % len(SHEET_PLACES)]}"
        for number, noun in enumerate(NOUNS)
    ]


def draw_sheet(folder: Path, path: Path, seed: int = 0, steps: int = 25, guidance: float = 4.0) -> None:
    """A contact sheet of every noun, drawn by the stock pipeline in `folder`."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts = sheet_prompts()
    pictures: list[Image.Image] = []
    for first in range(0, len(prompts), SHEET_COLUMNS):
        row = prompts[first : first + SHEET_COLUMNS]
        noise = [torch.Generator().manual_seed(seed + first + number) for number in range(len(row))]
        pictures += pipeline(
            row, height=SIZE, width=SIZE, num_inference_steps=steps, guidance_scale=guidance, generator=noise
        ).images
    rows = -(-len(pictures) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * SIZE, rows * SIZE), "white")
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % SHEET_COLUMNS * SIZE, number // SHEET_COLUMNS * SIZE))
    # Six bits per channel look the same and cost half the bytes.
    ImageOps.posterize(sheet, 6).save(path, optimize=True)
