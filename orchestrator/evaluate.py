"""This file is where registered subjects are evaluated: images drawn, scored, and the scores kept and shown."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial

from cluster.errors import RayboothError, SystemFailure, UserError
from cluster.machine import sees_gpu
from cluster.objects import StorageError
from cluster.registry import Registry
from cluster.storage import Storage
from orchestrator.batch import BatchResult, Look, OpenRay, draw_asked, with_pool
from orchestrator.evaluation import IMAGES, Evaluated, Evaluation, Settings, Subject, evaluation_path
from orchestrator.evaluation_page import write_page
from orchestrator.gallery import Entry, Gallery, Image
from orchestrator.mlflow_tracker import keep_evaluation
from orchestrator.photos import photo_pngs
from orchestrator.progress import Stages
from orchestrator.protocol import SETS, class_prompts, prompts_for
from orchestrator.wanted import pristine_images, wanted_images
from serving.protocol import PRISTINE
from training.artifact import artifact_path
from training.critic import Critic, Picture
from training.defaults import base_family
from training.embedders import DEFAULTS, Embedder, decoded, open_embedder
from training.pipeline import BaseInfo, open_base
from training.png import Pixels
from training.stream import Pool

Wants = tuple[BaseInfo, list[Image]]


def evaluate(
    storage: Storage,
    subjects: Sequence[Subject],
    settings: Settings,
    stages: Stages,
    address: str | None,
    actors: int | None = None,
) -> Evaluated:
    """Draw and score versions; what was drawn before is not drawn again.

    Args:
        storage: Root.
        subjects: Name and version of each.
        settings: How.
        stages: Shows progress.
        address: Ray cluster to join; `None` starts a private one when there is something to draw.
        actors: How many draw; `None` is one per GPU, or one without any.

    Returns:
        What was found; a subject that cannot be evaluated does not stop the others.

    Raises:
        UserError: An embedder or a setting cannot be used.
        SystemFailure: A worker failed, or storage cannot be written.
    """

    return with_pool(
        storage,
        actors,
        address,
        lambda pool, ray: evaluate_with(storage, subjects, settings, stages, pool, ray),
    )


def evaluate_with(
    storage: Storage,
    subjects: Sequence[Subject],
    settings: Settings,
    stages: Stages,
    pool: Pool,
    ray: OpenRay,
) -> Evaluated:
    """`evaluate` with actors, and a session to enter, that are the caller's."""
    settings.wanted(()).check()
    sitters, failed = _sitters(storage, subjects, settings)
    for sitter in sitters.values():  # before anything is drawn
        _embedders(sitter, settings)
    drawn = _draw(storage, sitters, settings, stages, pool, ray)
    return _score(storage, sitters, failed, settings, stages, drawn)


@dataclass(frozen=True)
class Sitter:
    """A version that is evaluated, as its artifact says."""

    name: str
    version: str
    class_noun: str
    model: str
    revision: str
    guidance: float
    set_name: str
    prompts: tuple[str, ...]
    photos: Sequence[bytes] = field(repr=False)

    @property
    def family(self) -> str:
        """Of its base."""
        return base_family(self.model)

    @property
    def base_key(self) -> Subject:
        """What the base's drawings for it are asked under."""
        return (PRISTINE, f"{self.class_noun}@{self.revision}@{self.guidance}@{self.set_name}")


def _sitters(
    storage: Storage, subjects: Sequence[Subject], settings: Settings
) -> tuple[dict[Subject, Sitter], dict[Subject, RayboothError]]:
    found: dict[Subject, Sitter] = {}
    failed: dict[Subject, RayboothError] = {}
    for name, version in dict.fromkeys(subjects):
        try:
            found[name, version] = _sitter(storage, name, version, settings)
        except StorageError as error:
            failed[name, version] = error.failure()
        except RayboothError as error:
            failed[name, version] = error
    return found, failed


def _sitter(storage: Storage, name: str, version: str, settings: Settings) -> Sitter:
    path = artifact_path(name, version)
    manifest = storage.manifest(path)
    if manifest is None:
        raise SystemFailure(f"{storage.full(path)} is missing or was not finished", "", f"train {name} again")
    noun, model = str(manifest["identity"]["class_noun"]), str(manifest["base"]["model"])
    chosen = settings.prompts
    if chosen == "auto":
        chosen = prompts_for(noun, base_family(model))
    set_name, prompts = ("own", tuple(chosen)) if not isinstance(chosen, str) else (chosen, SETS[chosen])
    guidance = settings.guidance
    if guidance is None:
        guidance = float(manifest["recipe"]["validate"]["guidance"])
    photos = photo_pngs(storage, name, version)
    revision = str(manifest["base"]["revision"])
    return Sitter(name, version, noun, model, revision, guidance, set_name, prompts, photos)


def _draw(
    storage: Storage,
    sitters: Mapping[Subject, Sitter],
    settings: Settings,
    stages: Stages,
    pool: Pool,
    ray: OpenRay,
) -> BatchResult:
    """Draw what an evaluation needs: each subject, its class by the same weights, and the class by the base, once."""
    asked: dict[Subject, Look] = {}
    for who, sitter in sitters.items():
        asked[who] = partial(_of_subject, storage, sitter, settings, pool.device)
        asked[sitter.base_key] = partial(_of_base, sitter, settings, pool.device)
    out = Storage(storage.full(IMAGES))
    return draw_asked(storage, out, asked, pool, stages, ray=ray, sheets=False)


