"""This file is where a run is made ready before Ray starts: every mistake of the user is found here.

Photos are read and stored, the base is opened, the identifier chosen, and the run gets its fingerprint: what decides
the tensors, and neither the subject's name nor the time.
"""

import json
from dataclasses import dataclass
from typing import Any

from cluster.errors import UserError
from cluster.registry import Registry
from cluster.storage import Storage, sha256
from training.artifact import Identity
from training.identifier import choose_identifier
from training.intake import TABLE, StoredPhotos, read_photos, store_photos
from training.pipeline import BaseInfo, load_tokenizer, open_base, token_ids
from training.prior import prior_key
from training.prompt import TEMPLATE, render_prompt
from training.recipe import TRAINED_SECTIONS, Run
from training.stream import ImageSet


@dataclass(frozen=True)
class Prepared:
    """A run that can start: nothing about it can be the user's mistake any more."""

    run: Run
    base: BaseInfo
    photos: StoredPhotos
    identity: Identity
    subject_ids: list[int]
    class_ids: list[int]
    prior_key: str | None
    fingerprint: str
    notes: list[str]

    @property
    def name(self) -> str:
        """The subject's name."""
        return self.run.subject.name

    def subject_images(self) -> ImageSet:
        """The subject's photos, to encode."""
        where = f"{self.photos.path}/{TABLE}"
        return ImageSet(self.photos.key, {TABLE: (where, self.photos.digest)}, self.run.data)


def prepare(run: Run, storage: Storage, device: str = "cpu") -> Prepared:
    """Check a run and store its photos.

    Args:
        run: The run.
        storage: The root that takes the photos.
        device: `cpu` or `cuda`, what class images will be drawn on.

    Raises:
        UserError: A photo, the base, the identifier or a prompt cannot be used.
    """
    base = open_base(run.base.model, run.base.revision)
    tokenizer = load_tokenizer(base)
    noun = run.subject.class_noun
    choice = choose_identifier(tokenizer, run.subject.identifier, noun)
    subject_prompt = render_prompt(run.train.prompt, noun, choice.identifier, TEMPLATE)
    class_prompt = render_prompt(run.prior.prompt, noun, None)
    for prompt in run.validate_.prompts:
        render_prompt(prompt, noun, choice.identifier, TEMPLATE)
    ids = token_ids(tokenizer, [subject_prompt, class_prompt], base.token_limit).tolist()
    intake = read_photos(run.subject.images, base.image_size)
    photos = store_photos(storage, run.subject.name, intake, base.image_size)
    key = prior_key(base, run.prior, noun, device) if run.prior.weight > 0 else None
    decisive = {
        "recipe": {
            section: value
            for section, value in run.model_dump(mode="json", by_alias=True).items()
            if section in TRAINED_SECTIONS
        },
        "base": base.revision,
        "photos": photos.key,
        "subject_ids": ids[0],
        "class_ids": ids[1],
        "prior": key,
    }
    return Prepared(
        run=run,
        base=base,
        photos=photos,
        identity=Identity(choice.identifier, noun, TEMPLATE, tuple(choice.token_ids)),
        subject_ids=ids[0],
        class_ids=ids[1],
        prior_key=key,
        fingerprint=sha256(json.dumps(decisive, sort_keys=True).encode())[:16],
        notes=[*intake.notes, *choice.warnings],
    )


@dataclass(frozen=True)
class Destination:
    """Where a run's version goes, and what is there of it already."""

    version: str
    state: str
    """`new`, `unfinished` (goes on) or `succeeded` (nothing to do)."""
    record: dict[str, Any]

    @property
    def fresh(self) -> bool:
        """Whether nothing of it exists yet."""
        return self.state == "new"


def record_path(name: str, version: str) -> str:
    """Where a run's own record lies."""
    return f"runs/{name}/{version}/run.json"


def destination(storage: Storage, name: str, fingerprint: str, new_version: bool) -> Destination:
    """The version a run of this fingerprint belongs to.

    An unfinished run of the same fingerprint goes on, whatever the flags say. A finished one is left alone unless
    `new_version`. Anything else gets the next number.
    """
    registry = Registry(storage)
    registered = registry.show(name)["versions"] if name in registry.names() else {}
    records = {
        version: storage.read_json(record_path(name, version))
        for version in storage.names(f"runs/{name}")
        if storage.exists(record_path(name, version))
    }
    for version, record in records.items():
        if record["fingerprint"] == fingerprint and version not in registered:
            return Destination(version, "unfinished", record)
    if not new_version:
        for version, entry in reversed(list(registered.items())):
            if entry["fingerprint"] == fingerprint:
                return Destination(version, "succeeded", records.get(version, {}))
    numbers = [int(v.removeprefix("v")) for v in {*registered, *records} if v.removeprefix("v").isdigit()]
    return Destination(f"v{max(numbers, default=0) + 1}", "new", {})


def one_at_a_time(name: str) -> UserError:
    """The refusal of a second process that trains the same subject."""
    return UserError(
        f"{name} is being trained by another process",
        "its lock is held",
        "wait for it, or give another --name",
    )
