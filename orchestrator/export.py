"""This file is where artifacts leave for other programs: as a folder of diffusers', a LoRA file, or one checkpoint."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from cluster.errors import UserError
from cluster.registry import Registry
from cluster.storage import Storage
from training.artifact import OpenArtifact, open_artifact
from training.conditioning import trained_parts
from training.exchange import to_kohya
from training.lora import CHANGED, FILE, LayerFactors, read_lora, write_adapters
from training.lora_algebra import Extraction, extract, merge
from training.new_tokens import FILE as TOKENS_FILE
from training.new_tokens import OF_AUTOMATIC, grow, read_tokens, save_tokens
from training.noise import trained_scheduler
from training.objective_settings import Objective
from training.part_settings import Lora
from training.pipeline import (
    BaseInfo,
    empty_text_encoder,
    empty_unet,
    end_id,
    load_text_encoder,
    load_tokenizer,
    load_unet,
    load_vae,
    open_base,
    part_settings,
)
from training.pipeline_files import read_weights, save_pipeline, write_scheduler
from training.prompt import render_prompt
from training.singlefile import original_layers, single_file

Format = Literal["diffusers", "single-file", "kohya", "comfy"]
FORMATS: tuple[Format, ...] = ("diffusers", "single-file", "kohya", "comfy")
Parameters = dict[str, torch.Tensor]
"""By `PART.NAME`."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    subject: str
    version: str
    path: str
    """Absolute."""
    holds: Literal["lora", "pipeline"]
    prompt: str
    """What names the subject in a prompt there."""
    rank: int | None = None
    """Of a LoRA."""
    error: float | None = None
    """Of an extracted LoRA: what is lost of the change of the layers that it covers, 0 to 1."""
    uncovered: float | None = None
    """Likewise: how much of the whole change is in parameters that it does not cover, 0 to 1."""
    embedding: str | None = None
    """Absolute: the file with the subject's own tokens, where they are not in what was written."""
    silent_velocity: bool = False
    """Whether it is a checkpoint that predicts velocity and cannot say so: who draws with it has to."""


def export(
    storage: Storage,
    name: str,
    version: str | None,
    wanted: Format,
    out: Path,
    merged: bool = False,
    rank: int | None = None,
) -> Exported:
    """Write a version as another program reads it.

    Args:
        storage: Root that holds it.
        name: The subject.
        version: `v2`, an alias, or `None` for the champion.
        wanted: `diffusers` (a folder), `single-file` (a whole checkpoint), `kohya` (a LoRA) or `comfy` (one of the
            two last, whichever it is).
        out: Where to: a folder for `diffusers`, else a file, or a folder that takes one. What is there is not replaced.
        merged: Write a LoRA as a whole pipeline, the base with it in it.
        rank: Write a whole artifact as a LoRA of this rank, extracted.

    Raises:
        UserError: There is no such version, it has not the form that is wanted, or something is there already.
        SystemFailure: The artifact is damaged.
    """
    found, _ = Registry(storage).resolve(name, version)
    with open_artifact(storage, name, found) as artifact:
        is_lora = (artifact.folder / FILE).is_file()
        _check(name, wanted, is_lora, merged, rank)
        whole = (is_lora and (merged or wanted == "single-file")) or (not is_lora and rank is None)
        base = open_base(artifact.manifest["base"]["model"], artifact.manifest["base"]["revision"])
        if whole or base.kind.flow:
            _check_base(base, wanted, whole)
        target = _target(out, f"{name}-{found}", folder=wanted == "diffusers")
        tokens = read_tokens(artifact.folder)
        apart = tokens is not None and not (whole and wanted == "diffusers")
        beside = _tokens_target(target, wanted) if apart else None
        identity = artifact.identity
        prompt = render_prompt("{subject}", identity.class_noun, identity.identifier, identity.template)
        extraction: Extraction | None = None
        silent = base.kind.family == "sd" and base.prediction_type == "v_prediction"
        if whole:
            _write_whole(artifact, base, wanted, target)
        else:
            if rank is not None:
                extraction = extract(_pristine(base), _parameters(artifact, base), rank)
            adapters = read_lora(artifact.folder) if extraction is None else extraction.adapters
            _write_lora(artifact, base, adapters, wanted, target, prompt, extraction is None)
            rank = rank or max(f.a.shape[0] for layers in adapters.values() for f in layers.values())
        if tokens and beside:
            save_tokens(tokens, beside, None if wanted == "diffusers" else OF_AUTOMATIC)
    return Exported(
        name,
        found,
        str(target.resolve()),
        "pipeline" if whole else "lora",
        prompt,
        None if whole else rank,
        extraction.error if extraction else None,
        extraction.uncovered if extraction else None,
        str(beside.resolve()) if beside else None,
        silent and whole and wanted != "diffusers",
    )


def _check(name: str, wanted: Format, is_lora: bool, merged: bool, rank: int | None) -> None:
    if is_lora and rank is not None:
        raise UserError(f"{name} is a LoRA already", "a rank is one of extraction", "leave out --rank")
    if not is_lora and merged:
        raise UserError(f"{name} has whole weights already", "there is no LoRA to merge", "leave out --merge")
    if not is_lora and wanted == "kohya" and rank is None:
        raise UserError(
            f"{name} is no LoRA",
            "it has whole weights, and kohya's file is a LoRA",
            "extract one with --rank 32, or write the whole with --format single-file",
        )
    if merged and wanted == "kohya":
        raise UserError(
            "kohya's file is a LoRA", "--merge makes a whole pipeline", "use --format single-file"
        )
    if rank is not None and wanted == "single-file":
        raise UserError(
            "a single file is a whole checkpoint",
            "--rank extracts a LoRA",
            "leave one out, or use --format kohya",
        )