def _of_subject(storage: Storage, sitter: Sitter, settings: Settings, device: str) -> Wants:
    prompts = (*sitter.prompts, *class_prompts(sitter.prompts))
    return wanted_images(storage, sitter.name, sitter.version, settings.wanted(prompts), device)


def _of_base(sitter: Sitter, settings: Settings, device: str) -> Wants:
    base, wanted = open_base(sitter.model, sitter.revision), settings.wanted(class_prompts(sitter.prompts))
    return base, pristine_images(base, sitter.class_noun, wanted, sitter.guidance, device)


def _score(
    storage: Storage,
    sitters: Mapping[Subject, Sitter],
    failed: Mapping[Subject, RayboothError],
    settings: Settings,
    stages: Stages,
    drawn: BatchResult,
) -> Evaluated:
    """Score what was drawn, and keep and show the scores."""
    result = Evaluated(failed={**failed, **drawn.failed}, drawn=drawn.drawn)
    gallery = Gallery(Storage(storage.full(IMAGES)), "png")
    with stages.stage("scoring", len(sitters)) as stage:
        for who, sitter in sitters.items():
            lost = drawn.failed.get(who) or drawn.failed.get(sitter.base_key)
            if lost:
                result.failed[who] = lost
            else:
                evaluation = _scored(sitter, settings, gallery, drawn.images)
                result.done.append(evaluation)
                result.pages[who] = _keep(storage, evaluation, stages)
            stage.advance(sitter.name)
    result.failed = {who: error for who, error in result.failed.items() if who[0] != PRISTINE}
    return result


def _scored(sitter: Sitter, settings: Settings, gallery: Gallery, entries: Sequence[Entry]) -> Evaluation:
    of_class, subject = set(class_prompts(sitter.prompts)), set(sitter.prompts)
    own = [e for e in entries if (e.image.subject, e.image.version) == (sitter.name, sitter.version)]
    of_base = [
        entry
        for entry in entries
        if entry.image.subject == PRISTINE
        and entry.image.base_revision == sitter.revision
        and entry.image.guidance == sitter.guidance
        and entry.image.prompt in of_class
        and entry.image.words in {one.image.words for one in own}
    ]
    pictures = {
        "subject": _pictures(gallery, [e for e in own if e.image.prompt in subject]),
        "class": _pictures(gallery, [e for e in own if e.image.prompt in of_class]),
        "base": _pictures(gallery, of_base),
    }
    dino, clip = _embedders(sitter, settings)
    critic = Critic(decoded(sitter.photos), sitter.class_noun, dino, clip)
    scores = critic.score(pictures["subject"], pictures["class"], pictures["base"])
    sampler = next((entry.image.sampler for entry in own), settings.sampler)
    used = replace(settings, guidance=sitter.guidance, sampler=sampler)
    told = {**asdict(used), "prompts": list(sitter.prompts)}
    embedders = {"dino": dino.name, "clip": clip.name}
    return Evaluation(
        sitter.name,
        sitter.version,
        sitter.class_noun,
        sitter.set_name,
        embedders,
        told,
        scores,
        pictures,
        sitter.photos,
    )


def _pictures(gallery: Gallery, entries: Sequence[Entry]) -> list[Picture]:
    ordered = sorted(entries, key=lambda entry: (entry.image.prompt, entry.image.seed))
    pixels: list[Pixels] = decoded(list(gallery.pngs(ordered)))
    return [
        Picture(entry.image.prompt, entry.image.seed, one) for entry, one in zip(ordered, pixels, strict=True)
    ]


def _embedders(sitter: Sitter, settings: Settings) -> tuple[Embedder, Embedder]:
    """The embedders for a subject: DINO's and CLIP's."""
    device = "cuda" if sees_gpu() else "cpu"
    dino, clip = (
        given or default
        for given, default in zip((settings.dino, settings.clip), DEFAULTS[sitter.family], strict=True)
    )
    reads = open_embedder(clip, device)
    if not reads.reads:
        raise UserError(f"--clip {clip} reads no words", "it embeds pictures alone", "name a CLIP")
    return open_embedder(dino, device), reads


def _keep(storage: Storage, evaluation: Evaluation, stages: Stages) -> str:
    """Write an evaluation down and mirror it in MLflow; returns the page's path."""
    name, version = evaluation.subject, evaluation.version
    folder = evaluation_path(name, version)
    told = evaluation.as_json()
    data = json.dumps(told, indent=2, ensure_ascii=False).encode() + b"\n"
    page = write_page(storage, f"{folder}/index.html", evaluation)
    storage.write(f"{folder}/evaluation.json", data)  # last: who finds it finds the page
    entry = Registry(storage).find(name) or {"versions": {}}
    mlflow = entry["versions"].get(version, {}).get("mlflow") or {}
    if mlflow.get("run_id"):
        figures = {key: found.value for key, found in evaluation.scores.metrics.items()}
        if evaluation.scores.drift:
            figures["drift"] = evaluation.scores.drift.value
        try:
            keep_evaluation(
                mlflow["uri"],
                mlflow["run_id"],
                figures,
                {"index.html": storage.read(page), "evaluation.json": data},
            )
        except Exception as error:  # a mirror: the record is ours
            said = [*str(error).splitlines(), type(error).__name__][0]
            stages.note(f"MLflow missed the evaluation of {name} {version}: {said}")
    return page
