"""This file is where a run is made ready before Ray starts: every mistake of the user is found here.

Photos are read and stored, the base is opened, the identifier chosen, and the run gets its fingerprint: what decides
the tensors, and neither the subject's name nor the time.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import UserError
from cluster.registry import Registry
from cluster.storage import Storage, sha256
from orchestrator import tracking
from training import focus
from training.artifact import Identity
from training.buckets import Rows, bucket_of, bucket_step
from training.captions import SUFFIX, read_captions
from training.decisive import decisive
from training.embedders import embedders_of, find_embedder
from training.framing import Sizes, image_sizes
from training.identifier import Choice, choose_identifier, new_identifier, token_ids_of
from training.intake import TABLE, Intake, StoredPhotos, read_photos, store_photos
from training.latents import ImageSet, Shard
from training.lease import Lease
from training.masks import latent_masks
from training.noise import trained_scheduler
from training.optimizer_settings import refuse_missing
from training.pipeline import BaseInfo, load_tokenizer, open_base, token_ids, tokenizers, unsaid_ids
from training.prior import prior_key
from training.prompt import CLASS_PROMPT, TEMPLATE, render_prompt
from training.recipe import Run
from training.samplers import sampler_table
from training.shapes import refuse_new_tokens, refuse_untrainable


@dataclass(frozen=True)
class Prepared:
    """A run that can start: nothing about it can be the user's mistake any more."""

    run: Run
    base: BaseInfo
    photos: StoredPhotos
    identity: Identity
    subject_ids: list[int]
    class_ids: list[int]
    sample_ids: list[list[int]]
    """Of the empty prompt and the prompts of the sample grid; empty when it has none."""
    look_ids: list[list[int]]
    """Of the empty prompt, of those of `train.stop` and of that of the class; empty without it."""
    empty_ids: list[int]
    """Of the empty prompt, where captions are dropped; else none."""
    caption_ids: list[list[int]]
    """Of the photos' own prompts, in order, or of `train.templates`; empty where all share one."""
    masks: Rows | None
    """[N, h, w], 0 to 1: where each training image counts; `None` is everywhere."""
    sizes: Sizes | None
    """[N, 6], of each training image, of a base that is told them."""
    photo_names: list[str]
    fingerprint: str
    notes: list[str]

    @property
    def name(self) -> str:
        """The subject's name."""
        return self.run.subject.name

    def prior_key(self, device: str) -> str | None:
        """The address of its prior set when `device` draws it; `None` when it takes no class images."""
        prior = self.run.prior
        return prior_key(self.base, prior, self.identity.class_noun, device) if prior.draws else None

    def lease(
        self,
        storage_uri: str,
        version: str,
        subject: Sequence[Any],
        of_class: Sequence[Any],
        prior_key: str | None,
        until: int | None = None,
    ) -> Lease:
        """The run as a gang takes it, with references to its latents and those of its class; the rest as of `Lease`."""
        return Lease(
            run=self.run.model_dump(mode="json", by_alias=True),
            name=self.name,
            version=version,
            base_model=self.base.model,
            base_revision=self.base.revision,
            storage_uri=storage_uri,
            subject_latents=subject,
            class_latents=of_class if self.run.prior.draws else (),
            subject_ids=self.subject_ids,
            class_ids=self.class_ids,
            identity=self.identity.as_json(),
            meta={
                "fingerprint": self.fingerprint,
                "prior_key": prior_key,
                "subject_names": self.photo_names,
            },
            sample_ids=self.sample_ids,
            look_ids=self.look_ids,
            caption_ids=self.caption_ids,
            empty_ids=self.empty_ids,
            masks=self.masks,
            sizes=self.sizes,
            until=until,
        )

    def subject_images(self) -> ImageSet:
        """The subject's photos, to encode."""
        data = self.run.data
        images = self.photos.count * data.images_per_photo
        shard = Shard(f"{self.photos.path}/{TABLE}", self.photos.digest, images)
        return ImageSet(self.photos.key, {TABLE: shard}, data)


