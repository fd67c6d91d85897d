"""This file is where prompts, seeds and settings become the images that are wanted of a subject."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_args

from cluster.errors import SystemFailure, UserError, did_you_mean
from cluster.storage import Storage
from orchestrator.gallery import Image
from serving.protocol import PRISTINE
from training.artifact import Identity, artifact_hash, artifact_path
from training.pipeline import BaseInfo, load_tokenizer, open_base, token_ids
from training.prompt import render_prompt
from training.recipe import SamplerName
from training.request import FORWARD_ROWS


@dataclass(frozen=True)
class Wanted:
    """What to draw of every subject."""

    prompts: tuple[str, ...]
    """May say `{subject}` and `{class}`; the same prompt twice is drawn once."""
    num_images: int = 4
    """Per prompt; image i has the seed `seed + i`."""
    seed: int = 0
    steps: int = 25
    guidance: float | None = None
    """Guidance scale; 1 is without, `None` takes what each subject was validated with."""
    sampler: str | None = None
    """`None` is each base's own."""
    negative_prompt: str = ""

    @property
    def per_subject(self) -> int:
        """Images of each subject."""
        return len(set(self.prompts)) * self.num_images

    def check(self) -> None:
        """Refuse what no subject can be drawn with.

        Raises:
            UserError: There is no such sampler.
        """
        known = get_args(SamplerName)
        if self.sampler is not None and self.sampler not in known:
            raise UserError(f"there is no sampler {self.sampler!r}", "", did_you_mean(self.sampler, known))


def wanted_images(
    storage: Storage, name: str, version: str, wanted: Wanted, device: str
) -> tuple[BaseInfo, list[Image]]:
    """What is wanted of a subject, prompt by prompt and seed by seed, and the base that draws it.

    Args:
        storage: Root that holds its artifact.
        name: The subject.
        version: Of its artifact.
        wanted: What is wanted of every subject.
        device: What it is drawn on, `cuda` or `cpu`.

    Raises:
        SystemFailure: It has no artifact.
        UserError: Its base is not there, or a prompt cannot be used.
    """
    path = artifact_path(name, version)
    manifest = storage.manifest(path)
    if manifest is None:
        raise SystemFailure(f"{storage.full(path)} is missing or was not finished", "", f"train {name} again")
    base = _base(manifest["base"]["model"], manifest["base"]["revision"])
    identity = Identity.from_json(manifest["identity"])
    guidance = wanted.guidance
    if guidance is None:
        guidance = float(manifest["recipe"]["validate"]["guidance"])
    prompts = {
        prompt: render_prompt(prompt, identity.class_noun, identity.identifier, identity.template)
        for prompt in wanted.prompts
    }
    who = (name, version, artifact_hash(manifest))
    return base, _images(base, who, prompts, wanted, guidance, device, identity.words)


def pristine_images(
    base: BaseInfo, class_noun: str, wanted: Wanted, guidance: float, device: str
) -> list[Image]:
    """What is wanted of a class, drawn by the pristine base; the prompts may say `{class}`.

    Raises:
        UserError: A prompt cannot be used.
    """
    prompts = {prompt: render_prompt(prompt, class_noun, None) for prompt in wanted.prompts}
    who = (PRISTINE, re.sub(r"[^a-z0-9]+", "-", class_noun.lower()), "")
    return _images(base, who, prompts, wanted, guidance, device)


def _images(
    base: BaseInfo,
    who: tuple[str, str, str],
    prompts: Mapping[str, str],
    wanted: Wanted,
    guidance: float,
    device: str,
    words: Mapping[str, Sequence[int]] = {},
) -> list[Image]:
    """The images of `who` (subject, version, artifact) with prompts and what they read; `words` as `token_ids`."""
    texts = [*prompts.values(), wanted.negative_prompt]
    token_ids(
        _tokenizer(base.model, base.revision), texts, base.token_limit, words
    )  # refuses what is too long
    subject, version, artifact = who
    return [
        Image(
            subject=subject,
            version=version,
            artifact=artifact,
            base_revision=base.revision,
            width=FORWARD_ROWS[device],
            prompt=prompt,
            words=rendered,
            seed=wanted.seed + number,
            negative_prompt=wanted.negative_prompt,
            steps=wanted.steps,
            guidance=guidance,
            sampler=wanted.sampler or base.sampler,
        )
        for prompt, rendered in prompts.items()
        for number in range(wanted.num_images)
    ]


@lru_cache(maxsize=8)
def _base(model: str, revision: str) -> BaseInfo:
    return open_base(model, revision)


@lru_cache(maxsize=8)
def _tokenizer(model: str, revision: str) -> Any:
    return load_tokenizer(_base(model, revision))
