"""This file is where C2PA manifests are signed into PNGs and read out of pictures: the door of c2pa-python.

A signature carries its time and random numbers: the bytes of a signed picture are never the same twice.
Nothing here asks the network, but for a time stamp where an authority is configured.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import SystemFailure, UserError
from cluster.storage import Storage

CREATED_BY_A_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
ASSERTION = "org.raybooth.provenance"
DEVELOPMENT = "provenance/development"  # below the storage root
_OFFLINE = {
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_trust": True},
    "builder": {"thumbnail": {"enabled": False}},
}


@dataclass(frozen=True)
class Credentials:
    """With what manifests are signed. Survives pickling between processes, key and all: keep it in the cluster."""

    certificates: bytes
    """The signer's certificate and those that vouch for it, in PEM."""
    key: bytes = field(repr=False)
    algorithm: str
    development: bool = False
    """The chain was made here and nobody vouches for it."""
    timestamp_url: str | None = None
    """A time stamping authority (RFC 3161), asked for every image; `None` asks nobody."""

    def sign(self, png: bytes, facts: Mapping[str, Any], version: str) -> bytes:
        """The PNG with a signed manifest: made by a model, by raybooth, from these.

        Args:
            png: What is signed.
            facts: What the manifest says besides.
            version: Of raybooth.

        Raises:
            SystemFailure: It could not be signed. Nothing unsigned is returned instead.
        """
        c2pa = _library()
        agent = {"name": "raybooth", "version": version}
        action = {
            "action": "c2pa.created",
            "digitalSourceType": CREATED_BY_A_MODEL,
            "softwareAgent": agent,
        }
        manifest = {
            "claim_generator_info": [agent],
            "assertions": [
                {"label": "c2pa.actions.v2", "data": {"actions": [action]}},
                {"label": ASSERTION, "data": dict(facts)},
            ],
        }
        signed = io.BytesIO()
        try:
            context = c2pa.Context(settings=c2pa.Settings.from_dict(_OFFLINE))
            info = c2pa.C2paSignerInfo(self.algorithm, self.certificates, self.key, self.timestamp_url)
            with (
                context,
                c2pa.Signer.from_info(info) as signer,
                c2pa.Builder(json.dumps(manifest), context) as builder,
            ):
                builder.sign(signer, "image/png", io.BytesIO(png), signed)
        except c2pa.C2paError as error:
            do = "check the certificate, its key and the time stamping authority"
            raise SystemFailure("an image could not be signed", str(error), do) from error
        return signed.getvalue()


def open_credentials(
    storage: Storage, certificate: Path | None, key: Path | None, timestamp_url: str | None = None
) -> Credentials:
    """The configured credentials, or, where none are, those of a development chain under the storage root.

    Args:
        storage: Where the development chain is kept; its root must be a folder for that.
        certificate: PEM: the signer's certificate, then those that vouch for it.
        key: PEM, PKCS#8, without a passphrase.
        timestamp_url: A time stamping authority.

    Raises:
        UserError: One of the two files is missing or of no use, or the storage root cannot hold a key.
    """
    _library()
    from serving.certificates import algorithm_of, development_chain

    if (certificate is None) is not (key is None):
        raise UserError("a certificate goes with its key", "only one of them is configured", "name both")
    if certificate and key:
        try:
            chain, secret = certificate.read_bytes(), key.read_bytes()
        except OSError as error:
            raise UserError("the signing credentials cannot be read", str(error)) from error
        return Credentials(chain, secret, algorithm_of(secret, str(key)), False, timestamp_url)
    if not storage.is_local:
        raise UserError(
            "there are no credentials to sign with",
            f"{storage.uri} is no place for the key of a development chain",
            "name a certificate and its key",
        )
    with storage.lock("locks/provenance-development"):
        chain, secret = development_chain(Path(storage.full(DEVELOPMENT)))
    return Credentials(chain, secret, algorithm_of(secret, DEVELOPMENT), True, timestamp_url)


def read_manifest(data: bytes, mime: str, anchors: str = "") -> dict[str, Any] | None:
    """What the C2PA manifest of a picture says; `None` when it has none.

    Args:
        data: The picture.
        mime: Such as `image/png`.
        anchors: Certificates in PEM that are trusted.

    Returns:
        `state` (`trusted`; `valid`: unchanged since it was signed, by somebody unknown; `invalid`), `problems` (what
        failed), `signed_by`, `generator`, `source_type`, `facts` (ours).

    Raises:
        UserError: c2pa-python is not installed.
    """
    c2pa = _library()
    settings = {**_OFFLINE, **({"trust": {"trust_anchors": anchors}} if anchors else {})}
    try:
        with (
            c2pa.Context(settings=c2pa.Settings.from_dict(settings)) as context,
            c2pa.Reader(mime, io.BytesIO(data), context=context) as reader,
        ):
            report: dict[str, Any] = json.loads(reader.json())
    except c2pa.C2paError.ManifestNotFound:
        return None
    except c2pa.C2paError as error:
        return {"state": "invalid", "problems": [str(error)]}
    manifest = report.get("manifests", {}).get(report.get("active_manifest"), {})
    assertions = {found["label"]: found.get("data", {}) for found in manifest.get("assertions", [])}
    actions = assertions.get("c2pa.actions.v2", {}).get("actions", [])
    signature = manifest.get("signature_info", {})
    return {
        "state": str(report.get("validation_state", "invalid")).lower(),
        "problems": [status["code"] for status in report.get("validation_status", [])],
        "signed_by": signature.get("common_name"),
        "organisation": signature.get("issuer"),
        "generator": " ".join(
            str(manifest.get("claim_generator_info", [{}])[0].get(part, "")) for part in ("name", "version")
        ).strip(),
        "source_type": next((a["digitalSourceType"] for a in actions if "digitalSourceType" in a), None),
        "facts": assertions.get(ASSERTION),
    }


def _library() -> Any:
    """c2pa-python, an extra: it brings a library of 16 MB that not every place wants."""
    try:
        import c2pa
    except ImportError as error:
        raise UserError(
            "C2PA manifests need c2pa-python", str(error), "pip install 'raybooth[provenance]'"
        ) from error
    return c2pa
