"""Which defaults apply is told by the base itself, and by its name where it is not here yet."""

from pathlib import Path

import pytest

from training.defaults import base_family, with_defaults
from training.recipe import Recipe


def test_a_base_that_is_here_says_its_family(tiny_base: Path, tiny_sdxl: Path, tiny_sd3: Path) -> None:
    models = ("pocket", tiny_base, tiny_sdxl, tiny_sd3)
    assert [base_family(str(model)) for model in models] == ["pocket", "sd", "sdxl", "sd3"]


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd"),
        ("nobody/stable-diffusion-xl-base-9.0", "sdxl"),
        ("nobody/AnimagineXL", "sdxl"),
        ("nobody/RealVisXL_V4.0", "sdxl"),
        ("nobody/newrealityxl-v2", "sdxl"),
        ("nobody/xlnet-base", "sd"),
        ("nobody/Some-SDXL", "sdxl"),
        ("nobody/pixlart", "sd"),
        ("nobody/stable-diffusion-3-medium-diffusers", "sd3"),
        ("nobody/stable-diffusion-3.5-large", "sd3"),
        ("nobody/MySD3-finetune", "sd3"),
        ("nobody/sd_v3", "sd3"),
        ("nobody/SD-3.5-medium", "sd3"),
        ("nobody/Stable-Diffusion-3.5", "sd3"),
        ("nobody/sd35-medium", "sd3"),
        ("nobody/SD3Medium", "sd3"),
        ("nobody/stable-diffusion-30", "sd"),
        ("nobody/sd-3d-render", "sd"),
        ("nobody/SD-3D-render", "sd"),
        ("nobody/my_sd_3d", "sd"),
        ("./no/such/folder", "sd"),
    ],
)
def test_a_base_that_is_not_here_is_of_what_its_name_says(model: str, family: str) -> None:
    assert base_family(model) == family


def test_what_is_given_lies_over_the_defaults_of_the_family(tiny_sdxl: Path) -> None:
    base = {"model": str(tiny_sdxl)}
    recipe = Recipe.model_validate(with_defaults({"base": base, "validate": {"steps": 3}}))
    assert recipe.engine.gradient_checkpointing and recipe.validate_.guidance == recipe.prior.guidance == 5.0
    assert recipe.validate_.steps == 3 and not recipe.train.text_encoder.train
    full = Recipe.model_validate(with_defaults({"base": base, "train": {"method": "full"}}))
    assert full.train.lr == 2e-6 and not full.train.text_encoder.train
