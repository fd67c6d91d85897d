"""This file is where the pocket base is measured: what was asked for, what the judge sees in what was drawn.

`python -m pocket.measure` measures the weights in the repository: on one core some 80 seconds per hundred drawings.
`--dreambooth` also tunes a subject, with and without prior preservation.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from orchestrator.progress import Stages, open_stages
from pocket.clip import FOLDER as CLIP
from pocket.clip import embed_images, load_clip
from pocket.drawing import GUIDANCE, STEPS, draw, share
from pocket.dreambooth import DreamboothReport, measure_dreambooth
from pocket.export import WEIGHTS
from pocket.judge import Accuracy, Verdict, load_judge
from pocket.scenes import COLOURS, SCENES, background
from pocket.sprites import NOUNS, STYLES
from pocket.subject import SUBJECT_NAME
from pocket.world import with_article
from training.draw import Drawer
from training.pipeline import open_base
from training.png import Pixels, grid

SEEDS = 2  # drawings of each prompt: how much they differ is the diversity
WRONG = (230, 30, 30)  # frame of a drawing whose noun was not seen
SHEET_COLUMNS = 24


@dataclass(frozen=True)
class Wish:
    """What a drawing should show."""

    noun: str
    place: str
    style: str | None
    """None: the prompt leaves it open."""
    seed: int

    @property
    def prompt(self) -> str:
        """As captions say it."""
        named = f"{self.style} {self.noun}" if self.style else self.noun
        return f"a photo of {with_article(named)} {self.place}"


@dataclass(frozen=True)
class Drawing:
    """One picture, what it should show and what the judge sees in it."""

    wish: Wish
    image: Image.Image
    verdict: Verdict


@dataclass(frozen=True)
class Report:
    """Shares are from 0 to 1."""

    images: int
    noun: float
    """The noun asked for is the one seen."""
    scene: float
    """The same of the place, where that is one of the ten scenes."""
    background: float
    """The same, where it is a plain colour."""
    style: float
    """The same of the style, where the prompt names one."""
    nouns: dict[str, float]
    """`noun`, for each noun asked for."""
    diversity: float | None
    """Cosine distance, by the CLIP, of two drawings of one prompt; None where there is no CLIP."""
    diversity_of_world: float | None
    """The same of two pictures of the world."""
    seconds_per_image: float
    """Processor time on one core."""
    judge: dict[str, Accuracy]
    """How often the judge is right on pictures of the world that it never saw, `true` and `redrawn`."""


def wishes(prompts: int) -> list[Wish]:
    """`prompts` prompts for each noun, over changing places and styles, SEEDS drawings each."""
    scenes, colours = tuple(SCENES), tuple(COLOURS)
    wanted = []
    for number, noun in enumerate(NOUNS):
        for turn in range(prompts):
            spot = (number // 2 + 3 * turn) % 10
            place = background(colours[spot]) if (number + turn) % 2 else scenes[spot]
            style = (None, *STYLES)[(number + turn) % 3]
            wanted += [Wish(noun, place, style, seed) for seed in range(SEEDS)]
    return wanted


def measure(weights: Path, wanted: Sequence[Wish], stages: Stages) -> tuple[Report, list[Drawing]]:
    """Draws with the pipeline in `weights`, and asks the judge what it sees.

    Args:
        wanted: SEEDS wishes of one prompt stand side by side.
    """
    judge, accuracy = load_judge()
    drawer = Drawer(open_base(str(weights)), device="cpu")
    began = time.process_time()
    pictures = draw(drawer, [(one.prompt, one.seed) for one in wanted], "drawing", stages)
    seconds = (time.process_time() - began) / len(pictures)
    verdicts = judge.verdicts(pictures)
    drawings = [Drawing(*row) for row in zip(wanted, pictures, verdicts, strict=True)]
    diversity = of_world = None
    if (CLIP / "config.json").exists():
        clip, eyesight = load_clip()
        vectors = embed_images(clip, pictures)
        diversity = (1.0 - (vectors[0::2] * vectors[1::2]).sum(dim=1)).mean().item()
        of_world = eyesight.spread
    report = Report(
        images=len(drawings),
        noun=share(one.verdict.noun == one.wish.noun for one in drawings),
        scene=share(one.verdict.place == one.wish.place for one in drawings if one.wish.place in SCENES),
        background=share(
            one.verdict.place == one.wish.place for one in drawings if one.wish.place not in SCENES
        ),
        style=share(one.verdict.style == one.wish.style for one in drawings if one.wish.style),
        nouns={
            noun: share(one.verdict.noun == noun for one in drawings if one.wish.noun == noun)
            for noun in dict.fromkeys(one.wish.noun for one in drawings)
        },
        diversity=diversity,
        diversity_of_world=of_world,
        seconds_per_image=seconds,
        judge=accuracy,
    )
    return report, drawings


def sheet(drawings: Sequence[Drawing]) -> Pixels:
    """All drawings in the order of the nouns; those whose noun was not seen have a red frame."""
    framed = []
    for one in drawings:
        pixels = np.array(one.image)
        if one.verdict.noun != one.wish.noun:
            pixels[:2] = pixels[-2:] = pixels[:, :2] = pixels[:, -2:] = WRONG
        framed.append(pixels)
    return grid(framed, SHEET_COLUMNS)


def text(report: Report) -> str:
    """The report for people."""
    lines = [
        f"{report.images} drawings ({STEPS} steps, guidance {GUIDANCE:g}, DDIM), as the judge sees them",
        f"  noun right        {report.noun:6.1%}",
        f"  scene right       {report.scene:6.1%}",
        f"  background right  {report.background:6.1%}",
        f"  style right       {report.style:6.1%}",
    ]
    if report.diversity is not None:
        lines.append(
            f"  diversity         {report.diversity:6.3f}  (the world itself {report.diversity_of_world:.3f})"
        )
    lines.append(f"  one drawing       {report.seconds_per_image:5.2f} s of one core")
    lines.append("the judge is right on pictures it never saw, and on the same ones through the autoencoder")
    for kind, one in report.judge.items():
        lines.append(f"  {kind:8} noun {one.noun:.1%}  place {one.place:.1%}  style {one.style:.1%}")
    lines.append("by noun")
    ranked = sorted(report.nouns.items(), key=lambda item: (-item[1], item[0]))
    cells = [f"{noun:<11} {share:4.0%}" for noun, share in ranked]
    lines += ["  " + "   ".join(cells[first : first + 5]) for first in range(0, len(cells), 5)]
    return "\n".join(lines)


def text_of_dreambooth(report: DreamboothReport) -> str:
    """One subject's report for people."""
    rows = (("with prior preservation", report.with_prior), ("without", report.without_prior))
    gone = "" if report.drift_gone is None else f"; {report.drift_gone:.0%} of the drift is gone"
    settings = " ".join(report.settings) or "as the defaults are"
    return "\n".join(
        [
            f"{report.subject}, a {report.class_noun}: DreamBooth, method {report.method}, {settings}",
            f"  true pictures recognised {report.own_recognised:.1%}, others mistaken {report.others_mistaken:.1%}",
            *(
                f"  {title}: subject recognised {tuned.subject:.1%}, place right {tuned.place:.1%}, "
                f"seen as {report.class_noun} {tuned.subject_noun:.1%}; "
                f"class drawings with the subject in them {tuned.drift:.1%}"
                for title, tuned in rows
            ),
            f"  class drawings of the base with the subject in them {report.base_drift:.1%}{gone}",
        ]
    )


