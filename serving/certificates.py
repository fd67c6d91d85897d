"""This file is where signing keys are known: which algorithm one is for, and a chain for development made here."""

import os
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cluster.disk import TEMPORARY, write_whole
from cluster.errors import UserError

CERTIFICATES, KEY = "certificates.pem", "key.pem"
ORGANISATION = "raybooth development, vouched for by nobody"
VALID = timedelta(days=365)
RENEW = timedelta(days=1)  # before it ends, so that no image is signed by a chain about to be refused
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}


def algorithm_of(key: bytes, name: str) -> str:
    """C2PA's word for what a private key in PEM signs with.

    Args:
        key: PEM, PKCS#8, without a passphrase.
        name: What people call it, for the error.

    Raises:
        UserError: It is no key, or of a kind that C2PA does not sign with.
    """
    try:
        private = load_pem_private_key(key, password=None)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{name} is no private key", str(error), "give PEM, PKCS#8, without a passphrase"
        ) from error
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(private, rsa.RSAPrivateKey):
        return "ps256"
    if isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name in _CURVES:
        return _CURVES[private.curve.name]
    raise UserError(
        f"{name} cannot sign", type(private).__name__, "use a key on P-256, P-384 or P-521, Ed25519 or RSA"
    )


def development_chain(folder: Path) -> tuple[bytes, bytes]:
    """Certificates and key in PEM of a chain that only this folder knows; made when there is none that is valid.

    The key of the root is thrown away: it signs one certificate. Whoever calls holds a lock on the folder.
    """
    certificates, key = folder / CERTIFICATES, folder / KEY
    if certificates.is_file() and key.is_file():
        chain = certificates.read_bytes()
        if x509.load_pem_x509_certificate(chain).not_valid_after_utc > datetime.now(UTC) + RENEW:
            return chain, key.read_bytes()
    chain, secret = _make_chain(datetime.now(UTC))
    _write_secret(key, secret)
    write_whole(certificates, chain)
    return chain, secret


def _make_chain(now: datetime) -> tuple[bytes, bytes]:
    root, signer = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    names = _name("raybooth development root"), _name("raybooth development signer")
    root_certificate = _certificate(names[0], names[0], root, root, now, ca=True)
    certificate = _certificate(names[1], names[0], signer, root, now, ca=False)
    chain = certificate.public_bytes(Encoding.PEM) + root_certificate.public_bytes(Encoding.PEM)
    return chain, signer.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    now: datetime,
    ca: bool,
) -> x509.Certificate:
    """A certificate with what C2PA asks of a signer's (usage: signatures on mail) or of its issuer's."""
    usage = x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + VALID)
        .add_extension(x509.BasicConstraints(ca, 0 if ca else None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
    )
    if not ca:
        builder = builder.add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False
        )
    return builder.sign(issuer_key, hashes.SHA256())


def _name(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, common),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANISATION),
        ]
    )


def _write_secret(target: Path, data: bytes) -> None:
    """Write a file that only its owner reads, from its first byte on."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:  # noqa: PTH123
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