def prepare(run: Run, storage: Storage) -> Prepared:
    """Check a run and store its photos.

    Args:
        run: The run.
        storage: The root that takes the photos.

    Raises:
        UserError: A photo, the base, the identifier, a prompt, a LoRA target, the objective, the sampler or the
            optimizer cannot be used, or no photo would be left to train.
    """
    base = open_base(run.base.model, run.base.revision)
    tokenizer, noun = load_tokenizer(base), run.subject.class_noun
    choice, initializer_ids = _named(run, base, tokenizer)
    identity = Identity(choice.identifier, noun, TEMPLATE, tuple(choice.token_ids), initializer_ids)
    subject_prompt = render_prompt(run.train.prompt, noun, choice.identifier)
    class_prompt = render_prompt(run.prior.prompt, noun, None)
    samples = [render_prompt(prompt, noun, choice.identifier) for prompt in run.validate_.prompts]
    prompts = [subject_prompt, class_prompt, run.prior.negative_prompt, *samples]
    ids = token_ids(tokenizer, prompts, base.token_limit, identity.words).tolist()
    subject_ids, class_ids, _, *sample_ids = ids
    [unsaid] = unsaid_ids(base, tokenizer).tolist()
    refuse_untrainable(base, run.train)
    refuse_missing(run.train.optimizer)
    focus.refuse_missing(run.data.crop)
    tracking.refuse_missing(run.track)
    trained_scheduler(base.scheduler, run.train.objective)
    if run.prior.draws:
        sampler_table(run.prior.sampler, run.prior.steps, base.scheduler)
    objective = run.train.objective
    intake = read_photos(run.subject.images, base.image_size, objective.mask)
    _check_holdout(run, intake)
    run = _sized(run, base, intake)
    captions, notes = list(run.train.templates), list(intake.notes)
    if run.train.captions == "files":
        names = [photo.name for photo in intake.photos]
        captions, untold = read_captions(run.subject.images, names, run.train.prompt)
        notes = [note for note in notes if not _is_caption(note)] + untold
    texts = [render_prompt(caption, noun, choice.identifier) for caption in captions]
    caption_ids = token_ids(tokenizer, texts, base.token_limit, identity.words).tolist() if texts else []
    photos = store_photos(storage, run.subject.name, intake, base.image_size)
    decides = [decisive(run), base.revision, photos.key, subject_ids, class_ids]
    if caption_ids:
        decides.append(caption_ids)
    if initializer_ids:
        decides.append([choice.identifier, initializer_ids])
    masks = None
    if objective.mask != "none":
        masks = latent_masks(intake, base.image_size, base.vae_factor, run.data)
        decides.append(sha256(b"".join(mask.tobytes() for mask in masks)))
    sizes = None
    if base.kind.sized:
        sizes = image_sizes(intake, base.image_size, run.data, bucket_step(base.image_size, base.vae_factor))
        decides.append(sha256(sizes.tobytes()))
    if run.train.load_best_at_end:
        decides += [run.checkpoint.every, run.validate_.samples]  # they decide which one is the best
    look_ids: list[list[int]] = []
    if run.train.stop:
        dino, clip = embedders_of(base.model, run.train.stop)
        find_embedder(dino)
        if find_embedder(clip)[1] != "clip":
            raise UserError(
                f"train.stop.clip: {clip} reads no words", "it embeds pictures alone", "name a CLIP"
            )
        asked = [render_prompt(prompt, noun, choice.identifier) for prompt in run.train.stop.prompts]
        asked.append(render_prompt(CLASS_PROMPT, noun, None))
        look_ids = [unsaid, *token_ids(tokenizer, asked, base.token_limit, identity.words).tolist()]
        decides.append(run.validate_.guidance)
    return Prepared(
        run=run,
        base=base,
        photos=photos,
        identity=identity,
        subject_ids=subject_ids,
        class_ids=class_ids,
        sample_ids=[unsaid, *sample_ids] if samples else [],
        look_ids=look_ids,
        empty_ids=unsaid if run.train.objective.caption_dropout else [],
        caption_ids=caption_ids,
        masks=masks,
        sizes=sizes,
        photo_names=[photo.name for photo in intake.photos],
        fingerprint=sha256(json.dumps(decides, sort_keys=True).encode())[:16],
        notes=[*notes, *choice.warnings],
    )


