"""A PNG says where it comes from, its signature breaks when it is changed, and its key stays its owner's."""

import io
import pickle
import stat
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from PIL import Image

from cluster.errors import SystemFailure, UserError
from cluster.registry import Registry
from cluster.storage import Storage
from serving.credentials import CREATED_BY_A_MODEL, DEVELOPMENT, Credentials, open_credentials, read_manifest
from serving.inspection import artifacts_with, inspect_picture
from serving.provenance import NO_ROOM, TURNED_OFF, Provenance
from training.artifact import artifact_hash
from training.png import Pixels, decode_png, encode_png, png_parameters

HASH = "0f3a9c71" + "5b" * 28
FACTS = {"prompt": "a zwx dog, très grand", "seed": 7, "artifact": HASH, "base_revision": "c0ffee00"}


def picture(side: int = 64) -> Pixels:
    small = np.random.default_rng(0).integers(40, 216, (6, 6, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small, "RGB").resize((side, side), Image.Resampling.BICUBIC))


def as_jpeg(png: bytes, by: float = 1.0) -> bytes:
    stream = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.resize((int(image.width * by), int(image.height * by))).save(stream, "JPEG", quality=80)
    return stream.getvalue()


@pytest.fixture
def signer(storage: Storage) -> Credentials:
    return open_credentials(storage, None, None)


def test_without_a_signature_the_bytes_depend_on_image_and_facts_alone() -> None:
    one, two = (Provenance().png(picture(), FACTS) for _ in range(2))
    assert one == two
    assert png_parameters(one) == {**FACTS, "watermark": HASH[:8]}


def test_a_small_or_unmarked_image_says_why_it_has_no_mark() -> None:
    small = Provenance().png(picture(16), FACTS)
    assert png_parameters(small)["watermark"] == NO_ROOM
    off = Provenance(watermark=False).png(picture(), FACTS)
    assert png_parameters(off)["watermark"] == TURNED_OFF
    assert (decode_png(off) == picture()).all()


def test_an_image_of_the_base_is_marked_with_its_revision() -> None:
    png = Provenance().png(picture(256), {**FACTS, "artifact": None})
    found = inspect_picture(png, "it")
    assert found.watermark and found.watermark["tag"] == "c0ffee00" and found.agrees


def test_a_signed_image_says_who_made_it_and_keeps_its_parameters(signer: Credentials) -> None:
    png = Provenance(credentials=signer).png(picture(), FACTS)
    assert (decode_png(png) == decode_png(Provenance().png(picture(), FACTS))).all()
    found = inspect_picture(png, "it", signer.certificates.decode())
    assert found.parameters == {**FACTS, "watermark": HASH[:8]}
    assert found.watermark and found.watermark["tag"] == HASH[:4] and found.agrees
    assert found.c2pa == {
        "state": "trusted",
        "problems": [],
        "signed_by": "raybooth development signer",
        "organisation": "raybooth development, vouched for by nobody",
        "generator": found.c2pa and found.c2pa["generator"],
        "source_type": CREATED_BY_A_MODEL,
        "facts": {"artifact": HASH, "base_revision": "c0ffee00", "watermark": HASH[:8]},
    }
    assert found.c2pa["generator"].startswith("raybooth 0.")


def test_a_signature_of_somebody_unknown_is_valid_but_not_trusted(signer: Credentials) -> None:
    found = read_manifest(Provenance(credentials=signer).png(picture(), FACTS), "image/png")
    assert found and found["state"] == "valid" and found["problems"] == ["signingCredential.untrusted"]


def test_a_signed_image_that_was_changed_is_found_out(signer: Credentials) -> None:
    png = Provenance(credentials=signer).png(picture(), FACTS)
    changed = png.replace(b"zwx dog", b"zwx cat")
    assert changed != png
    found = read_manifest(png[:-30] + bytes([png[-30] ^ 1]) + png[-29:], "image/png")
    assert found and found["state"] == "invalid"
    found = read_manifest(changed, "image/png", signer.certificates.decode())
    assert found and found["state"] == "invalid" and "assertion.dataHash.mismatch" in found["problems"]


