"""This file is where a manifest becomes a campaign: its settings, and one run or one reason per row.

A mistake that is the campaign's refuses it, with all of them named. A mistake in a row is that row's, and the others go
on. Precedence is defaults < row < flags < `--set`. It imports no torch.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cluster.errors import UserError, did_you_mean
from cluster.source import find, read_text
from orchestrator.campaign_settings import (
    KEYS,
    NAME,
    SECTIONS,
    WHO,
    Budget,
    CampaignSettings,
    Standing,
    parse_settings,
    parse_standing,
)
from orchestrator.document import anchor_run, anchored, parse_document
from orchestrator.folders import name_of
from orchestrator.rows import COLUMNS, RawRow, listed_rows, nearest, rows_at
from orchestrator.spec import assigned, given, parse_run
from training.recipe import Run
from training.section import merge

MOST_TOLD = 20  # mistakes in one message
# What differs from a run alone: no sample grids on the way, as a campaign draws its own in the end, many at once, and a
# run that draws none can be trained in a bank
_CAMPAIGN: Mapping[str, Any] = {"validate": {"prompts": []}}
_YAML = (".yaml", ".yml")
_ANYONE = {"name": "anyone", "images": ["anywhere"]}  # to check defaults with
_T = TypeVar("_T")


@dataclass(frozen=True)
class Row:
    """One subject of a campaign: a run, or the reason why it cannot be one."""

    name: str
    class_noun: str
    tenant: str
    priority: int
    run: Run | None
    error: UserError | None
    written: Mapping[str, Any] = field(default_factory=dict)
    """As it was written, flags and `--set` laid over it; paths are absolute or URIs."""


@dataclass(frozen=True)
class CampaignSpec:
    """A campaign as it was written."""

    name: str
    defaults: dict[str, Any]
    """Sections of run.yaml, flags and `--set` laid over them."""
    rows: list[Row]
    settings: CampaignSettings
    source: str
    """The manifest's path or URI."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """What to draw of every subject that succeeded."""
        return self.settings.prompts

    @property
    def budget(self) -> Budget:
        """What the campaign may spend."""
        return self.settings.budget

    def as_json(self) -> dict[str, Any]:
        """All but the rows; `settings_of` takes it back."""
        settings = self.settings.model_dump(mode="json", by_alias=True)
        apart = {key: settings.pop(key) for key in ("name", "prompts", "budget")}
        return {**apart, "settings": settings, "defaults": self.defaults, "source": self.source}


def settings_of(manifest: Mapping[str, Any]) -> CampaignSettings:
    """The settings in what `CampaignSpec.as_json` made."""
    apart = {key: manifest[key] for key in ("name", "prompts", "budget")}
    return CampaignSettings.model_validate({**apart, **manifest["settings"]})


def load_campaign(
    source: str,
    name: str | None = None,
    class_noun: str | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
) -> CampaignSpec:
    """The campaign that a manifest, flags and `--set` describe together. No photo is opened.

    Args:
        source: campaign.yaml, a CSV or Parquet file, or a folder of folders; a path or a URI.
        name: Of the campaign; `None` takes the manifest's, else one made of its file or folder.
        class_noun: Of subjects that give none.
        flags: Sections of run.yaml for every run.
        sets: `a.b.c=VALUE` each: a setting of every run, or of the campaign (`schedule.gangs=2`).

    Raises:
        UserError: The manifest cannot be read, one of its own settings cannot be used, or two rows have a name.
    """
    entry = find(source)
    place = entry.place if "://" in entry.place else str(Path(entry.place).absolute())
    raw: dict[str, Any] = {"subjects": place}
    lines: Sequence[int] = ()
    folder, _, file = place.rpartition("/")
    if entry.suffix in _YAML and not entry.is_folder:
        document = parse_document(read_text(place), place)
        raw, lines = document.raw, document.lines.get("subjects", ())
    over = given(flags or {})
    for assignment in sets:
        over = merge(over, assigned(assignment))
    raw = merge(raw, {key: over.pop(key) for key in KEYS if key in over})
    stem = name_of(file.rpartition(".")[0] or file)
    if stem == "campaign":
        stem = name_of(folder.rpartition("/")[2]) or stem
    raw["name"] = name or raw.get("name") or stem

    mistakes: list[UserError] = []
    mistakes += _unknown_keys(raw)
    settings = _told(mistakes, lambda: _settings(raw, over, folder))
    defaults = _told(mistakes, lambda: _defaults(raw.get("defaults"), over, class_noun, folder))
    raws = _told(mistakes, lambda: _raw_rows(raw.get("subjects"), lines, folder))
    mistakes += _duplicates(raws or [])
    if mistakes or settings is None or defaults is None or raws is None:
        raise _together(place, mistakes)
    return CampaignSpec(settings.name, merge(defaults, over), _rows(raws, defaults, over), settings, place)


# -- the campaign itself -----------------------------------------------------------------------------------


def _settings(raw: Mapping[str, Any], over: Mapping[str, Any], folder: str) -> CampaignSettings:
    defaults = raw.get("defaults")
    track = merge(
        (defaults if isinstance(defaults, Mapping) else {}).get("track") or {}, over.get("track", {})
    )
    own = {key: raw[key] for key in KEYS if key in raw and key not in ("defaults", "subjects")}
    if isinstance(own.get("prompts"), str):
        own["prompts"] = _prompts(anchored(own["prompts"], folder))
    return parse_settings({**own, "track": track})