def _named(run: Run, base: BaseInfo, tokenizer: Any) -> tuple[Choice, tuple[int, ...]]:
    """How the subject is named, and the tokens that tokens of its own start as; none where it has none."""
    wanted, noun, tokens = run.subject.identifier, run.subject.class_noun, run.train.new_tokens
    if not tokens.count:
        return choose_identifier(tokenizer, wanted, noun), ()
    refuse_new_tokens(base, tokenizer)
    first, *_ = tokenizers(tokenizer)  # of the same words as the others
    choice = new_identifier(first, wanted, noun, tokens.count)
    for setting, prompt in (
        ("prior.prompt", run.prior.prompt),
        ("prior.negative_prompt", run.prior.negative_prompt),
        ("subject.class", noun),
    ):
        if choice.identifier in prompt.lower():
            raise UserError(
                f"{setting} names the subject's own token",
                f"{choice.identifier} in {prompt!r}: the base, which draws the class, does not know it",
                "leave it out",
            )
    word = tokens.initializer or noun
    ids = token_ids_of(first, word)
    if not ids or first.unk_token_id in ids:
        raise UserError(
            f"new tokens cannot start as {word!r}",
            "the base's tokenizer has no tokens for it",
            "set train.new_tokens.initializer to a word that it knows",
        )
    return choice, ids


def _sized(run: Run, base: BaseInfo, intake: Intake) -> Run:
    """The run with its class images in the sizes of its photos."""
    step, square = bucket_step(base.image_size, base.vae_factor), (base.image_size, base.image_size)
    found = [
        bucket_of(photo.width, photo.height, base.image_size, step) if run.data.buckets else square
        for photo in intake.photos
    ]
    if base.longest_side and max(map(max, found)) > base.longest_side:
        raise UserError(
            "a photo is too long for the base in its own shape",
            f"it would be {max(found, key=max)} pixels, and the base sees {base.longest_side} along a side",
            "set data.buckets: false, or cut the photo",
        )
    # squares alone are the class images of everybody
    sizes = () if set(found) == {square} else tuple(sorted(set(found)))
    if run.prior.sizes not in ((), sizes):
        raise UserError(
            "prior.sizes is not that of the photos",
            f"it is {run.prior.sizes}, they are {sizes or square}",
            "leave it out; data.buckets: true sets it",
        )
    trained = found[: len(found) - run.data.holdout]
    if run.prior.target == "base" and set(found) - set(trained):
        raise UserError(
            "the photos that are held out have a size of their own",
            f"{min(set(found) - set(trained))}, and with prior.target: base the class's rows are the photos'",
            "hold out others, or set data.buckets: false",
        )
    if run.prior.draws and run.prior.num_images < len(sizes):
        raise UserError(
            f"prior.num_images is {run.prior.num_images}, fewer than the sizes of the photos",
            ", ".join(f"{width}x{height}" for width, height in sizes),
            f"set it to at least {len(sizes)}, or data.buckets: false",
        )
    return run.model_copy(update={"prior": run.prior.model_copy(update={"sizes": sizes})})


def _is_caption(note: str) -> bool:
    return note.startswith("skipped ") and note.partition(":")[0].endswith(SUFFIX)


def _check_holdout(run: Run, intake: Intake) -> None:
    held, names = run.data.holdout, [photo.name for photo in intake.photos]
    if held >= len(names):
        raise UserError(
            f"data.holdout is {held}, which leaves no photo to train",
            f"there are {len(names)}: {', '.join(names)}",
            f"set it to at most {len(names) - 1}",
        )


@dataclass(frozen=True)
class Destination:
    """Where a run's version goes, and what is there of it already."""

    version: str
    state: str
    """`new`, `unfinished` (goes on) or `succeeded` (nothing to do)."""
    record: dict[str, Any]


def run_path(name: str, version: str) -> str:
    """Where a run keeps what is its own."""
    return f"runs/{name}/{version}"


def record_path(name: str, version: str) -> str:
    """Where a run's own record lies."""
    return f"{run_path(name, version)}/run.json"


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
        if record["fingerprint"] == fingerprint and record["state"] != "succeeded":
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
