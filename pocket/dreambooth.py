"""This file is where DreamBooth is measured on the pocket base: is the subject learned, and does its class stay?"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from cluster.storage import Storage
from orchestrator.progress import Stages
from orchestrator.sheet import SheetRow, contact_sheet
from pocket.clip import embed_images, load_clip
from pocket.drawing import draw, share
from pocket.judge import load_judge
from pocket.recognizer import Sitter, find_sitter, fit_recognizer
from pocket.subject import PHOTO_PLACES
from pocket.world import PLACES, with_article
from training.artifact import open_artifact
from training.defaults import DEFAULTS
from training.draw import Drawer
from training.pipeline import load_vae, open_base
from training.png import Pixels
from training.prompt import render_prompt
from training.recipe import Method
from training.section import merge

NEW_PLACES = tuple(place for place in PLACES if place not in PHOTO_PLACES)
SEEDS = 2  # drawings of each prompt
CALIBRATION_SEED = 1000  # the drawings that calibrate are not those that measure
SHEET_COLUMNS = 8
STORAGE = "raybooth-data"


@dataclass(frozen=True)
class Tuned:
    """What one tuned model draws; shares from 0 to 1."""

    subject: float
    """Drawings of the subject at new places in which it is recognised."""
    place: float
    """The same drawings: the place asked for is the one seen."""
    subject_noun: float
    """The same drawings: the class is the noun seen."""
    drift: float
    """Drawings of the class, the subject not being asked for, in which the subject is recognised."""
    class_noun: float
    """The same drawings: the class is the noun seen."""


@dataclass(frozen=True)
class DreamboothReport:
    """One subject, tuned with and without prior preservation; shares from 0 to 1."""

    subject: str
    class_noun: str
    method: str
    settings: list[str]
    """What differed from the defaults of the pocket base."""
    own_recognised: float
    """True pictures of the subject that are recognised: what drawings can reach."""
    others_mistaken: float
    """Pictures of other members of the class that are taken for the subject."""
    base_drift: float
    """Drawings of the class by the pristine base in which the subject is recognised."""
    with_prior: Tuned
    without_prior: Tuned
    drift_gone: float | None
    """The part of the drift that prior preservation takes away; None where there was none."""


@dataclass(frozen=True)
class _Drawn:
    """What one model drew."""

    subject: list[Image.Image]
    members: list[Image.Image]
    """Of the class."""


def measure_dreambooth(
    name: str, weights: Path, out: Path, method: Method, settings: Sequence[str], stages: Stages
) -> DreamboothReport:
    """Tunes a subject twice by `raybooth train` and counts what is drawn afterwards.

    Args:
        name: `pippin`, or an invented subject such as `robot:3`.
        weights: The pipeline that is tuned.
        out: Takes photos, storage root and a contact sheet; what was trained there before is not trained again.
        method: `lora` or `full`.
        settings: Further ones, as `raybooth train --set` takes them.
        stages: Shows progress.

    Raises:
        RuntimeError: a training failed.
    """
    out = out.absolute()
    sitter, base = find_sitter(name, out / "photos"), open_base(str(weights.resolve()))
    (judge, _), (clip, _) = load_judge(), load_clip()
    of_class = f"a photo of {with_article(sitter.noun)}"
    class_prompts = [of_class, *(f"{of_class} {place}" for place in NEW_PLACES)]

    pristine = Drawer(base, device="cpu")
    calibration = draw(pristine, _seeded(class_prompts, CALIBRATION_SEED), "the class, to calibrate", stages)
    recognizer = fit_recognizer(sitter, calibration, clip, load_vae(base))
    before = draw(pristine, _seeded(class_prompts), "the class, by the base", stages)
    drawn = {}
    for label, own in (("prior", []), ("bare", ["prior.weight=0"])):
        stages.note(f"training {sitter.name}-{label} ...")
        version = _train(sitter, label, base.path, out, method, [*settings, *own])
        with open_artifact(Storage(str(out / STORAGE)), f"{sitter.name}-{label}", version) as artifact:
            drawer = Drawer(base, artifact.folder, artifact.manifest, device="cpu")
            who = artifact.identity
        subject = render_prompt("a photo of {subject}", who.class_noun, who.identifier, who.template)
        drawn[label] = _Drawn(
            draw(drawer, _seeded([f"{subject} {place}" for place in NEW_PLACES]), "the subject", stages),
            draw(drawer, _seeded(class_prompts), "the class", stages),
        )
    _write_sheet(sitter, before, drawn, out / f"{sitter.name}.png")

    def sees(pictures: Sequence[Image.Image]) -> float:
        return recognizer.sees(embed_images(clip, pictures)).float().mean().item()

    def counted(one: _Drawn) -> Tuned:
        verdicts = judge.verdicts(one.subject)
        places = [place for place in NEW_PLACES for _ in range(SEEDS)]
        return Tuned(
            subject=sees(one.subject),
            place=share(seen.place == place for seen, place in zip(verdicts, places, strict=True)),
            subject_noun=share(seen.noun == sitter.noun for seen in verdicts),
            drift=sees(one.members),
            class_noun=share(seen.noun == sitter.noun for seen in judge.verdicts(one.members)),
        )

    with_prior, without_prior, base_drift = counted(drawn["prior"]), counted(drawn["bare"]), sees(before)
    return DreamboothReport(
        subject=sitter.name,
        class_noun=sitter.noun,
        method=method,
        settings=list(settings),
        own_recognised=recognizer.own_recognised,
        others_mistaken=recognizer.others_mistaken,
        base_drift=base_drift,
        with_prior=with_prior,
        without_prior=without_prior,
        drift_gone=part_gone(base_drift, without_prior.drift, with_prior.drift),
    )


def part_gone(base: float, without: float, with_prior: float) -> float | None:
    """The part of a drift that prior preservation takes away: 1 all of it, 0 none, None where nothing drifted."""
    return (without - with_prior) / (without - base) if without > base else None


def _seeded(prompts: Sequence[str], first: int = 0) -> list[tuple[str, int]]:
    return [(prompt, first + seed) for prompt in prompts for seed in range(SEEDS)]


def _train(
    sitter: Sitter, label: str, weights: Path, out: Path, method: Method, settings: Sequence[str]
) -> str:
    """The version of the subject that `raybooth train` makes, or made before."""
    # Weights in a folder that is not the box's would get the defaults of a large base.
    defaults = merge(
        DEFAULTS["pocket", method], {"base": {"model": str(weights)}, "train": {"method": method}}
    )
    config = out / f"{sitter.name}-{label}.yaml"
    config.write_text(yaml.safe_dump(defaults))
    command = ["train", str(sitter.photos), "--class", sitter.noun, "--name", f"{sitter.name}-{label}"]
    command += ["--config", str(config), "--storage", str(out / STORAGE), "--json"]
    command += [part for setting in settings for part in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", *command], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"raybooth {' '.join(command)} failed: {done.stdout.strip()}")
    version: str = json.loads(done.stdout.splitlines()[-1])["version"]
    return version


def _write_sheet(
    sitter: Sitter, before: Sequence[Image.Image], drawn: Mapping[str, _Drawn], path: Path
) -> None:
    """Photos, the subject at new places, and the class before and after."""
    photos = [_opened(photo) for photo in sorted(sitter.photos.glob("*.png"))]
    rows = [SheetRow("photos", f"one {sitter.noun}", photos)]
    for title, note, pictures in (
        ("subject", "at new places, with prior preservation", drawn["prior"].subject),
        ("subject", "at new places, without", drawn["bare"].subject),
        ("class", "drawn by the base", before),
        ("class", "with prior preservation", drawn["prior"].members),
        ("class", "without", drawn["bare"].members),
    ):
        rows.append(SheetRow(title, note, [np.asarray(one) for one in pictures[::SEEDS][:SHEET_COLUMNS]]))
    Image.fromarray(contact_sheet(f"{sitter.name}, a {sitter.noun}", rows)).save(path, optimize=True)


def _opened(path: Path) -> Pixels:
    with Image.open(path) as photo:
        return np.asarray(photo.convert("RGB"))
