"""This file is where a campaign's page is written: what became of every subject, with its pictures and losses."""

import json
import shlex
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from cluster.objects import StorageError
from cluster.storage import Storage, sha256
from orchestrator.curve import loss_curve
from orchestrator.gallery import INDEX
from orchestrator.pace import span, taken_by
from orchestrator.page import as_markup, render_page
from orchestrator.records import CampaignRow, RunRow
from orchestrator.thumbnails import SIDE, thumbnail
from orchestrator.tracking import discreet, flatten
from training.intake import TABLE

PICTURED = 400  # subjects with pictures: about 12 MB of page; all of them are in its table
PHOTOS, DRAWN = 6, 12  # pictures per subject at most
FAILURES, OPEN = 200, 6  # told in full, and without unfolding; all of them are in the table
_THREADS = 8  # readers: a remote root answers each in tens of milliseconds
_GRID_SIDE = 240
_ORDER = ("succeeded", "publishing", "training", "preparing", "queued", "cancelled", "failed")


@dataclass(frozen=True)
class _Drawn:
    """An image that was drawn of a subject after its training."""

    prompt: str
    seed: int
    path: str
    """In storage; a PNG."""


@dataclass(frozen=True)
class _Card:
    """What is to be seen of a subject."""

    row: RunRow
    photos: list[str]
    drawn: list[tuple[str, list[tuple[str, str, int]]]]
    """Per prompt: thumbnail, address of the image as seen from the page, seed."""
    more: int
    grid: str | None
    """The run's own sample grid, where nothing was drawn of it."""
    curve: str | None
    """Its markup."""


def report_path(campaign: str) -> str:
    """Where the page of a campaign lies."""
    return f"campaigns/{campaign}/report/index.html"


def write_report(storage: Storage, campaign: CampaignRow, runs: Sequence[RunRow]) -> str:
    """Write the page of a campaign, in place of the one before; whole in one file that needs no network.

    A picture or a curve that cannot be read is left out.

    Args:
        storage: Root of the campaign.
        campaign: What is on record of it.
        runs: Of all subjects.

    Returns:
        The page's path in storage.

    Raises:
        StorageError: It cannot be written.
    """
    path, prompts = report_path(campaign.name), list(campaign.manifest.get("prompts") or ())
    drawn = _drawn(storage, f"campaigns/{campaign.name}/images", prompts)
    shown = sorted((run for run in runs if run.version), key=_rank)[:PICTURED]
    with ThreadPoolExecutor(_THREADS) as readers:
        cards = list(
            readers.map(lambda run: _card(storage, run, drawn.get((run.name, run.version), ())), shown)
        )
    storage.write(path, _render(campaign, runs, [card for card in cards if _worth(card)]))
    return path


def _rank(run: RunRow) -> tuple[int, int]:
    return (_ORDER.index(run.state), run.position)


def _worth(card: _Card) -> bool:
    return bool(card.drawn or card.grid or card.curve or card.photos)


# -- what is read of a subject ---------------------------------------------------------------------------------


def _card(storage: Storage, run: RunRow, drawn: Sequence[_Drawn]) -> _Card:
    folder = f"runs/{run.name}/{run.version}"
    by_prompt: dict[str, list[tuple[str, str, int]]] = {}
    for image in _spread(drawn):
        small = _thumbnail(storage, image.path)
        if small:
            by_prompt.setdefault(image.prompt, []).append((small, _seen(image.path), image.seed))
    shown = sum(map(len, by_prompt.values()))
    curve = loss_curve(_said(_read(storage, f"{folder}/events.jsonl")))
    return _Card(
        row=run,
        photos=_photos(storage, run),
        drawn=list(by_prompt.items()),
        more=len(drawn) - shown,
        grid=None if by_prompt else _thumbnail(storage, f"{folder}/samples.png", _GRID_SIDE),
        curve=as_markup(curve) if curve else None,
    )


def _drawn(
    storage: Storage, folder: str, prompts: Sequence[str]
) -> dict[tuple[str, str | None], list[_Drawn]]:
    """What was drawn of every subject and version, as the gallery's index has it, in the order of the prompts."""
    found: dict[tuple[str, str | None], list[_Drawn]] = {}
    index = _read(storage, f"{folder}/{INDEX}")
    if index is None:
        return found
    columns = storage.read_rows(f"{folder}/{INDEX}", sha256(index))
    keys = ("subject", "version", "prompt", "seed", "path", "row")
    for name, version, prompt, seed, path, row in zip(*(columns[key] for key in keys), strict=True):
        if row is None:  # an object of its own
            found.setdefault((name, version), []).append(_Drawn(prompt, seed, f"{folder}/{path}"))
    turn = {prompt: number for number, prompt in enumerate(prompts)}
    for images in found.values():
        images.sort(key=lambda image: turn.get(image.prompt, len(turn)))
    return found