def _prompts(place: str) -> list[str]:
    """The prompts of a text file: one a line, blank lines and `#` comments skipped."""
    if "{" in place:
        raise UserError("prompts is a text, which names a file", repr(place), "write a list: prompts: [...]")
    lines = [line.strip() for line in read_text(place).splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _defaults(raw: Any, over: Mapping[str, Any], class_noun: str | None, folder: str) -> dict[str, Any]:
    """The recipe of every run, checked once, so that its mistakes are not every row's."""
    if not isinstance(raw or {}, dict):
        raise UserError(
            "defaults cannot be used", f"it is {raw!r}", "it is a section with those of run.yaml in it"
        )
    defaults = dict(raw or {})
    subject = defaults.get("subject", {})
    anchor_run(defaults, folder)
    if isinstance(subject, dict) and (own := [key for key in ("name", "images") if key in subject]):
        raise UserError(
            f"defaults.subject.{own[0]} cannot be used", "it is each subject's own", "give it in `subjects`"
        )
    if class_noun:
        defaults = merge(defaults, {"subject": {"class": class_noun}})
    try:
        parse_run(merge(merge({"subject": {"class": "thing"}}, merge(defaults, over)), {"subject": _ANYONE}))
    except UserError as error:
        raise UserError(f"defaults: {error.what}", error.seen, error.do) from None
    return defaults


def _raw_rows(subjects: Any, lines: Sequence[int], folder: str) -> list[RawRow]:
    if isinstance(subjects, list) and subjects:
        return list(listed_rows(subjects, lines, folder))
    if not isinstance(subjects, str):
        raise UserError(
            "the campaign has no subjects",
            f"subjects is {subjects!r}" if subjects is not None else "subjects is missing",
            "give a list of {name: rex, class: dog, images: ./rex}, a CSV or Parquet file, or a folder of folders",
        )
    return list(rows_at(anchored(subjects, folder)))


def _unknown_keys(raw: Mapping[str, Any]) -> Iterable[UserError]:
    for key in raw:
        if key not in KEYS:
            inside = f"did you mean defaults.{key}?" if key in (*SECTIONS, "track", "subject") else ""
            yield UserError(
                f"{key} is not a setting", f"it was given {raw[key]!r}", inside or did_you_mean(key, KEYS)
            )


def _duplicates(rows: Sequence[RawRow]) -> Iterable[UserError]:
    names = [str(row.fields["name"]) for row in rows if row.fields.get("name")]
    for name, times in Counter(names).items():
        if times > 1:
            places = [row.place for row in rows if str(row.fields.get("name")) == name]
            yield UserError(
                f"the name {name} is there {times} times",
                ", ".join(places),
                "a campaign trains a subject once",
            )


def _told(mistakes: list[UserError], act: Callable[[], _T]) -> _T | None:
    try:
        return act()
    except UserError as error:
        mistakes.append(error)
        return None


def _together(place: str, mistakes: Sequence[UserError]) -> UserError:
    if len(mistakes) == 1:
        return mistakes[0]
    seen = "; ".join(": ".join(part for part in (m.what, m.seen, m.do) if part) for m in mistakes[:MOST_TOLD])
    more = f"; and {len(mistakes) - MOST_TOLD} more" if len(mistakes) > MOST_TOLD else ""
    return UserError(
        f"{place} has {len(mistakes)} mistakes",
        seen + more,
        "`raybooth schema --campaign` lists all settings",
    )


# -- rows --------------------------------------------------------------------------------------------------


def _rows(raws: Sequence[RawRow], defaults: Mapping[str, Any], over: Mapping[str, Any]) -> list[Row]:
    taken = {str(raw.fields.get("name")) for raw in raws}
    return [_row(raw, defaults, over, taken) for raw in raws]


def _row(raw: RawRow, defaults: Mapping[str, Any], over: Mapping[str, Any], taken: set[str]) -> Row:
    fields, standing = raw.fields, Standing()
    written = merge(fields, {key: value for key, value in over.items() if key in SECTIONS})
    written = merge(written, over.get("subject", {}))
    try:
        if raw.error:
            raise raw.error
        _check_keys(fields)
        standing = parse_standing(
            {key: fields[key] for key in ("tenant", "priority") if fields.get(key) is not None}
        )
        run = parse_run(merge(_run_of(fields, defaults), over))
    except UserError as error:
        noun = fields.get("class") or defaults.get("subject", {}).get("class") or ""
        told = UserError(f"{raw.place}: {error.what}", error.seen, error.do)
        return Row(
            _shown_name(raw, taken), str(noun), standing.tenant, standing.priority, None, told, written
        )
    who = run.subject
    return Row(who.name, who.class_noun, standing.tenant, standing.priority, run, None, written)


def _check_keys(fields: Mapping[str, Any]) -> None:
    for key in fields:
        if key not in (*COLUMNS, *SECTIONS):
            raise UserError(
                f"{key} is not a setting of a row", f"it was given {fields[key]!r}", nearest(str(key))
            )


def _run_of(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The run of a row, laid over the defaults."""
    own = {key: value for key, value in fields.items() if key in SECTIONS and value is not None}
    subject = {key: fields[key] for key in WHO if fields.get(key) is not None}
    train, rowed = defaults.get("train"), own.get("train")
    if (
        isinstance(train, Mapping)
        and isinstance(rowed, Mapping)
        and rowed.get("method", train.get("method", "lora")) != train.get("method", "lora")
    ):
        # the adapters of the others take no effect here, and the row cannot take them back
        defaults = {**defaults, "train": {key: value for key, value in train.items() if key != "lora"}}
    return merge(_CAMPAIGN, merge(defaults, {**own, "subject": subject}))


def _shown_name(raw: RawRow, taken: set[str]) -> str:
    """The row's name where it can be one, else one made of its place."""
    name = raw.fields.get("name")
    if isinstance(name, str) and re.fullmatch(NAME, name):
        return name
    shown = name_of(raw.place) or "row"
    while shown in taken:
        shown += "-"
    taken.add(shown)
    return shown
