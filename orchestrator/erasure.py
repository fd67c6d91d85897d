"""This file is where a subject is deleted: everything that is of it alone, with a receipt that lists what went.

The registry's record goes first, so that nothing new is drawn; replicas, which ask it, let go of the subject within
seconds. What it shared with others, such as the class images, stays.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from uuid import uuid4

from cluster.errors import UserError
from cluster.objects import StorageError
from cluster.storage import Storage
from orchestrator.evaluation import IMAGES
from orchestrator.ledger import Ledger
from orchestrator.prepare import one_at_a_time, record_path
from orchestrator.records import ENDED
from orchestrator.report import report_path
from orchestrator.tracking import tracking_uri
from serving.leftovers import erase_leftovers
from serving.trainer import Receipt


class Erasure:
    """Deletes subjects.

    Args:
        storage: The root.
        ledger: URI of the record of campaigns.
        mlflow: MLflow's URI; `None` is the one that runs use by default.
    """

    def __init__(self, storage: Storage, ledger: str, mlflow: str | None = None) -> None:
        self._storage, self._ledger = storage, ledger
        self._mlflow = tracking_uri(storage, mlflow)

    def erase(self, subject: str) -> Receipt:
        """Remove everything of a subject.

        Args:
            subject: Its name in storage.

        Raises:
            UserError: There is nothing of it, or it is being trained.
        """
        storage = self._storage
        refusal = one_at_a_time(subject)
        with storage.lock_or_refuse(f"locks/train-{_checked(subject)}", refusal):
            kept: list[str] = []
            running: list[str] = []
            campaigns = self._let_go(subject, running)
            kept += [f"the campaign {name} goes on, and its report will name the subject" for name in running]
            kept += self._with_trackers(subject)
            paths = [*self._own(subject), *self._in_campaigns(subject), *self._in_evaluations(subject)]
            removed, files = [], 0
            for path in paths:
                found = _count(storage, path)
                if found:
                    storage.remove(path)
                    removed.append(path)
                    files += found
            left = erase_leftovers(storage, subject)
            removed += left.removed
            kept += left.kept
            files += len(left.removed)
            removed += self._forget(subject, campaigns, kept)
            removed += self._in_mlflow(subject, kept)
        if not removed:
            raise UserError(
                f"there is no subject {subject}", "nothing is stored of it", "raybooth subjects list"
            )
        kept.append(
            "images that were drawn elsewhere, by `generate --out` or `batch --out`, are not known here"
        )
        receipt = Receipt(
            id=uuid4().hex,
            subject=subject,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            removed=tuple(removed),
            files=files,
            kept=tuple(kept),
        )
        storage.write_json(f"receipts/{receipt.id}.json", asdict(receipt))
        return receipt

    def _own(self, subject: str) -> Iterator[str]:
        """What is stored under its name, the record that serving reads first; latents by the photos they are of."""
        storage = self._storage
        yield f"registry/{subject}.json"
        photos = set(storage.names(f"subjects/{subject}"))
        others = {
            key
            for name in storage.names("subjects")
            if name != subject
            for key in storage.names(f"subjects/{name}")
        }
        for key in storage.names("latents"):
            of = (storage.manifest(f"latents/{key}") or {}).get("images")
            if of in photos - others:
                yield f"latents/{key}"
        for folder in ("artifacts", "runs", "subjects", "evaluations/subjects"):
            yield f"{folder}/{subject}"

    def _in_campaigns(self, subject: str) -> Iterator[str]:
        """Pictures of it among those of campaigns, and their pages, which show them."""
        for campaign in self._storage.names("campaigns"):
            found = list(self._in_gallery(f"campaigns/{campaign}/images", subject))
            if found:
                yield from found
                yield report_path(campaign).rpartition("/")[0]

    def _in_evaluations(self, subject: str) -> Iterator[str]:
        """Pictures of it that were drawn to be scored, and the pages of studies that show it."""
        yield from self._in_gallery(IMAGES, subject)
        for study in self._storage.names("studies"):
            path = f"studies/{study}/study.json"
            told = self._storage.read_json(path) if self._storage.exists(path) else {"spec": {"subjects": []}}
            if any(run["subject"]["name"] == subject for run in told["spec"]["subjects"]):
                yield f"studies/{study}/report"

    def _in_gallery(self, images: str, subject: str) -> Iterator[str]:
        labels = [name for name in self._storage.names(images) if _is_of(name, subject)]
        for label in labels:
            yield f"{images}/manifests/{label}"
            yield f"{images}/{label}"
        if labels:
            yield f"{images}/index.parquet"

    # -- the record of campaigns ---------------------------------------------------------------------------

    def _let_go(self, subject: str, running: list[str]) -> list[str]:
        """Campaigns that know the subject, in none of which it may be trained from here on.

        Args:
            subject: The subject.
            running: Takes those that go on for others.

        Raises:
            UserError: A controller has it.
        """
        found: list[str] = []
        with Ledger(self._ledger) as ledger:
            for campaign in ledger.campaigns():
                rows = ledger.runs(campaign.name)
                mine = [row for row in rows if row.name == subject]
                if not mine:
                    continue
                found.append(campaign.name)
                ended, held = mine[0].state in ENDED, ledger.holder(campaign.name)
                if held and (not ended or len(rows) == 1):  # a controller's last act is a report of its runs
                    raise UserError(
                        f"{subject} is being trained",
                        f"in the campaign {campaign.name}",
                        "wait for its end"
                        if ended
                        else f"cancel it first: raybooth campaign cancel {campaign.name} {subject}",
                    )
                if held:
                    running.append(campaign.name)
                if not ended:
                    ledger.ask(campaign.name, "cancel", [subject])
        return found

    def _forget(self, subject: str, campaigns: Sequence[str], kept: list[str]) -> Iterator[str]:
        """Campaigns of it alone."""
        with Ledger(self._ledger) as ledger:
            for campaign in campaigns:
                if len(ledger.runs(campaign)) > 1:
                    kept.append(
                        f"the record of the campaign {campaign} has its name and where its photos lay"
                    )
                    continue
                try:
                    ledger.delete(campaign)
                    self._storage.remove(f"campaigns/{campaign}")
                    yield f"the record of the campaign {campaign}"
                except UserError as error:  # its controller draws or reports
                    kept.append(f"the record of the campaign {campaign}: {error}")

    # -- mirrors -------------------------------------------------------------------------------------------

    def _in_mlflow(self, subject: str, kept: list[str]) -> list[str]:
        """Its runs with their files, and its registered model."""
        from orchestrator.mlflow_tracker import erase

        try:
            return erase(self._mlflow, subject)
        except Exception as error:  # of whatever kind: the rest is gone already, and the receipt says so
            said = [*str(error).splitlines(), type(error).__name__][0]
            kept.append(f"what MLflow has of it: {said}")
            return []

    def _with_trackers(self, subject: str) -> list[str]:
        """Its runs in W&B, which nobody here has the right to delete, and files of trackers beside an object store."""
        names = self._storage.names(f"runs/{subject}")
        records = [record_path(subject, name) for name in names]
        told = [self._storage.read_json(path) for path in records if self._storage.exists(path)]
        kept = [f"W&B's run {record['wandb']['url']}" for record in told if "wandb" in record]
        for tracker in () if self._storage.is_local else ("wandb", "tensorboard"):
            if any(record.get("run", {}).get("track", {}).get(tracker) for record in told):
                kept.append(f"raybooth-{tracker}/runs/{subject} in the working folder of whoever trained it")
        return kept


def _checked(subject: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", subject):
        raise UserError(f"{subject!r} is no name of a subject", "", "use lower case letters, digits, - and _")
    return subject


def _is_of(label: str, subject: str) -> bool:
    """Whether a folder SUBJECT-VERSION is of a subject."""
    name, _, version = label.rpartition("-")
    return name == subject and version.startswith("v")


def _count(storage: Storage, path: str) -> int:
    """Files under a path; one for a file, and none where nothing is."""
    if not storage.exists(path):
        return 0
    with suppress(StorageError, NotADirectoryError):
        names = storage.names(path)
        if names:
            return sum(_count(storage, f"{path}/{name}") for name in names)
    return 1
