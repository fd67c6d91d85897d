"""This file is where a picture is asked what it says of itself."""

import io
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from cluster.errors import UserError
from cluster.registry import Registry
from cluster.storage import Storage
from serving.credentials import read_manifest
from serving.watermark import read
from training.artifact import artifact_hash
from training.png import KEY

FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True)
class Inspection:
    """What a picture says of itself."""

    format: str
    width: int
    height: int
    parameters: Mapping[str, Any] | None
    """Of a PNG that still has its text."""
    watermark: dict[str, Any] | None
    """`tag` and `certainty`; `None` when no mark can be read."""
    agrees: bool | None
    """The watermark is that of the artifact in the parameters; `None` when one of them is missing."""
    c2pa: dict[str, Any] | None
    """The manifest and its state; `None` when there is none."""

    def as_json(self) -> dict[str, Any]:
        """Everything, as `--json` prints it."""
        return asdict(self)


def inspect_picture(data: bytes, name: str, anchors: str = "") -> Inspection:
    """What a PNG, JPEG or WebP says of itself.

    Args:
        data: The picture.
        name: What people call it, for the error.
        anchors: Certificates in PEM that are trusted to vouch for signers.

    Raises:
        UserError: It is no picture that can be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                pixels = np.array(image.convert("RGB"))
                kind, text = str(image.format), getattr(image, "text", {}).get(KEY)
        except (OSError, ValueError, SyntaxError, Warning, Image.DecompressionBombError) as error:
            what = f"{name} is no picture that can be read"
            raise UserError(what, str(error), "give a PNG, JPEG or WebP") from error
    parameters = _parameters(text)
    mark = read(pixels)
    drawn_by = parameters and (parameters.get("artifact") or parameters.get("base_revision"))
    return Inspection(
        format=kind,
        width=pixels.shape[1],
        height=pixels.shape[0],
        parameters=parameters,
        watermark=asdict(mark) if mark else None,
        agrees=str(parameters["watermark"]).startswith(mark.tag)
        if mark and parameters and drawn_by and "watermark" in parameters
        else None,
        c2pa=_manifest(data, f"image/{kind.lower()}", anchors),
    )


def artifacts_with(storage: Storage, tag: str) -> list[str]:
    """The registered versions, `NAME@VERSION`, whose artifact's hash begins as a watermark's tag says."""

    registry = Registry(storage)
    found = []
    for name in registry.names():
        for version, entry in registry.show(name)["versions"].items():
            manifest = storage.manifest(entry["artifact"])
            if manifest and artifact_hash(manifest).startswith(tag):
                found.append(f"{name}@{version}")
    return found


def _parameters(text: str | None) -> dict[str, Any] | None:
    """The text of a PNG: ours is JSON, other programs write what they like under the same key."""
    if not text:
        return None
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    return value if isinstance(value, dict) else {"text": str(text)}


def _manifest(data: bytes, mime: str, anchors: str) -> dict[str, Any] | None:
    try:
        return read_manifest(data, mime, anchors)
    except UserError as error:
        return {"state": "not read", "problems": [str(error)]}
