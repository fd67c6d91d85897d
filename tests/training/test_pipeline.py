"""A base is read as it is, and refused where it cannot be used."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from cluster.errors import UserError
from training.conditioning import encode_text
from training.pipeline import (
    empty_text_encoder,
    empty_unet,
    load_text_encoder,
    load_tokenizer,
    load_unet,
    load_vae,
    open_base,
    token_ids,
)


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_a_base_says_of_itself_is_read_from_it(tiny_base: Path, tiny_base_v: Path) -> None:
    base = open_base(str(tiny_base))
    assert (base.scaling_factor, base.latent_channels, base.vae_factor, base.image_size) == (0.31, 4, 2, 16)
    assert (base.latent_size, base.token_limit, base.prediction_type) == (8, 32, "epsilon")
    assert open_base(str(tiny_base_v)).prediction_type == "v_prediction"


def test_the_revision_is_of_names_and_bytes_and_can_be_asked_for(tiny_base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "a copy, é"
    shutil.copytree(tiny_base, copy)
    (copy / "README.md").write_text("not used")
    revision = open_base(str(tiny_base)).revision
    assert open_base(str(copy), revision).revision == revision
    edit(copy / "scheduler" / "scheduler_config.json", beta_end=0.02)
    assert open_base(str(copy)).revision != revision
    with pytest.raises(UserError, match=revision):
        open_base(str(copy), revision)


def test_models_are_frozen_and_ids_are_those_of_stock_diffusers(tiny_base: Path) -> None:
    base, prompts = open_base(str(tiny_base)), ["a photo of a zwx dog", ""]
    for model in (load_unet(base), load_vae(base), load_text_encoder(base)):
        assert not model.training
        assert all(not p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    stock = StableDiffusionPipeline.from_pretrained(tiny_base)
    theirs, _ = stock.encode_prompt(prompts, "cpu", 1, False)
    ids = token_ids(load_tokenizer(base), prompts, base.token_limit)
    assert torch.equal(encode_text(load_text_encoder(base), ids).text, theirs)


def test_empty_models_have_the_shapes_without_the_weights(tiny_base: Path) -> None:
    base = open_base(str(tiny_base))
    for empty, loaded in ((empty_unet, load_unet), (empty_text_encoder, load_text_encoder)):
        shapes = {name: p.shape for name, p in loaded(base).named_parameters()}
        assert {name: p.shape for name, p in empty(base).named_parameters()} == shapes
        assert all(p.is_meta for p in empty(base).parameters())


def test_a_prompt_that_would_be_cut_is_refused(tiny_base: Path) -> None:
    base = open_base(str(tiny_base))
    tokenizer = load_tokenizer(base)
    assert token_ids(tokenizer, ["dog " * 30], base.token_limit).shape == (1, 32)
    with pytest.raises(UserError, match="33 tokens"):
        token_ids(tokenizer, ["dog " * 31], base.token_limit)


def only_pickles(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: shutil.rmtree(f / "unet"), "has no unet"),
        (only_pickles, "no safetensors weights"),
        (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
        (lambda f: (f / "tokenizer" / "tokenizer_config.json").unlink(), "not complete"),
        (lambda f: (f / "vae" / "config.json").write_text("{"), "not complete"),
        (lambda f: edit(f / "scheduler/scheduler_config.json", prediction_type="sample"), "'sample'"),
        (
            lambda f: edit(f / "unet/config.json", _class_name="SD3Transformer2DModel"),
            "SD3Transformer2DModel",
        ),
        (lambda f: edit(f / "unet/config.json", in_channels=9), "in_channels"),
        (lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"), "FluxPipeline"),
        (
            lambda f: edit(f / "model_index.json", _class_name="StableDiffusionXLPipeline"),
            "of an unknown kind",
        ),
        (lambda f: edit(f / "vae/config.json", latents_mean=[0.0] * 4), "latents_mean"),
    ],
)
def test_a_base_that_cannot_be_used_is_refused(
    tiny_base: Path, tmp_path: Path, spoil: Callable[[Path], object], said: str
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    spoil(folder)
    with pytest.raises(UserError, match=said) as caught:
        open_base(str(folder))
    assert caught.value.do


@pytest.mark.parametrize("model", ["no-such-folder", "./no/such/folder", "no-such-owner/no-such-model"])
def test_a_base_that_is_not_there_is_refused(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=model):
        open_base(model)