@pytest.mark.parametrize("by", [1.0, 0.75])
def test_after_jpeg_and_resizing_the_mark_is_all_that_is_left(signer: Credentials, by: float) -> None:
    found = inspect_picture(as_jpeg(Provenance(credentials=signer).png(picture(256), FACTS), by), "it")
    assert (found.format, found.width) == ("JPEG", int(256 * by))
    assert found.parameters is None and found.c2pa is None and found.agrees is None
    assert found.watermark and found.watermark["tag"] == HASH[:8]


def test_the_development_chain_is_made_once_and_its_key_is_its_owners(storage: Storage) -> None:
    one, two = open_credentials(storage, None, None), open_credentials(storage, None, None)
    assert one == two and one.development and one.algorithm == "es256"
    folder = Path(storage.full(DEVELOPMENT))
    assert stat.S_IMODE((folder / "key.pem").stat().st_mode) == 0o600
    assert not list(folder.glob(".tmp-*"))
    assert "PRIVATE" not in repr(one) and "PRIVATE" not in one.certificates.decode()
    (signer, root) = x509.load_pem_x509_certificates(one.certificates)
    signer.verify_directly_issued_by(root)
    assert pickle.loads(pickle.dumps(one)) == one


def test_configured_credentials_are_used_and_are_no_development(storage: Storage, tmp_path: Path) -> None:
    made = open_credentials(storage, None, None)
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    certificate.write_bytes(made.certificates)
    key.write_bytes(made.key)
    found = open_credentials(storage, certificate, key)
    assert (found.certificates, found.key, found.development) == (made.certificates, made.key, False)


def test_credentials_of_no_use_are_refused_before_anything_is_drawn(storage: Storage, tmp_path: Path) -> None:
    good, junk = tmp_path / "c.pem", tmp_path / "k.pem"
    good.write_bytes(open_credentials(storage, None, None).certificates)
    junk.write_text("no key")
    for certificate, key in ((good, None), (None, junk), (good, junk), (tmp_path / "none", junk)):
        with pytest.raises(UserError):
            open_credentials(storage, certificate, key)


def test_an_image_that_cannot_be_signed_is_not_given_out_unsigned(signer: Credentials) -> None:
    other = Credentials(b"no certificate", signer.key, signer.algorithm)
    with pytest.raises(SystemFailure, match="could not be signed"):
        Provenance(credentials=other).png(picture(), FACTS)


def test_a_picture_of_somebody_else_says_nothing() -> None:
    for data in (encode_png(picture()), as_jpeg(encode_png(picture()))):
        found = inspect_picture(data, "it")
        assert (found.parameters, found.watermark, found.agrees, found.c2pa) == (None, None, None, None)


def test_a_mark_that_is_not_that_of_the_parameters_is_said() -> None:
    png = Provenance().png(picture(256), FACTS)
    forged = encode_png(decode_png(png), {**FACTS, "artifact": "ff" * 32, "watermark": "ffffffff"})
    assert inspect_picture(forged, "it").agrees is False


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    for data in (b"", b"GIF89a", encode_png(picture())[:100]):
        with pytest.raises(UserError, match="no picture"):
            inspect_picture(data, "it")


def test_a_tag_leads_to_the_artifact(storage: Storage, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "w.bin").write_bytes(b"weights")
    manifest = storage.publish(weights, "artifacts/rex/v1", {"kind": "test"})
    Registry(storage).add("rex", "v1", {"artifact": "artifacts/rex/v1", "fingerprint": "f"})
    tag = artifact_hash(manifest)[:8]
    assert artifacts_with(storage, tag) == artifacts_with(storage, tag[:4]) == ["rex@v1"]
    assert artifacts_with(storage, "00000000") == []
