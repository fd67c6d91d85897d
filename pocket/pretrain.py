"""This file is where the pocket base is made from nothing: `python -m pocket.pretrain --work DIR`."""

import argparse
import os
from pathlib import Path

import torch

from pocket.autoencoder import polish_decoder, settled_autoencoder, train_autoencoder
from pocket.diffusion import train_denoiser
from pocket.export import WEIGHTS, draw_sheet, export_pipeline
from pocket.latents import load_pool
from pocket.sprites import fetch_sprites, load_sprites
from pocket.vocabulary import load_tokenizer, write_tokenizer
from pocket.world import caption_words

DEFAULT_WORK = Path("~/.cache/raybooth/pocket")
STAGES = ("tokenizer", "vae", "unet", "decoder", "export")


def main() -> None:
    """Trains the pocket base from nothing; every stage goes on where it stopped, also after a kill."""
    arguments = _parser().parse_args()
    work, threads = arguments.work.expanduser(), arguments.threads
    torch.set_flush_denormal(True)  # denormal activations cost ten times a normal one on a CPU
    stages = STAGES if arguments.stage == "all" else (arguments.stage,)
    sprites = load_sprites(fetch_sprites(work))
    if "tokenizer" in stages:
        write_tokenizer(work / "tokenizer", caption_words())
    if "vae" in stages:
        train_autoencoder(sprites, work / "vae.pt", arguments.minutes_vae * 60, threads)
    if "unet" in stages:
        tokenizer = load_tokenizer(work / "tokenizer")
        vae = settled_autoencoder(sprites, work)
        pool = load_pool(sprites, vae, work / "latents", arguments.pictures, threads)
        train_denoiser(pool, tokenizer, work / "unet.pt", arguments.minutes_unet * 60, threads)
    if "decoder" in stages:
        polish_decoder(sprites, work, arguments.minutes_decoder * 60, threads)
    if "export" in stages:
        tokenizer = load_tokenizer(work / "tokenizer")
        export_pipeline(settled_autoencoder(sprites, work), work / "unet.pt", tokenizer, arguments.out)
        draw_sheet(arguments.out, work / "sheet.png")
        print(f"wrote {arguments.out}; its sample sheet is {work / 'sheet.png'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pocket.pretrain", description=main.__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="downloads, caches and checkpoints")
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--minutes-vae", type=float, default=25.0)
    parser.add_argument("--minutes-unet", type=float, default=180.0)
    parser.add_argument("--minutes-decoder", type=float, default=20.0)
    parser.add_argument(
        "--pictures", type=int, default=57_344, help="how many are encoded for the UNet to learn from"
    )
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where export writes the pipeline")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="one replica of the model each"
    )
    return parser


if __name__ == "__main__":
    main()
