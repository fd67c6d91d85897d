"""This file is where an evaluation is described: how versions are evaluated, and what was found of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import RayboothError
from cluster.storage import Storage
from orchestrator.wanted import Wanted
from training.critic import Picture, Scores

Subject = tuple[str, str]  # name and version
IMAGES = "evaluations/images"  # the gallery: an image that two evaluations want is drawn once


@dataclass(frozen=True)
class Settings:
    """How subjects are evaluated."""

    prompts: tuple[str, ...] | str = "auto"
    """Prompts, or a set of them: `object`, `live`, `pocket`, or `auto` by each subject's class and base."""
    num_images: int = 4
    """Images per prompt, as in the paper; seeds 0, 1, ... from `seed`."""
    seed: int = 0
    steps: int = 25
    guidance: float | None = None
    """`None` takes what each subject was validated with."""
    sampler: str | None = None
    """`None` is each base's own."""
    dino: str | None = None
    """Embedder of pictures; `None` is the paper's, or for the base in the box that in the box."""
    clip: str | None = None
    """Embedder of pictures and words."""

    def wanted(self, prompts: Sequence[str]) -> Wanted:
        """What to draw with some prompts."""
        return Wanted(tuple(prompts), self.num_images, self.seed, self.steps, self.guidance, self.sampler)


@dataclass(frozen=True)
class Evaluation:
    """What was found of one version of a subject."""

    subject: str
    version: str
    class_noun: str
    prompts: str
    """The name of the set, or `own`."""
    embedders: Mapping[str, str]
    """`dino` and `clip`: the model and a hash of its weights."""
    settings: Mapping[str, Any]
    scores: Scores
    pictures: Mapping[str, Sequence[Picture]] = field(repr=False)
    """`subject`, `class` and `base`."""
    photos: Sequence[bytes] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """What `evaluation.json` holds."""
        return {
            "subject": self.subject,
            "version": self.version,
            "class": self.class_noun,
            "prompts": self.prompts,
            "embedders": dict(self.embedders),
            "settings": dict(self.settings),
            **self.scores.as_json(),
        }


@dataclass
class Evaluated:
    """What an evaluation of several subjects came to."""

    done: list[Evaluation] = field(default_factory=list)
    failed: dict[Subject, RayboothError] = field(default_factory=dict)
    drawn: int = 0
    """Images that were not there before."""
    pages: dict[Subject, str] = field(default_factory=dict)
    """Paths of the pages in storage."""

    def as_json(self, storage: Storage) -> dict[str, Any]:
        """What `--json` tells: of every subject its scores without single images, and where the rest is."""
        subjects = []
        for one in self.done:
            told = one.as_json()
            del told["images"]
            page = self.pages[one.subject, one.version]
            folder = page.rpartition("/")[0]
            subjects.append(
                {**told, "page": storage.full(page), "file": storage.full(f"{folder}/evaluation.json")}
            )
        return {
            "state": "failed" if self.failed else "succeeded",
            "drawn": self.drawn,
            "subjects": subjects,
            "failed": [
                {"name": name, "version": version, "reason": error.as_json()}
                for (name, version), error in self.failed.items()
            ],
        }


def evaluation_path(name: str, version: str) -> str:
    """Where the evaluation of a version lies: `evaluation.json` and `index.html`."""
    return f"evaluations/subjects/{name}/{version}"


def evaluation_of(storage: Storage, name: str, version: str) -> dict[str, Any] | None:
    """The `evaluation.json` of a version; `None` where there is none."""
    try:
        value: dict[str, Any] = storage.read_json(f"{evaluation_path(name, version)}/evaluation.json")
    except FileNotFoundError:
        return None
    return value
