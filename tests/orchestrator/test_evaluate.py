"""An evaluation: what is drawn for it, what it says, and that the same command draws nothing again."""

import json
import random
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import typer.main
from PIL import Image

from cluster.errors import UserError
from cluster.registry import CANDIDATE, Registry
from cluster.storage import Storage
from orchestrator.campaign_settings import Gate
from orchestrator.cli import app
from orchestrator.cli_evaluate import choose, read_settings
from orchestrator.evaluation import evaluation_of
from orchestrator.hold import hold
from orchestrator.progress import Lines
from pocket.clip import FOLDER
from pocket.scenes import SCENES
from pocket.subject import draw_invented, invent, subject_photos
from pocket.world import compose
from training.artifact import FORMAT, KIND, Identity, artifact_path, write_weights
from training.critic import Critic, Picture
from training.embedders import open_embedder
from training.intake import read_photos, store_photos
from training.lora import attach
from training.pipeline import load_text_encoder, load_unet, open_base
from training.png import Pixels
from training.recipe import Run
from training.stream import Pool

PROMPTS = ("a photo of {subject} in space", "a photo of {subject} in the city")


def pixels(image: Image.Image) -> Pixels:
    return np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS))


# -- known cases: pictures of a world that we draw ourselves -----------------------------------------------


@pytest.fixture(scope="module")
def critic() -> Critic:
    clip = open_embedder("pocket")
    return Critic([pixels(photo) for photo in subject_photos("robot", 3)], "robot", clip, clip)


def scenes(seed: int, right: bool = True) -> list[Picture]:
    """The robot of a seed in every scene; with `right` off in the scene after the one that its prompt says."""
    rng, places = random.Random(7), list(SCENES)
    shown = places if right else [*places[1:], places[0]]
    drawing = draw_invented(invent("robot", seed))
    return [
        Picture(f"a photo of {{subject}} {said}", 0, pixels(compose(drawing, place, rng, 64)))
        for said, place in zip(places, shown, strict=True)
    ]


def test_the_subject_scores_near_its_photos_and_another_of_its_class_does_not(critic: Critic) -> None:
    own, other = critic.score(scenes(3)), critic.score(scenes(4))
    assert other.metrics["dino"].high < own.metrics["dino"].low
    assert own.metrics["dino"].value > own.ceiling["dino"].low - 0.1


def test_a_picture_of_another_place_than_asked_for_scores_lower_on_its_prompt_alone(critic: Critic) -> None:
    right, wrong = critic.score(scenes(3)), critic.score(scenes(3, right=False))
    assert wrong.metrics["clip_t"].high < right.metrics["clip_t"].low
    assert wrong.metrics["dino"].value == pytest.approx(right.metrics["dino"].value, abs=0.1)


def test_photos_drawn_by_heart_are_copies_although_dino_praises_them(critic: Critic) -> None:
    photos = [pixels(photo) for photo in subject_photos("robot", 3)]
    found = critic.score([Picture("a photo of {subject}", seed, one) for seed, one in enumerate(photos)])
    assert found.metrics["copies"].value == 1.0 and [row.photo for row in found.rows] == [0, 1, 2, 3]
    assert found.metrics["dino"].value > critic.score(scenes(3)).metrics["dino"].value
    assert critic.score(scenes(3)).metrics["copies"].value < 0.5


def test_a_class_that_has_become_the_subject_shows_as_pres_and_drift(critic: Critic) -> None:
    own, others = scenes(3), scenes(4)
    lost, kept = critic.score(own, own, others), critic.score(own, others, others)
    assert kept.drift and (kept.drift.value, kept.drift.high) == (0.0, 0.0)
    assert lost.drift and lost.drift.low > 0
    assert lost.metrics["pres"].low > kept.metrics["pres"].high
    assert kept.base["dino"].value == pytest.approx(kept.metrics["pres"].value)


def test_without_pictures_of_the_class_and_twins_there_is_neither_pres_nor_diversity(critic: Critic) -> None:
    assert set(critic.score(scenes(3)).metrics) == {"dino", "clip_i", "clip_t", "copies"}


