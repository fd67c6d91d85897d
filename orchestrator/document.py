"""This file is where the YAML that people wrote is read: no key twice, paths relative to the file."""

import posixpath
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import UserError

_Loader: Any = getattr(
    yaml, "CSafeLoader", yaml.SafeLoader
)  # libyaml's where it is: a long list takes a tenth


@dataclass(frozen=True)
class Document:
    """A mapping, and where the items of its lists are."""

    raw: dict[str, Any]
    lines: Mapping[str, list[int]] = field(default_factory=dict)
    """Per key of a list, the line of each of its items, from 1."""


def parse_document(text: str, shown: str) -> Document:
    """The mapping that a YAML text holds.

    Args:
        text: The YAML.
        shown: The file's name, for messages.

    Raises:
        UserError: It is empty, is not YAML, gives a key twice, or is not a mapping.
    """
    loader = _OnceLoader(text)
    try:
        node = loader.get_single_node()
        raw = loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        raise UserError(f"{shown} is not YAML", " ".join(str(error).split()), "correct it there") from error
    finally:
        loader.dispose()
    if not isinstance(raw, dict) or not raw:
        seen = "it is empty" if raw in (None, {}) else f"it is a {type(raw).__name__}"
        raise UserError(f"{shown} has no settings", seen, "write sections such as `train: {steps: 300}`")
    lists = [(key, value) for key, value in node.value if isinstance(value, yaml.SequenceNode)]
    return Document(raw, {key.value: [item.start_mark.line + 1 for item in v.value] for key, v in lists})


class _OnceLoader(_Loader):  # type: ignore[misc]
    """Refuses a key that is given twice, of which YAML would silently drop the first."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is there twice", key.start_mark
                )
            if isinstance(key.value, str):
                seen.add(key.value)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


def anchored(path: Any, folder: str) -> Any:
    """A path of a file as seen from where the file lies.

    Args:
        path: As written; what is no text, a URI or begins with `~` stays as it is.
        folder: Of the file: an absolute path or a URI.
    """
    if not isinstance(path, str) or "://" in path or path.startswith("~"):
        return path
    if "://" not in folder:
        return str(Path(folder) / path)
    if path.startswith("/"):
        return path
    scheme, _, place = folder.partition("://")
    return f"{scheme}://{posixpath.normpath(posixpath.join(place, path))}"


def anchor_run(raw: dict[str, Any], folder: str) -> None:
    """Make the relative paths in the sections of a run absolute: photos, and a base whose path begins with a dot."""
    subject, base = raw.get("subject"), raw.get("base")
    if isinstance(subject, dict) and "images" in subject:
        subject["images"] = anchored_all(subject["images"], folder)
    if isinstance(base, dict) and str(base.get("model")).startswith("."):  # else `a/b` is a hub id
        base["model"] = anchored(base["model"], folder)


def anchored_all(images: Any, folder: str) -> Any:
    """`anchored` of a path, or of each in a list."""
    return [anchored(i, folder) for i in images] if isinstance(images, list) else anchored(images, folder)
