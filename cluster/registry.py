"""This file is where a subject's versions are on record: the one that is served, and how it came to be.

`registry/NAME.json` holds `versions` (what was published), `aliases` (`champion` is served, `candidate` waits to be
judged or was found wanting) and `history`,
which only grows: the champion is what its replay says, so a rollback knows where to go back to.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any

from cluster.errors import UserError, did_you_mean
from cluster.storage import Storage

CHAMPION, CANDIDATE = "champion", "candidate"  # what is served, and what may be once it is judged
Record = dict[str, Any]


class Registry:
    """The registry under a storage root. A change replaces a subject's file whole, one writer at a time."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def names(self) -> list[str]:
        """Subjects that have a version, sorted."""
        return [n.removesuffix(".json") for n in self.storage.names("registry") if n.endswith(".json")]

    def show(self, name: str) -> Record:
        """The record of a subject: `name`, `versions`, `aliases`, `history`.

        Raises:
            UserError: There is no such subject; the message names the nearest.
        """
        names = self.names()
        if name not in names:
            raise UserError(
                f"there is no subject {name!r}",
                f"{self.storage.uri} has {len(names)} subjects",
                did_you_mean(name, names) or "train one first: raybooth train DIR --class NOUN --name NAME",
            )
        record: Record = self.storage.read_json(_path(name))
        return record

    def find(self, name: str) -> Record | None:
        """The record of a subject, or `None`: one read, however many subjects there are."""
        try:
            record: Record = self.storage.read_json(_path(name))
        except FileNotFoundError:
            return None
        return record

    def served(self) -> dict[str, str]:
        """The champion of every subject that has one, by name."""
        aliases = {name: self.storage.read_json(_path(name))["aliases"] for name in self.names()}
        return {name: found[CHAMPION] for name, found in aliases.items() if CHAMPION in found}

    def resolve(self, name: str, version: str | None = None) -> tuple[str, Record]:
        """A version and its entry.

        Args:
            name: The subject.
            version: `v2`, an alias, or `None` for the champion.

        Raises:
            UserError: There is no such subject or version.
        """
        record = self.show(name)
        versions, wanted = record["versions"], version or CHAMPION
        found = record["aliases"].get(wanted, wanted)
        if found not in versions:
            raise UserError(
                f"{name} has no version {wanted!r}", "", did_you_mean(wanted, [*versions, *record["aliases"]])
            )
        return found, versions[found]

    def add(self, name: str, version: str, entry: Mapping[str, Any], alias: str | None = CHAMPION) -> None:
        """Put a published version on record and give it an alias; the same once more changes nothing.

        Raises:
            UserError: The version is on record with another artifact or fingerprint.
        """
        with self._changing(name):
            record = self._read(name)
            known = record["versions"].get(version)
            if known is None:
                record["versions"][version] = {"created": _now(), **entry}
            elif any(known.get(key) != entry.get(key) for key in ("artifact", "fingerprint")):
                raise UserError(
                    f"{name} {version} is on record already",
                    f"with fingerprint {known.get('fingerprint')}, not {entry.get('fingerprint')}",
                    "publish it as another version",
                )
            if alias is not None and known is None:
                _log(record, "add", alias, version)
            self.storage.write_json(_path(name), record)

    def judge(self, name: str, version: str, objections: Sequence[str]) -> bool:
        """Put on record why a candidate is not served, or make it the champion where there is no objection.

        Returns:
            Whether it is the champion now. A version that was judged before is left as it is.

        Raises:
            UserError: There is no such subject or version.
        """
        with self._changing(name):
            version, entry = self.resolve(name, version)
            record = self.show(name)
            if "gate" not in entry:
                verdict = {"passed": not objections, "objections": list(objections), "at": _now()}
                record["versions"][version]["gate"] = verdict
                if not objections:
                    _log(record, "promote", CHAMPION, version)
                self.storage.write_json(_path(name), record)
            return bool(record["aliases"].get(CHAMPION) == version)

    def promote(self, name: str, version: str) -> str:
        """Make a version the champion; returns the version.

        Raises:
            UserError: There is no such subject or version.
        """
        with self._changing(name):
            version, _ = self.resolve(name, version)
            record = self.show(name)
            if record["aliases"].get(CHAMPION) != version:
                _log(record, "promote", CHAMPION, version)
                self.storage.write_json(_path(name), record)
        return version

    def rollback(self, name: str) -> str:
        """Make the champion before the present one champion again; returns its version.

        Raises:
            UserError: There is no such subject, or no champion before this one.
        """
        with self._changing(name):
            record = self.show(name)
            before = champions(record["history"])[:-1]
            if not before:
                raise UserError(
                    f"{name} has no earlier champion to go back to",
                    f"its versions are {', '.join(record['versions'])}",
                    f"choose one: raybooth subjects promote {name} VERSION",
                )
            _log(record, "rollback", CHAMPION, before[-1])
            self.storage.write_json(_path(name), record)
        return before[-1]

    def _changing(self, name: str) -> AbstractContextManager[None]:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
            raise UserError(
                f"{name!r} is no name of a subject", "", "use lower case letters, digits, - and _"
            )
        return self.storage.lock(f"locks/registry-{name}")

    def _read(self, name: str) -> Record:
        if name in self.names():
            return self.show(name)
        return {"name": name, "versions": {}, "aliases": {}, "history": []}


def champions(history: Sequence[Mapping[str, str]]) -> list[str]:
    """The champions one could go back to, the present one last: a rollback takes the last one off."""
    stack: list[str] = []
    for event in history:
        if event["alias"] != CHAMPION:
            continue
        if event["event"] == "rollback":
            stack.pop()
        else:
            stack.append(event["version"])
    return stack


def _log(record: Record, event: str, alias: str, version: str) -> None:
    record["aliases"][alias] = version
    record["history"].append({"event": event, "alias": alias, "version": version, "at": _now()})


def _path(name: str) -> str:
    return f"registry/{name}.json"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
