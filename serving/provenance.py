"""This file is where an image becomes a PNG that says where it comes from.

Three layers, each able to stand alone: the parameters as text (every image tool reads it, few keep it), the watermark
(survives compression and resizing, says little), the signed C2PA manifest (says who vouches, and few keep it).
The first two depend on the image and its facts alone. The third carries a time, so it is added last and when asked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from serving.credentials import Credentials
from serving.watermark import SMALLEST, embed, tag_of
from training.png import Pixels, encode_png

NO_ROOM = f"none: the shorter side is under {SMALLEST} pixels"
TURNED_OFF = "none: turned off"


@dataclass(frozen=True)
class Provenance:
    """How images are told apart from photographs."""

    watermark: bool = True
    """Off only by the operator's word; the parameters say so then."""
    credentials: Credentials | None = None
    """With what a C2PA manifest is signed; `None` adds none."""

    def png(self, pixels: Pixels, facts: Mapping[str, Any]) -> bytes:
        """PNG bytes with parameters, watermark and, with credentials, a signed manifest.

        Without credentials the bytes depend on nothing but the arguments.

        Args:
            pixels: [H, W, 3] uint8.
            facts: The parameters: among them `artifact` (its hash; `None` for a base) and `base_revision`.

        Raises:
            SystemFailure: The manifest could not be signed.
        """
        png, said = self.unsigned(pixels, facts)
        return self.signed(png, said)

    def unsigned(self, pixels: Pixels, facts: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
        """The PNG without a manifest, and the facts that it carries: those given, and `watermark`."""
        identity = str(facts.get("artifact") or facts.get("base_revision") or "")
        marked = embed(pixels, identity) if self.watermark else None
        none = NO_ROOM if self.watermark else TURNED_OFF
        said = {**facts, "watermark": none if marked is None else tag_of(identity)}
        return encode_png(pixels if marked is None else marked, said), said

    def signed(self, png: bytes, facts: Mapping[str, Any]) -> bytes:
        """The PNG with a manifest, where there are credentials.

        Raises:
            SystemFailure: It could not be signed.
        """
        if self.credentials is None:
            return png
        claimed = {key: facts.get(key) for key in ("artifact", "base_revision", "watermark")}
        return self.credentials.sign(png, claimed, version("raybooth"))
