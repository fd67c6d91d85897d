"""This file is where images lie that are answered as a URL: for a while, under a URL that is signed.

`outputs/TENANT/SUBJECT/EXPIRES-ID.png`: the name says when it may go, so that nothing else has to be kept of it.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable
from urllib.parse import quote
from uuid import uuid4

from cluster.storage import Storage
from serving.answers import ApiError

_SECRET = "keys/signing.json"
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]*")


class Signer:
    """Signs with a secret that every ingress of a storage root shares; made when it is first needed."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._secret: bytes | None = None

    def signature(self, text: str) -> str:
        """The signature of a text, in hex."""
        if self._secret is None:
            self._secret = self._read()
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()

    def is_of(self, signature: str, text: str) -> bool:
        """Whether a signature is the text's."""
        return hmac.compare_digest(signature.encode(), self.signature(text).encode())

    def _read(self) -> bytes:
        with self._storage.lock("locks/key-signing"):
            if not self._storage.exists(_SECRET):
                self._storage.write_json(_SECRET, {"secret": secrets.token_hex(32)})
            return bytes.fromhex(self._storage.read_json(_SECRET)["secret"])


class Outputs:
    """The images behind URLs. Its methods read and write the storage: call them in a thread.

    Args:
        storage: The root.
        signer: Signs URLs.
        clock: Seconds since the epoch.
        keep_s: How long an image is kept.
    """

    def __init__(self, storage: Storage, signer: Signer, clock: Callable[[], float], keep_s: float) -> None:
        self._storage, self._signer, self._clock, self._keep_s = storage, signer, clock, keep_s

    def keep(self, tenant: str, subject: str, png: bytes, address: str) -> str:
        """Keep an image for a while; its URL.

        Args:
            tenant: Whose.
            subject: The stored name of what it shows.
            png: The image.
            address: Of the ingress, as the client knows it.
        """
        expires = int(self._clock() + self._keep_s)
        path = f"outputs/{tenant}/{subject}/{expires}-{uuid4().hex}.png"
        self._storage.write(path, png)
        return self.url(path, expires, address)

    def url(self, path: str, expires: int, address: str) -> str:
        """The URL of an object that holds an image.

        Args:
            path: Of the object; it begins with `outputs/` or `predictions/`.
            expires: When the URL ends, in seconds since the epoch.
            address: Of the ingress, as the client knows it.
        """
        signature = self._signer.signature(f"{path} {expires}")
        return f"{address}/v1/outputs/{quote(path)}?expires={expires}&signature={signature}"

    def read(self, path: str, expires: int, signature: str) -> bytes:
        """The image of a signed URL.

        Raises:
            ApiError: 403: the signature is not the URL's; 404: it has expired or was deleted.
        """
        if not self._signer.is_of(signature, f"{path} {expires}"):
            raise ApiError(403, "the URL is not one that was given out", "bad_signature")
        if self._clock() < expires:
            try:
                return self._storage.read(path)
            except FileNotFoundError:
                pass
        raise ApiError(404, "the image is not kept any more. Draw it again", "expired")

    def sweep(self) -> int:
        """Remove what has expired; how many images went."""
        removed = 0
        for tenant in self._storage.names("outputs"):
            for subject in self._storage.names(f"outputs/{tenant}"):
                folder = f"outputs/{tenant}/{subject}"
                names = self._storage.names(folder)
                old = [name for name in names if self._is_old(name)]
                for name in old:
                    self._storage.remove(f"{folder}/{name}")
                removed += len(old)
                if len(old) == len(names) and self._storage.is_local:
                    self._storage.remove(folder)
        return removed

    def _is_old(self, name: str) -> bool:
        expires = name.partition("-")[0]
        return expires.isdigit() and int(expires) <= self._clock()
