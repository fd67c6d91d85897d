"""This file is where the demo runs: the shipped subject from its photos to a contact sheet, offline."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cluster.storage import Storage
from orchestrator.progress import Stages
from orchestrator.sheet import SheetRow, contact_sheet
from orchestrator.single import Outcome
from orchestrator.spec import load_run
from orchestrator.train import train_subject
from pocket.subject import SUBJECT_CLASS, SUBJECT_NAME, write_photos
from training.artifact import open_artifact
from training.draw import Drawer
from training.pipeline import open_base
from training.png import Pixels, decode_png, encode_png
from training.prior import prior_pngs
from training.prompt import render_prompt
from training.request import DrawRequest

PROMPTS = (
    "a photo of {subject} on the beach",
    "a photo of {subject} in the snow",
    "a photo of {subject} in space",
    "a photo of {subject} in the forest",
    "a photo of {subject} on a red background",
)
SEED = 0


@dataclass
class DemoResult:
    """Where the sheet is, and what became of the run."""

    sheet: Path
    outcome: Outcome


def run_demo(out: Path, method: str, stages: Stages) -> DemoResult:
    """Train the shipped subject on the pocket base and draw it before and after.

    Args:
        out: Folder that takes the photos, the storage root and the sheet.
        method: `lora` or `full`.
        stages: Shows progress.

    Returns:
        The contact sheet's path and the run's outcome.
    """
    out = out.absolute()
    storage = Storage(str(out / "raybooth-data"))
    storage.check_writable()
    photos = write_photos(out / "photos")
    subject = {"name": SUBJECT_NAME, "class": SUBJECT_CLASS, "images": [str(out / "photos")]}
    run = load_run(None, {"subject": subject, "train": {"method": method}}, [])
    outcome = train_subject(run, storage, stages)
    base = open_base(run.base.model)
    with (
        open_artifact(storage, outcome.subject, outcome.version) as artifact,
        stages.stage("drawing before and after", 2 * len(PROMPTS)) as stage,
    ):
        identity = artifact.identity
        prompts = [
            render_prompt(p, identity.class_noun, identity.identifier, identity.template) for p in PROMPTS
        ]
        asked = [
            DrawRequest(prompt, SEED + i, guidance=run.validate_.guidance, steps=run.validate_.steps)
            for i, prompt in enumerate(prompts)
        ]
        before = Drawer(base).draw(asked)
        stage.at(len(PROMPTS))
        after = Drawer(base, artifact.folder, artifact.manifest).draw(asked)
        stage.at(2 * len(PROMPTS))
    rows = [
        SheetRow(
            "photos", f"what you bring: five pictures of one {SUBJECT_CLASS}", [_photo(p) for p in photos]
        ),
    ]
    if outcome.prior_key:
        class_images = [decode_png(png) for png in prior_pngs(storage, outcome.prior_key, len(PROMPTS))]
        rows.append(
            SheetRow("class prior", f'"a photo of a {SUBJECT_CLASS}", drawn by the base', class_images)
        )
    captions = [prompt.removeprefix("a photo of ") for prompt in prompts]
    rows.append(SheetRow("before", "the base does not know it", before, captions))
    rows.append(SheetRow("after", f"{run.train.steps} steps later: same prompts, same seeds", after))
    sheet = out / "contact-sheet.png"
    sheet.write_bytes(encode_png(contact_sheet(f"raybooth: {SUBJECT_NAME}, a {SUBJECT_CLASS}", rows), None))
    return DemoResult(sheet, outcome)


def _photo(path: Path) -> Pixels:
    """A photo as uint8 [S, S, 3]."""
    return np.asarray(Image.open(path).convert("RGB"))