def _spread(drawn: Sequence[_Drawn]) -> list[_Drawn]:
    """The images to show: of every prompt the first seed, then of every prompt the second, back in their order."""
    turns: Counter[str] = Counter()
    ranked = []
    for number, image in enumerate(drawn):
        ranked.append((turns[image.prompt], number, image))
        turns[image.prompt] += 1
    chosen = sorted(ranked, key=lambda ranked: ranked[:2])[:DRAWN]
    return [image for _, _, image in sorted(chosen, key=lambda ranked: ranked[1])]


def _photos(storage: Storage, run: RunRow) -> list[str]:
    """Thumbnails of the photos of a run; none when it is not known which they are."""
    try:
        sets = storage.names(f"subjects/{run.name}")
        record = _read(storage, f"runs/{run.name}/{run.version}/run.json")
        key = json.loads(record).get("photos") if record else None
        if key not in sets:
            if len(sets) != 1:
                return []
            [key] = sets
        folder = f"subjects/{run.name}/{key}"
        manifest = storage.manifest(folder)
        if manifest is None:
            return []
        rows = storage.read_rows(f"{folder}/{TABLE}", manifest["files"][TABLE]["sha256"])
        return [thumbnail(png) for png in rows["png"][:PHOTOS]]
    except Exception:  # a damaged set costs the page its pictures, and not the campaign its page
        return []


def _thumbnail(storage: Storage, path: str, side: int = SIDE) -> str | None:
    data = _read(storage, path)
    try:
        return thumbnail(data, side) if data else None
    except Exception:  # a decoder may raise anything on damaged bytes
        return None


def _read(storage: Storage, path: str) -> bytes | None:
    try:
        return storage.read(path)
    except (FileNotFoundError, NotADirectoryError, StorageError):
        return None


def _said(log: bytes | None) -> list[dict[str, Any]]:
    """The figures in a log, of which the last line may be torn."""
    whole, _, _ = (log or b"").rpartition(b"\n")
    try:
        return [json.loads(line) for line in whole.splitlines() if b'"step"' in line]
    except ValueError:
        return []


def _seen(path: str) -> str:
    """An address in storage as seen from the page."""
    return f"../../../{quote(path)}"


# -- the page --------------------------------------------------------------------------------------------------


def _render(campaign: CampaignRow, runs: Sequence[RunRow], cards: Sequence[_Card]) -> bytes:
    filters: dict[str, Callable[..., Any]] = {
        "discreet": lambda value: discreet(str(value)),
        "span": span,
        "taken": taken_by,
        "moment": _moment,
        "figure": _figure,
    }
    counts = Counter(run.state for run in runs)
    unwell = sorted((r for r in runs if r.state in ("failed", "cancelled")), key=lambda r: r.position)
    failed = [run for run in unwell if run.state == "failed"]
    ended = campaign.finished_at or time.time()
    taken = [taken_by(run) for run in runs if run.state == "succeeded"]
    times = [seconds for seconds in taken if seconds is not None]
    prior_keys = Counter(run.prior_key for run in runs if run.prior_key)
    facts = {
        "campaign": campaign,
        "now": time.time(),
        "seconds": ended - campaign.created_at,
        "runs": sorted(runs, key=lambda run: run.position),
        "counts": {state: counts[state] for state in _ORDER if counts[state]},
        "succeeded": counts["succeeded"],
        "total": len(runs),
        "failed": failed[:FAILURES],
        "told": {run.name for run in failed[:FAILURES]},
        "open": OPEN,
        "failed_more": max(len(failed) - FAILURES, 0),
        "cards": cards,
        "pictured": {card.row.name for card in cards},
        "cards_left_out": sum(1 for run in runs if run.version) - len(cards),
        "steps": sum(run.step for run in runs),
        "steps_saved": sum(run.steps_saved for run in runs),
        "mean_s": sum(times) / len(times) if times else None,
        "priors": {
            "sets": len(prior_keys),
            "users": sum(prior_keys.values()),
            "drawn": sum(run.prior_drawn for run in runs),
        },
        "show": {
            "tenant": len({run.tenant for run in runs}) > 1,
            "priority": len({run.priority for run in runs}) > 1,
            "width": any((run.width or 1) > 1 for run in runs),
            "prior": any(run.loss_class is not None for run in runs),
        },
        "settings": flatten({key: value for key, value in campaign.manifest.items() if key != "prompts"}),
        "prompts": list(campaign.manifest.get("prompts") or ()),
        "retry": _command(campaign, "retry"),
        "goes_on": _command(campaign, "resume") if campaign.state in ("stopped", "cancelled") else None,
        "cancel": _command(campaign, "cancel") if campaign.state in ("queued", "running") else None,
        "unwell": len(unwell),
    }
    return render_page("report.html", facts, filters)


def _command(campaign: CampaignRow, verb: str) -> str:
    return shlex.join(
        ["raybooth", "campaign", verb, campaign.name, "--storage", discreet(campaign.storage_uri)]
    )


def _moment(seconds: float) -> str:
    """A point in time as ISO 8601."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
