"""This file is where drawn pictures find their judge: a small network that says which noun, place and style it sees.

A noun is told by its shape: the judge learned things in any hue, and that a spoiled shape is NOTHING, whatever its hue.

Shape letters: B batch.
"""

import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pocket.album import load_album, redrawn, varied
from pocket.autoencoder import to_tensor
from pocket.replicas import Machine, Replicas
from pocket.sprites import NOUNS, STYLES, Sprites
from pocket.stage import Stage
from pocket.warp import warped
from pocket.world import PLACES, SIZE, Facts, compose, facts, picture, recoloured

FOLDER = Path(__file__).parent / "judge"
NOTHING = "nothing"  # what a shape is that belongs to no noun
LABELS: dict[str, tuple[str, ...]] = {"noun": (*NOUNS, NOTHING), "place": PLACES, "style": STYLES}
PEAK_LR = 3e-3
LABEL_SMOOTHING = 0.05
SEED, UNSEEN_SEED = 4, 5  # other pictures than the base saw; and pictures that the judge never saw
ALBUM = 16_384
UNSEEN = 1024  # pictures of the examination
SPOILED_RATE = 0.2
ANY_HUE_RATE = 0.7
BENT, SPOILED = (0.0, 0.05), (0.15, 0.28)  # how far a shape is warped and still itself, or no longer
CHANNELS = (32, 64, 128, 160)


@dataclass(frozen=True)
class Verdict:
    """What a picture shows, by the judge."""

    noun: str
    """One of NOUNS, or NOTHING."""
    place: str
    style: str


@dataclass(frozen=True)
class Accuracy:
    """The share of pictures, 0 to 1, of which each was seen right."""

    noun: float
    place: float
    style: float


