"""This file is where prompts become image files: the `generate` command without its options."""

import os
import queue
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from cluster.errors import SystemFailure, UserError
from cluster.registry import Registry
from cluster.storage import Storage, sha256
from serving.engine import Engine
from serving.protocol import PRISTINE, Drawn, Event, ImageOrder, Stepped
from serving.provenance import Provenance
from training.artifact import artifact_path
from training.defaults import with_defaults
from training.pipeline import BaseInfo, open_base
from training.png import decode_png, encode_png, grid
from training.recipe import Recipe, SamplerName
from training.request import DrawRequest

_MAX_SLUG = 60


@dataclass(frozen=True)
class GenerateResult:
    """What was drawn, prompt by prompt and seed by seed."""

    images: list[Path]
    """Absolute paths of the PNGs."""
    seeds: list[int]
    """The seed of each."""
    grid: Path | None
    """All of them in one PNG, a row per prompt; `None` for a single image."""


def generate(
    storage: Storage,
    name: str,
    version: str | None,
    prompts: Sequence[str],
    *,
    n: int = 4,
    seed: int = 0,
    negative_prompt: str = "",
    steps: int = 25,
    guidance: float | None = None,
    sampler: str | None = None,
    eta: float = 0.0,
    out: Path,
    base: str = "pocket",
    on_images: Callable[[int], None] | None = None,
    provenance: Provenance | None = None,
) -> GenerateResult:
    """Draw images of a registered subject, or of a pristine base, as PNG files.

    The bytes of an image depend on its prompt, its seed and the settings: not on `n`, the path or the time, unless
    `provenance` signs it.

    Args:
        storage: Where the subject's artifact is.
        name: The subject; `base` draws with the pristine `base`.
        version: `v2`, an alias, or `None` for the champion.
        prompts: May say `{subject}` and `{class}`; the same prompt twice is drawn once.
        n: Images per prompt; image i has the seed `seed + i`.
        seed: Of the first image of each prompt.
        negative_prompt: What should not be there.
        steps: Denoising steps.
        guidance: Guidance scale; 1 is without, `None` takes what the subject was validated with.
        sampler: A `SamplerName`, such as `ddim`; `None` is the base's own.
        eta: Of `ddim`.
        out: Folder that takes the PNGs; files of the same name are replaced.
        base: What `base` is.
        on_images: Called with the number of images done, also between images.
        provenance: What the PNGs say of where they come from; `None`: parameters and watermark, no signature.

    Raises:
        UserError: There is no such subject or version, a prompt cannot be used, or `out` cannot be written.
    """
    pinned, version, scale = _found(storage, name, version, base)
    orders = {
        f"{number}-{i}": ImageOrder(
            f"{number}-{i}",
            name,
            version,
            DrawRequest(
                prompt,
                seed + i,
                negative_prompt,
                steps,
                scale if guidance is None else guidance,
                cast(SamplerName | None, sampler),
                eta,
            ),
            progress=on_images is not None,
        )
        for number, prompt in enumerate(dict.fromkeys(prompts))
        for i in range(n)
    }
    _make_folder(out)
    finish = (provenance or Provenance()).png
    engine = Engine(pinned, None if name == PRISTINE else storage, finish=finish)
    pngs = _drawn(engine, orders, on_images)
    label = PRISTINE if name == PRISTINE else f"{name}-{version}"
    paths = []
    for id, order in orders.items():
        path = out.absolute() / f"{label}-{_slug(order.request.prompt)}-s{order.request.seed}.png"
        _replace(path, pngs[id])
        paths.append(path)
    sheet = out.absolute() / "grid.png" if len(paths) > 1 else None
    if sheet:
        images = [decode_png(pngs[id]) for id in orders]
        _replace(sheet, encode_png(grid(images, columns=n if n > 1 else min(len(images), 8)), None))
    return GenerateResult(paths, [order.request.seed for order in orders.values()], sheet)


def _found(storage: Storage, name: str, version: str | None, base: str) -> tuple[BaseInfo, str, float]:
    """The base that draws, the version, and the guidance that was validated with."""
    if name == PRISTINE:
        recipe = Recipe.model_validate(with_defaults({"base": {"model": base}}))
        return open_base(base), "", recipe.validate_.guidance
    version, _ = Registry(storage).resolve(name, version)
    manifest = storage.manifest(artifact_path(name, version))
    if manifest is None:
        raise SystemFailure(
            f"{storage.full(artifact_path(name, version))} is missing or was not finished",
            "",
            "train it again",
        )
    pinned = open_base(manifest["base"]["model"], manifest["base"]["revision"])
    return pinned, version, float(manifest["recipe"]["validate"]["guidance"])


def _drawn(
    engine: Engine, orders: Mapping[str, ImageOrder], on_images: Callable[[int], None] | None
) -> dict[str, bytes]:
    """The PNG of each order; the first error ends them all."""
    said: queue.SimpleQueue[tuple[str, Event | Exception]] = queue.SimpleQueue()
    pngs: dict[str, bytes] = {}
    steps = 0.0
    try:
        for id, order in orders.items():
            engine.submit(order, lambda event, id=id: said.put((id, event)))  # type: ignore[misc]
        while len(pngs) < len(orders):
            id, event = said.get()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Stepped):
                steps += 1 / event.steps
            if isinstance(event, Drawn):
                pngs[id] = event.png
            if on_images:
                on_images(max(len(pngs), int(steps + 1e-6)))
    finally:
        engine.close()
    return pngs


def _slug(prompt: str) -> str:
    """The prompt for a file name; a short hash tells apart what letters and digits alone would not."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:_MAX_SLUG].strip("-")
    says_it = prompt.replace("{subject}", "subject") == slug.replace("-", " ")
    if says_it and "subject" not in prompt.replace("{subject}", ""):
        return slug
    return "-".join(part for part in (slug, sha256(prompt.encode())[:6]) if part)


def _make_folder(out: Path) -> None:
    """Make the folder before anything is drawn."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(out, error) from error
    if not os.access(out, os.W_OK):
        raise _cannot_write(out, PermissionError("no permission to write there"))


def _replace(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    aside = path.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        aside.write_bytes(data)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be written", str(error), "name another folder with --out")