# -- the command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def booth(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A root with rex, published, with photos; and tom, whose photos are gone."""
    scratch = tmp_path_factory.mktemp("booth")
    storage, base = Storage(str(scratch / "storage")), open_base(str(tiny_base))
    for number, photo in enumerate(subject_photos("robot", 3)):
        photo.save(scratch / f"{number}.png")
    store_photos(storage, "rex", read_photos([str(scratch / "0.png"), str(scratch / "1.png")], 16), 16)
    for name in ("rex", "tom"):
        run = Run.model_validate(
            {
                "base": {"model": str(tiny_base)},
                "subject": {"name": name, "class": "dog", "images": ["photos"]},
                "validate": {"guidance": 3.0},
            }
        )
        unet, text_encoder = load_unet(base), load_text_encoder(base)
        attach(unet, text_encoder, run.train.lora, False, seed=1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            for parameter in unet.parameters():
                if parameter.requires_grad:
                    parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
        write_weights(base, run, unet, text_encoder, scratch / name)
        meta = {
            "kind": KIND,
            "format": FORMAT,
            "method": "lora",
            "base": {"model": base.model, "revision": base.revision},
            "identity": Identity("zwx", "dog", "a {identifier} {class}", (97,)).as_json(),
            "recipe": run.model_dump(mode="json", by_alias=True),
        }
        storage.publish(scratch / name, artifact_path(name, "v1"), meta)
        entry = {"artifact": artifact_path(name, "v1"), "fingerprint": name}
        Registry(storage).add(name, "v1", entry, CANDIDATE)
    return storage


@pytest.mark.slow
def test_the_command_scores_what_it_can_draws_once_and_fails_alone(
    booth: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    words = ["evaluate", "rex@v1", "tom@v1", "--prompts", str(file), "-n", "2", "--json"]
    words += ["--storage", booth.uri, "--dino", "pocket", "--clip", str(FOLDER)]
    command = typer.main.get_command(app)

    def run() -> dict:
        assert command.main(words, standalone_mode=False) == 3  # tom has no photos
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    told = run()
    assert told["drawn"] == 2 * (2 + 2) + 2 * 2  # the subject, the class by its weights, and by the base
    [tom] = told["failed"]
    assert tom["name"] == "tom" and "photos" in tom["reason"]["what"]
    [rex] = told["subjects"]
    assert set(rex["scores"]) == {"dino", "clip_i", "clip_t", "pres", "div", "copies"}
    assert rex["scores"]["dino"]["n"] == 4 and rex["drift"]["value"] != 0 and rex["prompts"] == "own"
    assert str(FOLDER) in rex["embedders"]["clip"] and rex["embedders"]["dino"].startswith("pocket (")
    kept = evaluation_of(booth, "rex", "v1")
    assert kept and len(kept["images"]) == 4 and kept["scores"] == rex["scores"]
    page = Path(rex["page"]).read_text("utf-8")
    assert page.count("<img") == 2 + 4 + 4 + 4 and "a photo of {subject} in space" in page
    assert "http://" not in page and "https://" not in page  # it needs no network
    again = run()
    assert again["drawn"] == 0 and again["subjects"][0]["scores"] == rex["scores"]

    # and a gate that asks for the same drawings
    def held(**demands: float) -> dict:
        gate = Gate(prompts=PROMPTS, num_images=2, dino_model="pocket", clip_model=str(FOLDER), **demands)
        versions = [("rex", "v1"), ("tom", "v1")]
        return hold(booth, gate, versions, Lines(sys.stderr), Pool(), nullcontext)

    dino = rex["scores"]["dino"]["value"]
    found, registry = held(dino=min(dino + 0.01, 1.0)), Registry(booth)
    why = {one["name"]: one["objections"][0] for one in found["held_back"]}
    assert found["passed"] == 0 and f"dino is {dino:.3f}, and " in why["rex"]
    assert "the photos of tom v1 are not known" in why["tom"]
    assert registry.show("rex")["aliases"] == {"candidate": "v1"} and registry.served() == {}
    assert held(dino=-1.0) == found  # what was judged stays so; a person may promote it
    assert registry.promote("rex", "v1") == "v1" and registry.served() == {"rex": "v1"}


def test_names_that_mean_nothing_are_refused(booth: Storage) -> None:
    assert choose(["rex@v1", "tom@candidate", "rex@v1"], booth, "") == [("rex", "v1"), ("tom", "v1")]
    with pytest.raises(UserError, match="there is no subject 'rx'"):
        choose(["rx"], booth, "")
    with pytest.raises(UserError, match="no set of prompts and no file"):
        read_settings("live-ish", 4, 0, 25, None, "", "")
