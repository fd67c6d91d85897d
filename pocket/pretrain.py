"""This file is where the pocket base is made from nothing: `python -m pocket.pretrain --work DIR`."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from pocket.autoencoder import polish_decoder, settled_autoencoder, train_autoencoder
from pocket.clip import FOLDER as CLIP
from pocket.clip import examine_clip, save_clip, train_clip
from pocket.diffusion import train_denoiser
from pocket.export import WEIGHTS, draw_sheet, export_pipeline
from pocket.judge import FOLDER as JUDGE
from pocket.judge import examine, save_judge, train_judge
from pocket.latents import load_pool
from pocket.replicas import Machine
from pocket.sprites import fetch_sprites, load_sprites
from pocket.stage import Stage
from pocket.vocabulary import load_tokenizer, write_tokenizer
from pocket.world import caption_words

DEFAULT_WORK = Path("~/.cache/raybooth/pocket")
STAGES = ("tokenizer", "vae", "unet", "decoder", "export", "judge", "clip")


@dataclass(frozen=True)
class Budget:
    """How long a stage trains."""

    samples: int
    batch_size: int


# What two CPU cores do in some four hours.
BUDGETS = {
    "vae": Budget(60_000, 8),
    "unet": Budget(900_000, 64),
    "decoder": Budget(40_000, 8),
    "judge": Budget(96_000, 64),
    "clip": Budget(448_000, 64),
}


def main() -> None:
    """Trains the pocket base from nothing; every stage goes on where it stopped, also after a kill."""
    arguments = _parser().parse_args()
    work, machine = arguments.work.expanduser(), _machine(arguments)
    torch.set_flush_denormal(True)  # denormal activations cost ten times a normal one on a CPU
    stages = STAGES if arguments.stage == "all" else (arguments.stage,)
    sprites = load_sprites(fetch_sprites(work))

    def stage(name: str) -> Stage:
        budget = Budget(*(getattr(arguments, f"{name}_{part}") for part in ("samples", "batch")))
        return Stage(name, work / f"{name}.pt", budget.samples, budget.batch_size)

    if "tokenizer" in stages:
        write_tokenizer(work / "tokenizer", caption_words())
    if "vae" in stages:
        train_autoencoder(sprites, stage("vae"), machine)
    if "unet" in stages:
        tokenizer = load_tokenizer(work / "tokenizer")
        vae = settled_autoencoder(sprites, work)
        pool = load_pool(sprites, vae, work / "latents", arguments.pictures, arguments.threads)
        train_denoiser(pool, tokenizer, stage("unet"), machine)
    if "decoder" in stages:
        polish_decoder(sprites, work, stage("decoder"), machine)
    if "export" in stages:
        tokenizer = load_tokenizer(work / "tokenizer")
        export_pipeline(settled_autoencoder(sprites, work), work / "unet.pt", tokenizer, arguments.out)
        draw_sheet(arguments.out, work / "sheet.png")
        print(f"wrote {arguments.out}; its sample sheet is {work / 'sheet.png'}")
    if "judge" in stages:
        vae = settled_autoencoder(sprites, work)
        judge = train_judge(sprites, vae, work / "judge-album.safetensors", stage("judge"), machine)
        accuracy = examine(judge, sprites, vae)
        save_judge(judge, accuracy, JUDGE)
        print(f"wrote {JUDGE}: {accuracy}")
    if "clip" in stages:
        tokenizer = load_tokenizer(work / "tokenizer")
        vae = settled_autoencoder(sprites, work)
        album = work / "clip-album.safetensors"
        clip = train_clip(sprites, vae, tokenizer, album, stage("clip"), machine)
        eyesight = examine_clip(clip, tokenizer, sprites)
        save_clip(clip, eyesight, CLIP)
        print(f"wrote {CLIP}: {eyesight}")


def _machine(arguments: argparse.Namespace) -> Machine:
    cuda = torch.cuda.is_available() if arguments.device == "auto" else arguments.device == "cuda"
    return Machine(torch.device("cuda"), 1) if cuda else Machine(torch.device("cpu"), arguments.threads)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pocket.pretrain",
        description=main.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="examples: python -m pocket.pretrain --work out    (everything, in order)\n"
        "          python -m pocket.pretrain --work out --stage unet --unet-samples 2000000    (go on training)",
    )
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="downloads, caches and checkpoints")
    parser.add_argument("--stage", choices=("all", *STAGES), default="all", help="one of them alone")
    for name, budget in BUDGETS.items():
        parser.add_argument(
            f"--{name}-samples", type=int, default=budget.samples, help=f"{name}: seen in all"
        )
        parser.add_argument(
            f"--{name}-batch", type=int, default=budget.batch_size, help=f"{name}: samples of a step"
        )
    parser.add_argument(
        "--pictures", type=int, default=65_536, help="how many are encoded for the UNet to learn from"
    )
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where export writes the pipeline")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what to train on")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="on a CPU: one replica of the model each"
    )
    return parser


if __name__ == "__main__":
    main()
