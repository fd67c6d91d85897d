"""This file is where a base is found, in a folder or on the hub, pinned by a revision, and its parts checked."""

import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from cluster.errors import UserError
from cluster.storage import sha256_file
from training.basekind import FOLDERS, BaseKind, kind_of

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PLAIN = ("*.json", "*.txt", "*.safetensors")
_VARIANTS = ["*.fp16.safetensors", "*.fp16-*.safetensors", "*.non_ema.safetensors"]


def locate(model: str, revision: str | None, shipped: Path | None = None) -> tuple[Path, str]:
    """The local folder of a base and its revision.

    Args:
        model: A folder or a hub id, as the user wrote it.
        revision: The commit of a hub id (`None`: the newest), or the hash that a folder must have.
        shipped: The folder of a base that ships with raybooth; `model` is its name then.

    Raises:
        UserError: There is none, or it has another revision.
    """
    folder = shipped or Path(model).expanduser().resolve()
    if not folder.is_dir():
        if _HUB_ID.fullmatch(model):
            snapshot = _snapshot(model, revision)
            return snapshot, snapshot.name
        raise UserError(
            f"there is no base {model}",
            f"{folder} is not a folder" + (" but a file" if folder.is_file() else ""),
            "set base.model to a folder in diffusers layout, to a hub id, or leave it out",
        )
    found = _folder_revision(folder, model)
    if revision not in (None, found):
        raise UserError(
            f"the base {model} is not the one that was asked for",
            f"its revision is {found}, not {revision}",
            "leave base.revision out, or bring back the files it was made of",
        )
    return folder, found


def glance(model: str, revision: str | None) -> dict[str, Any] | None:
    """The model_index.json of a base that is here, in a folder or in the hub's cache; `None` where there is none."""
    file: Any = Path(model).expanduser() / "model_index.json"
    if not file.is_file():
        if not _HUB_ID.fullmatch(model):
            return None
        file = try_to_load_from_cache(model, "model_index.json", revision=revision)
        if not isinstance(file, str):
            return None
    try:
        index = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return index if isinstance(index, dict) else None


def locate_model(model: str, what: str) -> Path:
    """The local folder of a single model, such as one that embeds: a folder, or a hub id (`HUB_ID@REV`).

    Args:
        model: As the user wrote it.
        what: What it is, for people.

    Raises:
        UserError: There is none.
    """
    folder = Path(model).expanduser().resolve()
    if folder.is_dir():
        return folder
    name, _, revision = model.partition("@")
    if _HUB_ID.fullmatch(name):
        return _snapshot(name, revision or None, list(_PLAIN), what)
    raise UserError(f"there is no {what} {model}", f"{folder} is not a folder", "name a folder or a hub id")


def _snapshot(
    model: str, revision: str | None, patterns: list[str] | None = None, what: str = "base"
) -> Path:
    """The local snapshot of a hub id; downloaded only when it is not cached."""
    plain = [f"{part}/{pattern}" for part in FOLDERS for pattern in _PLAIN]
    wanted: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": patterns or ["model_index.json", *plain],
        "ignore_patterns": _VARIANTS,
    }
    try:
        return Path(snapshot_download(model, local_files_only=True, **wanted))
    except (LocalEntryNotFoundError, ValueError):
        pass
    try:
        return Path(snapshot_download(model, **wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"there is no {what} {model}" + (f" at revision {revision}" if revision else ""),
            f"no such folder, not in the local hub cache, not to be had from the hub: {_first_line(error)}",
            "check the name, or download it where there is a network and "
            + ("set base.model to its folder" if what == "base" else "name its folder"),
        ) from error


def _folder_revision(folder: Path, model: str) -> str:
    """A hash over the names and the bytes of the files that are used."""
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"the base {model} is not in diffusers layout",
            f"{folder} has no model_index.json",
            "set base.model to the folder that holds model_index.json",
        )
    kind = kind_of(read_json(folder / "model_index.json", model), model)
    stats = tuple((f, f.stat().st_size, f.stat().st_mtime_ns) for f in used_files(folder, kind))
    return _hash_files(folder, stats)


@functools.lru_cache(maxsize=16)
def _hash_files(folder: Path, stats: tuple[tuple[Path, int, int], ...]) -> str:
    """The revision of a folder; remembered while sizes and times of its files stay, as weights are large."""
    digest = hashlib.sha256()
    for file, _, _ in stats:
        digest.update(f"{file.relative_to(folder).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()[:16]


def used_files(folder: Path, kind: BaseKind) -> list[Path]:
    """The files of a base of a kind that are read, sorted."""
    parts = (folder / name for name in kind.folders)
    found = [f for part in parts for pattern in _PLAIN for f in part.glob(pattern)]
    kept = [f for f in found if not any(f.match(variant) for variant in _VARIANTS)]
    return sorted([folder / "model_index.json", *kept])


def part_config(folder: Path, part: str, model: str, kind: BaseKind) -> dict[str, Any]:
    """The config of a part of a base of a kind, its class and its weights checked.

    Raises:
        UserError: The part is missing, of another class, or has no safetensors weights.
    """
    expected, weights = kind.parts[part]
    if not (folder / part).is_dir():
        folders = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir()))
        raise UserError(
            f"the base {model} has no {part}",
            f"{folder} holds {folders or 'no folders'}",
            "name a complete pipeline in diffusers layout",
        )
    config = read_json(folder / part / "config.json", model)
    architectures = config.get("architectures") or [None]
    named = config.get("_class_name", architectures[0])
    # Other members of the family: LCM conditions on the guidance, inpainting on an image; some scale each channel.
    foreign = [key for key in ("time_cond_proj_dim", "use_attention_mask", "latents_mean") if config.get(key)]
    if part == "unet" and config.get("in_channels") != config.get("out_channels"):
        foreign.append("in_channels")
    if part == "unet" and config.get("addition_embed_type") != kind.addition:
        foreign.append("addition_embed_type")
    if named != expected or foreign:
        raise UserError(
            f"the {part} of the base {model} is of an unknown kind",
            f"{part}/config.json names {named}" + (f" with {', '.join(foreign)}" if foreign else ""),
            f"use a base whose {part} is a plain {expected}",
        )
    names = [f"{weights}.safetensors", f"{weights}.safetensors.index.json"]
    if not any((folder / part / name).is_file() for name in names):
        seen = ", ".join(sorted(p.name for p in (folder / part).iterdir()))
        raise UserError(
            f"the {part} of the base {model} has no safetensors weights",
            f"{folder / part} holds {seen}; pickles (.bin, .ckpt) are never read",
            f"convert it so that it holds {names[0]}",
        )
    return config


def read_json(path: Path, model: str) -> dict[str, Any]:
    """A JSON object of the base `model`.

    Raises:
        UserError: It is missing or no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"the base {model} is not complete", f"{path}: {_first_line(error)}", "name a complete pipeline"
        ) from error
    if not isinstance(value, dict):
        raise UserError(
            f"the base {model} is damaged", f"{path} holds no JSON object", "name a complete pipeline"
        )
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
