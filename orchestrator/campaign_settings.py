"""This file is where a campaign's own settings are described: what holds for all of its runs. It imports no torch."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from cluster.errors import UserError
from orchestrator.spec import explained
from training.prompt import render_prompt
from training.recipe import Recipe, SamplerName, Track
from training.section import Section

NAME = r"^[a-z0-9][a-z0-9_-]{0,62}$"
TENANT = r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,62}$"
PRIORITIES = 1000  # either way
PROMPTS = ("a photo of {subject}",)


class Images(Section):
    """How the images of `prompts` are drawn, of every subject the same."""

    num_images: int = Field(default=4, ge=1, le=1000)
    """Images per prompt; image i has the seed `seed + i`."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the first image of each prompt."""
    steps: int = Field(default=25, ge=1, le=1000)
    """Denoising steps."""
    guidance: float | None = Field(default=None, ge=1.0, le=50.0)
    """Guidance scale; 1 is without, `null` takes each run's `validate.guidance`."""
    sampler: SamplerName | None = None
    """Sampler; `null` is each base's own."""
    negative_prompt: str = ""
    """What should not be there."""


class Budget(Section):
    """What the campaign may spend before it stops; what is trained by then stays. `null` is no limit."""

    hours: float | None = Field(default=None, gt=0)
    """Hours since it first started to run, over restarts."""
    gpu_hours: float | None = Field(default=None, gt=0)
    """Hours of GPUs that its gangs hold."""
    cpu_hours: float | None = Field(default=None, gt=0)
    """Hours of CPU cores that its gangs hold."""


class Schedule(Section):
    """How many runs are trained at a time, and how often one is tried."""

    gangs: Literal["auto"] | Annotated[int, Field(ge=1, le=10_000)] = "auto"
    """Gangs at a time; `auto` is as many as the cluster has room for."""
    bank: Literal["auto", 1, 2, 4, 8] = "auto"
    """LoRA runs trained together in one bank; `auto` measures memory and speed, 1 trains every run alone."""
    runs_per_gang: int = Field(default=50, ge=1, le=1_000_000)
    """Runs after which a gang's processes are replaced by fresh ones."""
    per_tenant: int | None = Field(default=None, ge=1, le=1_000_000)
    """Runs of one tenant at a time; `null` is no limit."""
    attempts: int = Field(default=3, ge=1, le=20)
    """Attempts of a run that fails by no fault of its own; a lost node does not count."""


class Gate(Section):
    """What a version must reach in `raybooth evaluate` to be served; `null` demands nothing. One that misses it stays
    registered as `candidate`."""

    dino: float | None = Field(default=None, ge=-1, le=1)
    """Least DINO."""
    clip_i: float | None = Field(default=None, ge=-1, le=1)
    """Least CLIP-I."""
    clip_t: float | None = Field(default=None, ge=-1, le=1)
    """Least CLIP-T."""
    div: float | None = Field(default=None, ge=0, le=2)
    """Least DIV."""
    pres: float | None = Field(default=None, ge=-1, le=1)
    """Most PRES."""
    drift: float | None = Field(default=None, ge=-2, le=2)
    """Most drift of the class."""
    copies: float | None = Field(default=None, ge=0, le=1)
    """Largest share of copies of photos."""
    no_worse: bool = True
    """Keep the champion if the new version is worse in DINO + CLIP-T - drift, by more than the interval."""
    num_images: int = Field(default=2, ge=1, le=100)
    """Images per prompt."""
    prompts: tuple[str, ...] | Literal["auto", "object", "live", "pocket"] = "auto"
    """Prompts, or a set of them; `auto` goes by class and base."""
    dino_model: str | None = None
    """Embedder for DINO: `pocket`, a folder or a hub id; `null` goes by the base."""
    clip_model: str | None = None
    """Embedder for CLIP-I and CLIP-T."""


