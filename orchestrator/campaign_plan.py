"""This file is where a campaign is foretold: what each subject would do, and what all of them share.

Photos are read and checked; no weights are loaded, Ray is not started and nothing is written.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from cluster.errors import UserError
from cluster.objects import StorageError
from cluster.storage import Storage
from orchestrator.fits import Memory
from orchestrator.manifest import CampaignSpec, Row
from orchestrator.order import WIDTHS, Facts, groups
from orchestrator.plan import PriorPlan, artifact_size, prior_plan
from orchestrator.prepare import destination, prepare, run_path
from orchestrator.site import survey
from training.bank_key import bank_key, calibrated_width
from training.checkpoint import steps_saved
from training.latents import missing_shards
from training.recipe import Run

CHECKERS = 4  # threads: photos are decoded outside of Python's lock
COLUMNS = ("subject", "class", "state", "version", "photos", "steps", "bank", "prior set", "reason")


@dataclass(frozen=True)
class SubjectPlan:
    """What `campaign run` would do for one subject."""

    name: str
    class_noun: str
    tenant: str
    priority: int
    state: str
    """`new`, `unfinished` (it would go on), `succeeded` (there is nothing to do) or `refused`."""
    reason: dict[str, str] | None = None
    """Why it is refused: what, seen, do."""
    version: str | None = None
    method: str | None = None
    photos: int = 0
    latents_cached: bool = False
    steps: int = 0
    resume_from: int = 0
    prior_key: str | None = None
    bank_key: str | None = None
    group: int | None = None
    """The runs of a group are trained together by one gang."""
    width: int | None = None
    """Slots of its bank; 1 is trained alone."""
    artifact_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def steps_left(self) -> int:
        """Steps still to be trained."""
        return self.steps - self.resume_from if self.state in ("new", "unfinished") else 0

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        values = asdict(self)
        return {"name": values.pop("name"), "class": values.pop("class_noun"), **values}

    def row(self) -> tuple[str, ...]:
        """The cells of a table with `COLUMNS`."""
        reason = ". ".join(part for part in (self.reason or {}).values() if part)
        if self.state == "refused":
            return (self.name, self.class_noun, self.state, *("",) * 5, reason)
        from_step = f"{self.resume_from + 1} to " if self.resume_from and self.steps_left else ""
        bank = "" if self.group is None else "alone" if self.width == 1 else f"{self.group} ({self.width})"
        photos = f"{self.photos}{', encoded' if self.latents_cached else ''}"
        shown = (self.version or "", photos, f"{from_step}{self.steps}", bank, self.prior_key or "none")
        return (self.name, self.class_noun, self.state, *shown, reason)


@dataclass(frozen=True)
class SharedPrior:
    """A prior set and the subjects that share it."""

    class_noun: str
    plan: PriorPlan
    subjects: int

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        missing = {"missing": self.plan.missing}
        return {**asdict(self.plan), **missing, "class": self.class_noun, "subjects": self.subjects}


@dataclass(frozen=True)
class CampaignPlan:
    """What `campaign run` would do with the same manifest."""

    campaign: str
    subjects: list[SubjectPlan]
    priors: list[SharedPrior]
    widths: dict[str, int]
    """Per bank key how many runs are trained together."""
    assumed: bool
    """Some of the widths are measured only when it runs; the widest is assumed."""
    gangs: int
    """At a time; on a cluster that is joined `auto` goes by its room."""
    device: str
    images: int
    """Images to draw of `prompts`."""

    @property
    def states(self) -> dict[str, int]:
        """How many subjects are in each state."""
        return dict(Counter(subject.state for subject in self.subjects))

    @property
    def steps_left(self) -> int:
        """Steps of all runs that are still to be trained."""
        return sum(subject.steps_left for subject in self.subjects)

    @property
    def prior_images(self) -> int:
        """Class images still to be drawn."""
        return sum(prior.plan.missing for prior in self.priors)

    @property
    def artifact_bytes(self) -> int:
        """Of the artifacts that are not there yet."""
        return sum(subject.artifact_bytes for subject in self.subjects if subject.steps_left)

    @property
    def groups(self) -> dict[int, int]:
        """How many groups there are of each width."""
        widths = {s.group: s.width for s in self.subjects if s.group is not None and s.width is not None}
        return dict(sorted(Counter(widths.values()).items()))

    def as_json(self) -> dict[str, Any]:
        """The JSON object of `raybooth campaign plan`."""
        return {
            "campaign": self.campaign,
            "states": self.states,
            "subjects": [subject.as_json() for subject in self.subjects],
            "priors": [prior.as_json() for prior in self.priors],
            "prior_sets_to_draw": sum(prior.plan.missing > 0 for prior in self.priors),
            "prior_images_to_draw": self.prior_images,
            "steps": self.steps_left,
            "groups": {str(width): number for width, number in self.groups.items()},
            "widths_assumed": self.assumed,
            "gangs": self.gangs,
            "device": self.device,
            "artifact_bytes": self.artifact_bytes,
            "images": self.images,
        }

    def lines(self) -> list[str]:
        """The same for people: what all share, a table of the subjects, and what is refused."""
        count = ", ".join(f"{number} {state}" for state, number in self.states.items())
        drawn = [prior for prior in self.priors if prior.plan.missing]
        banks = ", ".join(
            f"{number} alone" if width == 1 else f"{number} x {width} together"
            for width, number in self.groups.items()
        )
        assumed = " (at most; measured when it runs)" if self.assumed else ""
        head = [
            f"{self.campaign}: {len(self.subjects)} subjects: {count}",
            f"  prior sets  {len(drawn)} to draw ({self.prior_images} images), "
            f"{len(self.priors) - len(drawn)} are there",
            *(
                f"    {prior.class_noun}: {prior.plan.present} of {prior.plan.wanted} images are there, "
                f"wanted by {prior.subjects} (set {prior.plan.key})"
                for prior in self.priors
            ),
            f"  training    {self.steps_left:,} steps, in groups: {banks or 'none'}{assumed}, "
            f"{self.gangs} at a time on {self.device}",
            f"  artifacts   about {self.artifact_bytes / 1e6:.1f} MB",
            *([f"  images      {self.images} of the campaign's prompts"] if self.images else []),
            "",
        ]
        shown = [s.row()[:-1] for s in self.subjects if s.state != "refused"]
        refused = [s for s in self.subjects if s.state == "refused"]
        head += _table([COLUMNS[:-1], *shown]) if shown else []
        head += [f"{s.name} is refused: {s.row()[-1]}" for s in refused]
        return [*head, *(f"{s.name}: {note}" for s in self.subjects for note in s.notes)]


def plan_campaign(
    spec: CampaignSpec,
    storage: Storage,
    device: str | None = None,
    on_subject: Callable[[], None] = lambda: None,
) -> CampaignPlan:
    """Foretell a campaign.

    Args:
        spec: The campaign.
        storage: The root to look into; nothing is written there.
        device: `cpu` or `cuda`, what images are drawn on and gangs train on; `None` is what this machine has.
        on_subject: Called after every subject, from any thread.

    Raises:
        SystemFailure: Storage, or the one that holds photos, cannot be reached.
    """
    site = survey({row.run.cluster for row in spec.rows if row.run}, spec.settings.schedule, None)
    on = device or site.device
    memory = Memory(on, site.room)
    known: dict[str, SharedPrior] = {}

    def look(row: Row) -> SubjectPlan:
        try:
            return _subject(row, storage, on, memory, known)
        finally:
            on_subject()

    try:
        with ThreadPoolExecutor(min(CHECKERS, os.cpu_count() or 1)) as pool:
            subjects = list(pool.map(look, spec.rows))
    except StorageError as error:
        raise error.failure() from error
    widths, assumed = _widths(subjects, storage, spec.settings.schedule.bank)
    subjects = _grouped(subjects, widths, spec.settings.schedule.per_tenant)
    sharing = Counter(subject.prior_key for subject in subjects if subject.state != "refused")
    priors = [replace(prior, subjects=sharing[prior.plan.key]) for prior in known.values()]
    drawn = sum(subject.state != "refused" for subject in subjects) * len(spec.prompts)
    return CampaignPlan(
        campaign=spec.name,
        subjects=subjects,
        priors=sorted(priors, key=lambda prior: (prior.class_noun, prior.plan.key)),
        widths=widths,
        assumed=assumed,
        gangs=site.gangs,
        device=on,
        images=drawn * spec.settings.images.num_images,
    )


def _subject(
    row: Row, storage: Storage, device: str, memory: Memory, known: dict[str, SharedPrior]
) -> SubjectPlan:
    refused = partial(SubjectPlan, row.name, row.class_noun, row.tenant, row.priority, "refused")
    if row.run is None:
        return refused((row.error or UserError("it cannot be read")).as_json())
    run: Run = row.run
    try:
        with tempfile.TemporaryDirectory(prefix="raybooth-") as scratch:
            prepared = prepare(run, Storage(scratch))
        memory.check(prepared.base, run)
    except UserError as error:
        return refused(error.as_json())
    goal = destination(storage, prepared.name, prepared.fingerprint, new_version=False)
    key, wanted = prepared.prior_key(device), run.prior.num_images
    before = known.get(key or "")
    if (
        key
        and (before is None or before.plan.wanted < wanted)
        and (prior := prior_plan(prepared, storage, device))
    ):
        known[key] = SharedPrior(row.class_noun, prior, 0)
    return SubjectPlan(
        name=row.name,
        class_noun=row.class_noun,
        tenant=row.tenant,
        priority=row.priority,
        state=goal.state,
        version=goal.version,
        method=run.train.method,
        photos=prepared.photos.count,
        latents_cached=not missing_shards(storage, prepared.base, prepared.subject_images()),
        steps=run.train.steps,
        resume_from=max(steps_saved(storage, run_path(prepared.name, goal.version)), default=0),
        prior_key=key,
        bank_key=bank_key(run, prepared.base.revision),
        artifact_bytes=artifact_size(prepared.base, run)[1],
        notes=prepared.notes,
    )


def _widths(
    subjects: Sequence[SubjectPlan], storage: Storage, bank: str | int
) -> tuple[dict[str, int], bool]:
    """Per bank key how many runs go together, and whether that is not known of some."""
    keys = {subject.bank_key for subject in subjects if subject.bank_key and subject.steps_left}
    if bank != "auto":
        return {key: int(bank) for key in keys}, False
    measured = {key: calibrated_width(storage, key) for key in keys}
    return {key: width or max(WIDTHS) for key, width in measured.items()}, None in measured.values()


def _grouped(
    subjects: Sequence[SubjectPlan], widths: Mapping[str, int], per_tenant: int | None
) -> list[SubjectPlan]:
    """The subjects with their groups, cut as the controller cuts them when it starts afresh."""
    facts: dict[int, list[Facts]] = {}
    for number, s in enumerate(subjects):
        if s.steps_left:
            fact = Facts(number, number, s.tenant, s.priority, s.steps, s.bank_key, s.prior_key)
            facts.setdefault(widths.get(s.bank_key or "", 1), []).append(fact)
    out, first = list(subjects), 0
    for width, of_width in sorted(facts.items()):
        cut = groups(of_width, width, per_tenant)
        for group in cut:
            for run in group.run_ids:
                out[run] = replace(out[run], group=first + group.number, width=group.width)
        first += len(cut)
    return out


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