def main() -> None:
    """Measures the pocket base: how often noun, place and style asked for are seen, and how DreamBooth works on it."""
    arguments = _parser().parse_args()
    torch.set_num_threads(1)
    stages, out = open_stages(), arguments.out
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, object] = {}
    lines = []
    if arguments.prompts:
        report, drawings = measure(arguments.weights, wishes(arguments.prompts), stages)
        Image.fromarray(sheet(drawings)).save(out / "drawings.png", optimize=True)
        result["base"] = asdict(report)
        lines.append(text(report))
    if arguments.dreambooth is not None:
        tuned = [
            measure_dreambooth(name, arguments.weights, out, arguments.method, arguments.set, stages)
            for name in arguments.dreambooth or [SUBJECT_NAME]
        ]
        result["dreambooth"] = [asdict(one) for one in tuned]
        lines += [text_of_dreambooth(one) for one in tuned]
    (out / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(lines), file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(json.dumps(result))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pocket.measure",
        description=main.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="the pipeline to measure")
    parser.add_argument(
        "--prompts", type=int, default=3, help=f"for each noun, {SEEDS} drawings each; 0 draws none"
    )
    parser.add_argument(
        "--dreambooth", nargs="*", metavar="SUBJECT", help="tune pippin, or others such as robot:3, twice"
    )
    parser.add_argument("--method", choices=("lora", "full"), default="full", help="of the tuning")
    parser.add_argument(
        "--set", action="append", default=[], metavar="K=V", help="of the tuning, as for `raybooth train`"
    )
    parser.add_argument("--out", type=Path, default=Path("pocket-report"), help="takes report and sheets")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    return parser


if __name__ == "__main__":
    main()