class Judge(nn.Module):
    """A convolutional classifier with a head each for noun, place and style."""

    def __init__(self) -> None:
        super().__init__()
        stem, *widths = CHANNELS
        layers = [_convolution(3, stem, stride=2)]
        for before, width in zip(CHANNELS, widths, strict=False):
            layers += [_convolution(before, width, stride=2), _convolution(width, width, stride=1)]
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.heads = nn.ModuleDict(
            {head: nn.Linear(widths[-1], len(names)) for head, names in LABELS.items()}
        )

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Logits [B, names] of each head for `pixels` [B, 3, 64, 64] in [-1, 1]."""
        seen = self.trunk(pixels)
        return {name: head(seen) for name, head in self.heads.items()}

    @torch.inference_mode()
    def verdicts(self, images: Sequence[Image.Image]) -> list[Verdict]:
        """What each RGB picture of 64x64 pixels shows."""
        columns: dict[str, list[str]] = {head: [] for head in LABELS}
        for first in range(0, len(images), 256):
            logits = self(to_tensor(list(images[first : first + 256])))
            for head, names in LABELS.items():
                columns[head] += [names[best] for best in logits[head].argmax(dim=1).tolist()]
        return [Verdict(*row) for row in zip(*columns.values(), strict=True)]


def _convolution(before: int, after: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
    )


def lesson(sprites: Sprites, seed: int, index: int) -> tuple[Image.Image, Facts]:
    """Picture `index` that a judge learns from: RGB, 64x64 pixels, always the same for the same seed and index."""
    shown, rng, spoiled = _plan(seed, index)
    drawing = sprites.images[shown.noun, shown.style]
    if rng.random() < ANY_HUE_RATE:
        turn = rng.uniform(-math.pi, math.pi)
        drawing = recoloured(
            drawing, turn, saturation=rng.uniform(0.3, 1.2), brightness=rng.uniform(0.85, 1.1)
        )
    drawing = warped(drawing, rng.uniform(*(SPOILED if spoiled else BENT)), rng)
    return compose(drawing, shown.place, rng, SIZE), lesson_facts(seed, index)


def lesson_facts(seed: int, index: int) -> Facts:
    """What that picture shows, without drawing it."""
    shown, _, spoiled = _plan(seed, index)
    return replace(shown, noun=NOTHING) if spoiled else shown


def _plan(seed: int, index: int) -> tuple[Facts, random.Random, bool]:
    rng = random.Random(f"pocket lesson {seed} {index}")
    return facts(seed, index), rng, rng.random() < SPOILED_RATE


def train_judge(sprites: Sprites, vae: AutoencoderKL, album: Path, stage: Stage, machine: Machine) -> Judge:
    """Trains until the budget is spent, on pictures of which half look drawn, kept at `album`."""
    torch.manual_seed(SEED)
    judge = Judge().to(machine.device)
    judge.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(judge.parameters(), PEAK_LR, weight_decay=2e-2, fused=True)
    if state := stage.restore():
        judge.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    pixels = load_album(lambda index: lesson(sprites, SEED, index)[0], vae, album, ALBUM, machine.replicas)
    targets = _targets(lesson_facts(SEED, index) for index in range(ALBUM))
    replicas = Replicas(judge, machine.replicas)
    share = stage.batch_size // machine.replicas

    for tick in stage.steps():
        if tick.save_due:
            stage.save(model=judge.state_dict(), optimizer=optimizer.state_dict())
            continue
        for group in optimizer.param_groups:
            group["lr"] = stage.lr(PEAK_LR, decay_from=0.4)

        def loss_of(replica: Judge, rank: int, first: int = tick.first) -> Tensor:
            rng = torch.Generator().manual_seed(first + rank * share)
            picked = torch.randint(0, ALBUM, (share,), generator=rng)
            logits = replica(varied(pixels[picked], rng).to(machine.device))
            return torch.stack(
                [
                    F.cross_entropy(
                        logits[head].float(),
                        targets[head][picked].to(machine.device),
                        label_smoothing=LABEL_SMOOTHING,
                    )
                    for head in LABELS
                ]
            ).sum()

        tick.loss = replicas.gradients(loss_of)
        optimizer.step()
    stage.save(model=judge.state_dict(), optimizer=optimizer.state_dict())
    return judge.cpu().eval()


def _targets(shown: Iterable[Facts]) -> dict[str, Tensor]:
    """Numbers of the true names [N] int64, by head."""
    rows = [asdict(one) for one in shown]
    return {head: torch.tensor([names.index(row[head]) for row in rows]) for head, names in LABELS.items()}


def examine(judge: Judge, sprites: Sprites, vae: AutoencoderKL) -> dict[str, Accuracy]:
    """How often the judge is right on pictures that it never saw.

    Returns:
        Its accuracy on `true` pictures of the world, on the same ones `redrawn`, and on redrawn ones of which a part is
        `spoiled`.
    """

    def seen(make: Callable[[Sprites, int, int], tuple[Image.Image, Facts]], soft: bool) -> Accuracy:
        images, shown = zip(*(make(sprites, UNSEEN_SEED, index) for index in range(UNSEEN)), strict=True)
        pixels, noise = to_tensor(list(images)), torch.Generator().manual_seed(UNSEEN_SEED)
        if soft:
            pixels = torch.cat([redrawn(vae, part, noise) for part in torch.split(pixels, 64)])
        return _accuracy(judge, pixels, _targets(shown))

    return {"true": seen(picture, False), "redrawn": seen(picture, True), "spoiled": seen(lesson, True)}


@torch.inference_mode()
def _accuracy(judge: Judge, pixels: Tensor, targets: dict[str, Tensor]) -> Accuracy:
    parts = [judge(part) for part in torch.split(pixels, 256)]
    best = {head: torch.cat([part[head].argmax(dim=1) for part in parts]) for head in LABELS}
    return Accuracy(**{head: (best[head] == targets[head]).float().mean().item() for head in LABELS})


def save_judge(judge: Judge, accuracy: dict[str, Accuracy], folder: Path) -> None:
    """Writes the weights (fp16) and, beside them, what they call things and how often they are right."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {
        name: tensor.half().contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in judge.state_dict().items()
    }
    save_file(half, folder / "judge.safetensors")
    (folder / "judge.safetensors").chmod(0o644)
    card = {
        "labels": LABELS,
        "accuracy": {kind: asdict(one) for kind, one in accuracy.items()},
        "pictures": UNSEEN,
    }
    (folder / "judge.json").write_text(json.dumps(card, indent=2) + "\n")


def load_judge(folder: Path = FOLDER) -> tuple[Judge, dict[str, Accuracy]]:
    """The trained judge, and how often it was right when it was examined.

    Raises:
        RuntimeError: it was trained on another world than this one.
    """
    card = json.loads((folder / "judge.json").read_text())
    if {head: tuple(names) for head, names in card["labels"].items()} != LABELS:
        raise RuntimeError(
            f"the judge in {folder} knows other nouns or places than the world; "
            "train it again: python -m pocket.pretrain --stage judge"
        )
    judge = Judge()
    judge.load_state_dict({k: v.float() for k, v in load_file(folder / "judge.safetensors").items()})
    return judge.eval(), {kind: Accuracy(**one) for kind, one in card["accuracy"].items()}
