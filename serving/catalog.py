"""This file is where the name of a model becomes a subject and a version: of the tenant that asks, and no other's."""

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cluster.errors import UserError, did_you_mean
from cluster.registry import CHAMPION, Record, Registry
from cluster.storage import Storage
from serving.answers import ApiError
from serving.protocol import PRISTINE
from serving.tenancy import shown_name, stored_name
from training.defaults import with_defaults
from training.prompt import TEMPLATE, render_prompt
from training.recipe import Recipe

MOST_MANIFESTS = 4096  # a few kB each

_MODEL = re.compile(r"([a-z0-9][a-z0-9_-]{0,62})(?:@([A-Za-z0-9][A-Za-z0-9._-]{0,62}))?")


@dataclass(frozen=True)
class Model:
    """What can be drawn."""

    name: str
    """As its tenant calls it."""
    stored: str
    """As the storage calls it."""
    version: str
    """Resolved; empty for the base."""
    created: int
    """Seconds since the epoch."""
    guidance: float
    """Guidance scale where none is asked for."""
    class_noun: str = ""
    identifier: str | None = None
    template: str = TEMPLATE
    versions: tuple[str, ...] = ()

    def check_prompt(self, prompt: str) -> None:
        """Refuse a prompt that no replica could draw.

        Raises:
            UserError: It has braces that mean nothing, or names a subject that the base does not know.
        """
        if self.identifier is None and "{class}" in prompt:
            raise UserError("the base has no class", repr(prompt), "say the noun instead of {class}")
        render_prompt(prompt, self.class_noun, self.identifier, self.template)


class Catalog:
    """The models under a storage root, tenant by tenant. Its methods read from the storage: call them in a thread.

    Args:
        storage: The root.
        base: The base that is served.
        clock: Seconds since the epoch.
        hold_s: How long a look at the registry holds.
    """

    def __init__(self, storage: Storage, base: str, clock: Callable[[], float], hold_s: float) -> None:
        self._storage, self._registry = storage, Registry(storage)
        self._clock, self._hold_s = clock, hold_s
        self._records: OrderedDict[str, tuple[float, Record | None]] = OrderedDict()
        self._manifests: OrderedDict[tuple[str, str], Mapping[str, Any]] = OrderedDict()
        recipe = Recipe.model_validate(with_defaults({"base": {"model": base}}))
        self._pristine = Model(PRISTINE, PRISTINE, "", 0, recipe.validate_.guidance)
        self.sampler = recipe.prior.sampler
        """What images are drawn with where nothing else is asked for: the base's own."""

    def find(self, tenant: str, model: str, param: str | None = "model") -> Model:
        """A model by its name: `rex`, `rex@v2`, `rex@champion` or `base`.

        Raises:
            ApiError: 404: this tenant has no such model.
        """
        if model == PRISTINE:
            return self._pristine
        match = _MODEL.fullmatch(model)
        stored = stored_name(tenant, match[1]) if match else ""
        is_theirs = match is not None and shown_name(tenant, stored) == match[1]
        record = self._record(stored) if is_theirs else None
        if match is None or record is None:
            raise self._unknown(tenant, model, param)
        wanted = match[2] or CHAMPION
        version = record["aliases"].get(wanted, wanted)
        if version not in record["versions"]:
            known = [*record["versions"], *record["aliases"]]
            said = f"{match[1]} has no version {wanted!r}. {did_you_mean(wanted, known)}".rstrip()
            raise ApiError(404, said, "model_not_found", param)
        return self._model(match[1], record, version)

    def holds(self, tenant: str, model: str) -> bool:
        """Whether `find` answers without a look at the storage."""
        if model == PRISTINE:
            return True
        match = _MODEL.fullmatch(model)
        seen = self._records.get(stored_name(tenant, match[1])) if match else None
        if match is None or seen is None or seen[1] is None or not self._is_fresh(seen[0]):
            return False
        wanted = match[2] or CHAMPION
        entry = seen[1]["versions"].get(seen[1]["aliases"].get(wanted, wanted))
        return entry is not None and _manifest_key(entry) in self._manifests

    def all(self, tenant: str, after: str = "", limit: int = 1000) -> tuple[list[Model], bool]:
        """The champions of a tenant's subjects by name, and whether there are more.

        Args:
            tenant: Whose.
            after: Names up to this one are left out.
            limit: The most.
        """
        found = [self._pristine] if not after else []
        names = sorted(name for name in self._names(tenant) if name > after)
        for name in names[:limit]:
            record = self._record(stored_name(tenant, name))
            if record and CHAMPION in record["aliases"]:
                found.append(self._model(name, record, record["aliases"][CHAMPION]))
        return found, len(names) > limit

    def registered(self, stored: str) -> Record | None:
        """What the registry says at this moment of a stored subject."""
        self.forget(stored)
        return self._record(stored)

    def forget(self, stored: str) -> None:
        """A subject is not what it was."""
        self._records.pop(stored, None)

    def _names(self, tenant: str) -> list[str]:
        shown = (shown_name(tenant, stored) for stored in self._registry.names())
        return [name for name in shown if name]

    def _record(self, stored: str) -> Record | None:
        seen = self._records.get(stored)
        if seen and self._is_fresh(seen[0]):
            return seen[1]
        record = self._registry.find(stored)
        self._records[stored] = (self._clock(), record)
        _shrink(self._records)
        return record

    def _is_fresh(self, at: float) -> bool:
        return 0 <= self._clock() - at < self._hold_s

    def _model(self, name: str, record: Record, version: str) -> Model:
        entry = record["versions"][version]
        manifest = self._manifest(*_manifest_key(entry))
        identity = manifest["identity"]
        return Model(
            name=name,
            stored=record["name"],
            version=version,
            created=int(datetime.fromisoformat(entry["created"]).timestamp()),
            guidance=float(manifest["recipe"]["validate"]["guidance"]),
            class_noun=identity["class_noun"],
            identifier=identity["identifier"],
            template=identity["template"],
            versions=tuple(record["versions"]),
        )

    def _manifest(self, path: str, of: str) -> Mapping[str, Any]:
        key = (path, of)  # a subject that was deleted and trained again may have the same version
        if key not in self._manifests:
            manifest = self._storage.manifest(path)
            if manifest is None:  # it was deleted a moment ago, or the storage lost it
                raise ApiError(
                    404, "the model's artifact is gone. Train it again", "model_not_found", "model"
                )
            self._manifests[key] = manifest
            _shrink(self._manifests)
        return self._manifests[key]

    def _unknown(self, tenant: str, model: str, param: str | None) -> ApiError:
        near = did_you_mean(model.partition("@")[0], [*self._names(tenant), PRISTINE])
        return ApiError(404, f"there is no model {model[:64]!r}. {near}", "model_not_found", param)


def _manifest_key(entry: Mapping[str, Any]) -> tuple[str, str]:
    return str(entry["artifact"]), f"{entry.get('fingerprint')} {entry.get('created')}"


def _shrink(cache: OrderedDict[Any, Any]) -> None:
    while len(cache) > MOST_MANIFESTS:
        cache.popitem(last=False)