class CampaignSettings(Section):
    """What holds for a campaign as a whole."""

    name: str = Field(pattern=NAME)
    """Name of the campaign: lower case letters, digits, `-` and `_`."""
    prompts: tuple[str, ...] = PROMPTS
    """Prompts drawn of every subject that succeeded: a list, or a text file with one a line. `{subject}` is the
    subject."""
    images: Images = Images()
    """How they are drawn."""
    budget: Budget = Budget()
    """What the campaign may spend."""
    schedule: Schedule = Schedule()
    """How runs are scheduled."""
    gate: Gate | None = None
    """What a version must reach to be served; `null` serves every new version."""
    track: Track = Track()
    """Where figures go: `defaults.track`."""

    @field_validator("prompts")
    @classmethod
    def _can_be_rendered(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        for prompt in prompts:
            try:
                render_prompt(prompt, "thing", "x")
            except UserError as error:
                raise ValueError(f"{error.what}: {error.seen}; {error.do}") from None
        return tuple(dict.fromkeys(prompts))  # one prompt is drawn once, as `generate` does


class Standing(Section):
    """A run among the others."""

    tenant: str = Field(default="default", pattern=TENANT)
    """Whose run it is, for `schedule.per_tenant`: letters, digits, `.`, `_`, `@` and `-`."""
    priority: int = Field(default=0, ge=-PRIORITIES, le=PRIORITIES)
    """Higher goes first."""


class _DefaultSubject(Section):
    class_noun: str | None = Field(default=None, alias="class", min_length=1, max_length=64)
    """Class noun of subjects that give none."""
    identifier: str = Field(default="auto", min_length=1, max_length=64)
    """The rare word that names a subject; `auto` picks one."""


class _Defaults(Recipe):
    subject: _DefaultSubject = _DefaultSubject()
    """What rows need not say."""


class _SubjectRow(Recipe, Standing):
    name: str = Field(pattern=NAME)
    """Name of the subject: lower case letters, digits, `-` and `_`."""
    class_noun: str | None = Field(default=None, alias="class", min_length=1, max_length=64)
    """The subject's class noun, such as `dog`; without it, `defaults.subject.class`."""
    images: tuple[str, ...] | str
    """Photos: a folder, a file or a list of files; paths are relative to the manifest, or URIs."""
    identifier: str = Field(default="auto", min_length=1, max_length=64)
    """The rare word that names the subject; `auto` picks one."""


class _CampaignFile(Section):
    name: str | None = Field(default=None, pattern=NAME)
    """Name of the campaign; without it, that of the file or of its folder."""
    defaults: _Defaults = _Defaults()
    """The recipe of every run, but for what a row says otherwise: the sections of run.yaml."""
    subjects: tuple[_SubjectRow, ...] | str
    """The subjects: a list, or a CSV or Parquet file, or a folder with a folder of photos for each; a path or a URI."""
    prompts: tuple[str, ...] | str = PROMPTS
    """Prompts drawn of every subject that succeeded: a list, or a text file with one a line."""
    images: Images = Images()
    """How they are drawn."""
    budget: Budget = Budget()
    """What the campaign may spend before it stops."""
    schedule: Schedule = Schedule()
    """How many runs are trained at a time."""
    gate: Gate | None = None
    """What a version must reach to be served; `null` serves every new version."""


KEYS = tuple(_CampaignFile.model_fields)
SECTIONS = tuple(field.alias or key for key, field in Recipe.model_fields.items() if key != "track")
"""The sections of run.yaml that a row may override; `track` holds for the campaign."""
WHO = ("name", "class", "images", "identifier")


def campaign_schema() -> dict[str, Any]:
    """The JSON schema of `campaign.yaml`."""
    schema = _CampaignFile.model_json_schema(by_alias=True)
    schema["title"], schema["description"] = "Campaign", "Many subjects as one submission: `campaign.yaml`."
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def parse_settings(raw: Mapping[str, Any]) -> CampaignSettings:
    """A campaign's own settings.

    Raises:
        UserError: One of them cannot be used; names every mistake.
    """
    try:
        return CampaignSettings.model_validate(dict(raw))
    except ValidationError as error:
        raise explained(error, CampaignSettings) from None


def parse_standing(raw: Mapping[str, Any]) -> Standing:
    """Tenant and priority of a row; raises as `parse_settings` does."""
    try:
        return Standing.model_validate(dict(raw))
    except ValidationError as error:
        raise explained(error, Standing) from None
