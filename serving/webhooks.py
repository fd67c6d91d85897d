"""This file is where webhooks are signed, as standardwebhooks.com has it, with secrets that can be rotated."""

import base64
import hashlib
import hmac
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from cluster.storage import Storage

ROTATION_S = 24 * 3600.0  # that the secret before the newest still signs
PREFIX = "whsec_"


class WebhookSecrets:
    """The secrets that each tenant's webhooks are signed with. They are kept as they are: one who signs needs them.

    Args:
        storage: The root.
        clock: Seconds since the epoch.
    """

    def __init__(self, storage: Storage, clock: Callable[[], float]) -> None:
        self._storage, self._clock = storage, clock

    def of(self, tenant: str) -> list[str]:
        """A tenant's secrets, the newest first; one is made when there is none."""
        found = self._standing(tenant)
        return found or [self.rotate(tenant)]

    def rotate(self, tenant: str) -> str:
        """A new secret; those before it sign for `ROTATION_S` more."""
        with self._storage.lock(f"locks/webhooks-{tenant}"):
            until, new = (
                self._clock() + ROTATION_S,
                PREFIX + base64.b64encode(secrets.token_bytes(32)).decode(),
            )
            before = [
                {"secret": each["secret"], "expires": min(each["expires"] or until, until)}
                for each in self._read(tenant)
                if each["expires"] is None or each["expires"] > self._clock()
            ]
            self._storage.write_json(_path(tenant), [{"secret": new, "expires": None}, *before])
        return new

    def _standing(self, tenant: str) -> list[str]:
        now = self._clock()
        return [e["secret"] for e in self._read(tenant) if e["expires"] is None or e["expires"] > now]

    def _read(self, tenant: str) -> list[dict[str, Any]]:
        try:
            found: list[dict[str, Any]] = self._storage.read_json(_path(tenant))
        except FileNotFoundError:
            return []
        return found


def signed(signing: Sequence[str], identity: str, at: float, body: bytes) -> dict[str, str]:
    """The headers of a webhook.

    Args:
        signing: Secrets, each of which signs.
        identity: Of the message, the same each time that it is sent.
        at: Seconds since the epoch.
        body: What is sent.
    """
    stamp = str(int(at))
    text = b".".join((identity.encode(), stamp.encode(), body))
    signatures = [
        base64.b64encode(
            hmac.new(base64.b64decode(secret.removeprefix(PREFIX)), text, hashlib.sha256).digest()
        ).decode()
        for secret in signing
    ]
    return {
        "content-type": "application/json",
        "webhook-id": identity,
        "webhook-timestamp": stamp,
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }


def _path(tenant: str) -> str:
    return f"webhooks/{tenant}.json"
