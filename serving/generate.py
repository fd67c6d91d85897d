"""This file is where prompts become image files: the `generate` command without its options."""

import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cluster.errors import UserError
from cluster.registry import Registry
from cluster.storage import Storage, manifest_hash, sha256
from serving.protocol import PRISTINE
from serving.provenance import Provenance
from training.artifact import Identity, open_artifact
from training.draw import Drawer
from training.pipeline import open_base
from training.png import encode_png, grid
from training.prompt import render_prompt
from training.recipe import Recipe, SamplerName, with_defaults
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


@dataclass(frozen=True)
class _Subject:
    """Who is drawn, by what."""

    drawer: Drawer
    label: str
    identity: Identity | None
    guidance: float
    artifact: str | None
    """The hash of the artifact; `None` for the base."""


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
    sampler: str = "ddim",
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
        sampler: `ddim` or `dpm++2m`.
        eta: Of `ddim`.
        out: Folder that takes the PNGs; files of the same name are replaced.
        base: What `base` is.
        on_images: Called with the number of images done, also between images.
        provenance: What the PNGs say of where they come from; `None`: parameters and watermark, no signature.

    Raises:
        UserError: There is no such subject or version, a prompt cannot be used, or `out` cannot be written.
    """
    with _opened(storage, name, version, base) as subject:
        scale = subject.guidance if guidance is None else guidance
        wanted = [
            (
                prompt,
                DrawRequest(words, seed + i, negative_prompt, steps, scale, cast(SamplerName, sampler), eta),
            )
            for prompt in dict.fromkeys(prompts)
            for words in [_render(prompt, subject.identity)]
            for i in range(n)
        ]

        def report(done: int, total: int) -> None:
            if on_images:
                on_images(done * len(wanted) // total)

        _make_folder(out)
        images = subject.drawer.draw([request for _, request in wanted], report)
        revision = subject.drawer.base.revision
    provenance, paths = provenance or Provenance(), []
    for (prompt, request), image in zip(wanted, images, strict=True):
        path = out.absolute() / f"{subject.label}-{_slug(prompt)}-s{request.seed}.png"
        facts = {**request.parameters(subject.label, revision), "artifact": subject.artifact}
        _replace(path, provenance.png(image, facts))
        paths.append(path)
    sheet = out.absolute() / "grid.png" if len(images) > 1 else None
    if sheet:
        _replace(sheet, encode_png(grid(images, columns=n if n > 1 else min(len(images), 8)), None))
    return GenerateResult(paths, [request.seed for _, request in wanted], sheet)


@contextmanager
def _opened(storage: Storage, name: str, version: str | None, base: str) -> Iterator[_Subject]:
    """The subject with its models loaded."""
    if name == PRISTINE:
        recipe = Recipe.model_validate(with_defaults({"base": {"model": base}}))
        yield _Subject(Drawer(open_base(base)), PRISTINE, None, recipe.validate_.guidance, None)
        return
    version, _ = Registry(storage).resolve(name, version)
    with open_artifact(storage, name, version) as artifact:
        manifest: dict[str, Any] = artifact.manifest
        pinned = open_base(manifest["base"]["model"], manifest["base"]["revision"])
        drawer = Drawer(pinned, artifact.folder, manifest)
        scale = float(manifest["recipe"]["validate"]["guidance"])
        yield _Subject(drawer, f"{name}-{version}", artifact.identity, scale, manifest_hash(manifest))


def _render(prompt: str, identity: Identity | None) -> str:
    """The prompt in words."""
    if identity:
        return render_prompt(prompt, identity.class_noun, identity.identifier, identity.template)
    if "{class}" in prompt:
        raise UserError("the pristine base has no class", repr(prompt), "say the noun instead of {class}")
    return render_prompt(prompt, "", None)


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