def _check_base(base: BaseInfo, wanted: Format, whole: bool) -> None:
    if not whole and wanted != "diffusers":
        raise UserError(
            f"a LoRA of {base.model} cannot be written in kohya's names",
            f"it is of the family {base.kind.family}, whose layers have other names there",
            "use --format diffusers",
        )
    if base.kind.family not in ("sd", "sdxl") and wanted != "diffusers":
        raise UserError(
            f"{base.model} cannot be written as a single file",
            f"it is of the family {base.kind.family}, and only bases of Stable Diffusion 1.x and SDXL are",
            "use --format diffusers",
        )


def _target(out: Path, stem: str, folder: bool) -> Path:
    """Where to write; nothing is there yet."""
    target = out if folder or out.suffix == ".safetensors" else out / f"{stem}.safetensors"
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"{target} is there already", "it would be replaced", "give another --out")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _tokens_target(target: Path, wanted: Format) -> Path:
    """The file beside what is written that takes the subject's own tokens; it is not there yet."""
    if wanted == "diffusers":
        return target / TOKENS_FILE
    # as diffusers' own scripts call it beside a LoRA of kohya's names
    beside = target.with_name(f"{target.stem}_emb.safetensors")
    if beside.exists():
        raise UserError(f"{beside} is there already", "it would be replaced", "give another --out")
    return beside


def _pristine(base: BaseInfo) -> Parameters:
    models = trained_parts(load_unet(base), load_text_encoder(base))
    return {
        f"{part}.{name}": p.data for part, model in models.items() for name, p in model.named_parameters()
    }


def _parameters(artifact: OpenArtifact, base: BaseInfo) -> Parameters:
    """All that UNet and text encoder are with the artifact."""
    folder = artifact.folder
    if (folder / FILE).is_file():
        return merge(_pristine(base), read_lora(folder))
    if (folder / CHANGED).is_file():
        return _pristine(base) | load_file(folder / CHANGED)
    return read_weights(folder, trained_parts(empty_unet(base), empty_text_encoder(base)))


def _write_whole(artifact: OpenArtifact, base: BaseInfo, wanted: Format, target: Path) -> None:
    if wanted == "diffusers" and (artifact.folder / "model_index.json").is_file():
        shutil.copytree(artifact.folder, target, dirs_exist_ok=True)
        return
    parameters = _parameters(artifact, base)
    objective = Objective.model_validate(artifact.manifest["recipe"]["train"].get("objective", {}))
    scheduler = trained_scheduler(base.scheduler, objective)
    if wanted != "diffusers":
        settings = part_settings(base, "unet")
        if base.kind.family == "sd" and int(settings["cross_attention_dim"]) == 1024:
            raise UserError(
                f"{base.model} cannot be written as a single file",
                "single files of Stable Diffusion 2.x have OpenCLIP's text encoder, whose last layer the base lacks",
                "use --format diffusers",
            )
        tensors = single_file(parameters, load_vae(base).state_dict(), settings, scheduler)
        save_file(tensors, target, metadata={"format": "pt"})
        return
    unet, text_encoder = load_unet(base), load_text_encoder(base)
    for part, model in trained_parts(unet, text_encoder).items():
        for name, parameter in model.named_parameters():
            parameter.data = parameters[f"{part}.{name}"]
    if tokens := read_tokens(artifact.folder):
        grow(text_encoder, tokens, end_id(load_tokenizer(base)))
    save_pipeline(base, unet, text_encoder, target)
    if objective.zero_terminal_snr:
        write_scheduler(target, scheduler)


def _write_lora(
    artifact: OpenArtifact,
    base: BaseInfo,
    adapters: Mapping[str, Mapping[str, LayerFactors]],
    wanted: Format,
    target: Path,
    prompt: str,
    as_trained: bool,
) -> None:
    if wanted == "diffusers":
        target.mkdir(parents=True, exist_ok=True)
        if as_trained:
            shutil.copyfile(artifact.folder / FILE, target / FILE)
            return
        named = {
            part: {layer: {"A": f.a, "B": f.b} for layer, f in layers.items()}
            for part, layers in adapters.items()
        }
        rank = max(f.a.shape[0] for layers in adapters.values() for f in layers.values())
        write_adapters(named, target, Lora(rank=rank, alpha=float(rank)))
        return
    if any(f.magnitude is not None for layers in adapters.values() for f in layers.values()):
        raise UserError(
            "a DoRA is not written in kohya's names",
            "train.lora.dora is true",
            "use --format single-file, which has it merged, or --format diffusers",
        )
    of_sdxl = base.kind.family == "sdxl"
    layers = adapters.get("unet", {}) if of_sdxl else ()
    originals = original_layers(layers, part_settings(base, "unet")) if layers else {}
    tensors, metadata = to_kohya(adapters, base.kind.texts, originals)
    manifest: Mapping[str, Any] = artifact.manifest
    told = {
        **({"ss_base_model_version": "sdxl_base_v1-0"} if of_sdxl else {}),  # what programs sort LoRAs by
        "ss_sd_model_name": str(manifest["base"]["model"]),
        "ss_sd_model_hash": str(manifest["base"]["revision"]),
        "ss_steps": str(manifest["steps"]),
        "ss_tag_frequency": json.dumps({"subject": {prompt: 1}}),
        "modelspec.trigger_phrase": prompt,
    }
    save_file(tensors, target, metadata={"format": "pt", **metadata, **told})
