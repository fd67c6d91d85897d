"""This file is where API keys are made, kept as hashes, looked up and withdrawn.

A token is `rb_<id>_<secret>`: the id, twelve hex digits, is the file `keys/<id>.json` under the storage root and may be
shown; the secret has 256 random bits, so that its plain sha256 cannot be turned back. It is printed once.
"""

import hashlib
import hmac
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from cluster.errors import UserError, did_you_mean
from cluster.storage import Storage

Scope = Literal["images", "trainings", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")
ROTATION_S = 24 * 3600.0  # that the secret before the newest still opens
MOST_REMEMBERED = 10_000  # keys, found or not, so that wrong ones cost no more memory than this

_TOKEN = re.compile(r"rb_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_NOBODY = "0" * 64


@dataclass(frozen=True)
class Secret:
    """One secret of a key; while it is rotated a key has two."""

    sha256: str
    expires: float | None = None
    """Seconds since the epoch; `None` as long as the key."""


@dataclass(frozen=True)
class Key:
    """What is kept of a key."""

    id: str
    name: str
    """For people."""
    tenant: str
    scopes: tuple[Scope, ...]
    created: float
    secrets: tuple[Secret, ...]
    expires: float | None = None
    revoked: float | None = None
    per_minute: float | None = None
    """Its own rate; `None` takes the ingress's."""
    at_once: int | None = None

    @property
    def prefix(self) -> str:
        """How it is called where it may be seen."""
        return f"rb_{self.id}"

    def opens(self, token: str, now: float) -> bool:
        """Whether a token is this key's at this moment; takes as long for a wrong one."""
        given = hashlib.sha256(token.encode()).hexdigest()
        good = False
        for secret in self.secrets:
            fits = hmac.compare_digest(given, secret.sha256)
            good |= fits and (secret.expires is None or now < secret.expires)
        return good and self.revoked is None and (self.expires is None or now < self.expires)

    def as_json(self) -> dict[str, Any]:
        """What may be shown of it: no hash."""
        shown = asdict(self)
        del shown["secrets"]
        return {**shown, "prefix": self.prefix, "scopes": list(self.scopes)}


class Keys:
    """The keys under a storage root.

    Args:
        storage: The root.
        clock: Seconds since the epoch.
        hold_s: How long a look at a key holds.
    """

    def __init__(self, storage: Storage, clock: Callable[[], float], hold_s: float = 1.0) -> None:
        self._storage, self._clock, self._hold_s = storage, clock, hold_s
        self._seen: OrderedDict[str, tuple[float, Key | None]] = OrderedDict()

    def create(
        self,
        name: str,
        tenant: str = "default",
        scopes: Collection[str] = SCOPES,
        expires_s: float | None = None,
        per_minute: float | None = None,
        at_once: int | None = None,
    ) -> tuple[Key, str]:
        """A new key and its token, which nobody can read again.

        Args:
            name: For people.
            tenant: Whose it is.
            scopes: What it may do.
            expires_s: Seconds from now; `None` is never.
            per_minute: Its own rate.
            at_once: Its own number of requests at a time.

        Raises:
            UserError: The tenant or a scope cannot be used.
        """
        if not TENANT.fullmatch(tenant):
            raise UserError(
                f"{tenant!r} is no name of a tenant",
                "",
                "use letters, digits, `.`, `_`, `@` and `-`, 63 at most",
            )
        for scope in scopes:
            if scope not in SCOPES:
                raise UserError(f"there is no scope {scope!r}", "", did_you_mean(scope, SCOPES))
        now, identity = self._clock(), secrets.token_hex(6)
        token = _token(identity)
        key = Key(
            id=identity,
            name=name,
            tenant=tenant,
            scopes=tuple(scope for scope in SCOPES if scope in scopes),
            created=now,
            secrets=(Secret(_hash(token)),),
            expires=None if expires_s is None else now + expires_s,
            per_minute=per_minute,
            at_once=at_once,
        )
        self._write(key)
        return key, token

    def rotate(self, identity: str, grace_s: float = ROTATION_S) -> tuple[Key, str]:
        """A new token for a key; the one before still opens for `grace_s`. Raises as `find`."""
        with self._storage.lock(f"locks/key-{_checked(identity)}"):
            key, until = self.find(identity), self._clock() + grace_s
            token = _token(key.id)
            before = [s for s in key.secrets if s.expires is None or s.expires > self._clock()]
            ending = tuple(replace(s, expires=min(until, s.expires or until)) for s in before)
            key = replace(key, secrets=(*ending, Secret(_hash(token))))
            self._write(key)
        return key, token

    def revoke(self, identity: str) -> Key:
        """Withdraw a key for good. Raises as `find`."""
        with self._storage.lock(f"locks/key-{_checked(identity)}"):
            key = replace(self.find(identity), revoked=self._clock())
            self._write(key)
        return key

    def find(self, identity: str) -> Key:
        """A key by its id or its prefix.

        Raises:
            UserError: There is none.
        """
        found = self._read(_checked(identity))
        if found is None:
            raise UserError(f"there is no key {identity}", "", "list them: raybooth keys list")
        return found

    def all(self) -> list[Key]:
        """Every key, the oldest first."""
        names = (n.removesuffix(".json") for n in self._storage.names("keys") if n.endswith(".json"))
        found = [self._read(name) for name in names if re.fullmatch(r"[0-9a-f]{12}", name)]
        return sorted((key for key in found if key), key=lambda key: (key.created, key.id))

    def opened_by(self, token: str) -> Key | None:
        """The key that a token opens at this moment; reads what is stored anew after `hold_s`."""
        match = _TOKEN.fullmatch(token)
        key = self._held(match[1]) if match else None
        if key is None:  # takes about as long as a wrong secret
            Key("", "", "", (), 0.0, (Secret(_NOBODY),)).opens(token, 0.0)
            return None
        return key if key.opens(token, self._clock()) else None

    def is_held(self, token: str) -> bool:
        """Whether `opened_by` answers without a look at the storage."""
        match = _TOKEN.fullmatch(token)
        return match is None or self._fresh(match[1])

    def _fresh(self, identity: str) -> bool:
        return identity in self._seen and 0 <= self._clock() - self._seen[identity][0] < self._hold_s

    def _held(self, identity: str) -> Key | None:
        if not self._fresh(identity):
            self._seen[identity] = (self._clock(), self._read(identity))
            while len(self._seen) > MOST_REMEMBERED:
                self._seen.popitem(last=False)
        return self._seen[identity][1]

    def _read(self, identity: str) -> Key | None:
        try:
            value = self._storage.read_json(f"keys/{identity}.json")
        except FileNotFoundError:
            return None
        value["secrets"] = tuple(Secret(**secret) for secret in value["secrets"])
        value["scopes"] = tuple(value["scopes"])
        return Key(**value)

    def _write(self, key: Key) -> None:
        self._storage.write_json(f"keys/{key.id}.json", asdict(key))


def _token(identity: str) -> str:
    return f"rb_{identity}_{secrets.token_urlsafe(32)}"


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _checked(identity: str) -> str:
    plain = identity.removeprefix("rb_")
    if not re.fullmatch(r"[0-9a-f]{12}", plain):
        raise UserError(f"{identity!r} is no id of a key", "", "list them: raybooth keys list")
    return plain
