"""This file is where the same request, sent twice, is done once: by the key that its client gives it."""

import json
import time
from collections.abc import Callable
from typing import Any

from cluster.storage import Storage, sha256
from serving.answers import ApiError


class Idempotency:
    """The keys under a storage root. Its methods read and write the storage.

    Args:
        storage: The root.
        clock: Seconds since the epoch.
        keep_s: How long a key is remembered.
    """

    def __init__(self, storage: Storage, clock: Callable[[], float], keep_s: float) -> None:
        self._storage, self._clock, self._keep_s = storage, clock, keep_s

    def once(
        self, tenant: str, kind: str, key: str | None, body: Any, make: Callable[[], str]
    ) -> tuple[str, bool]:
        """The id that a request has, and whether it was made just now.

        Args:
            tenant: Whose request it is.
            kind: What it is about: one key may be used for each.
            key: The client's; `None` makes a new one each time.
            body: All that decides what is made, in plain values.
            make: Puts it on record, and gives its id.

        Raises:
            ApiError: 409: the key was used with another body.
        """
        if key is None:
            return make(), True
        name = sha256(key.encode())
        path = f"idempotency/{tenant}/{kind}/{name}.json"
        digest = sha256(json.dumps(body, sort_keys=True).encode())
        with self._storage.lock(f"locks/idempotency-{sha256(f'{tenant} {name}'.encode())[:2]}"):
            try:
                known = self._storage.read_json(path)
            except FileNotFoundError:
                known = None
            if known and self._clock() < known["at"] + self._keep_s:
                if known["digest"] != digest:
                    said = (
                        "the Idempotency-Key was used with another request. Use a new key for a new request"
                    )
                    raise ApiError(409, said, "idempotency_key_reused")
                return str(known["id"]), False
            identity = make()
            self._storage.write_json(path, {"id": identity, "digest": digest, "at": self._clock()})
        return identity, True

    def sweep(self) -> None:
        """Forget keys whose time is over, by the store's own clock, which is about this machine's."""
        now = time.time()
        for tenant in self._storage.names("idempotency"):
            for kind in self._storage.names(f"idempotency/{tenant}"):
                folder = f"idempotency/{tenant}/{kind}"
                for name, written in self._storage.times(folder).items():
                    if now - written > self._keep_s:
                        self._storage.remove(f"{folder}/{name}")
