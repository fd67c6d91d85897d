"""Tests of the shipped weights: stock diffusers loads them, and they draw."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from pocket.export import MAX_BYTES, WEIGHTS
from pocket.vocabulary import RESERVED_WORDS

pytestmark = pytest.mark.skipif(
    not (WEIGHTS / "model_index.json").exists(),
    reason="no weights here: python -m pocket.pretrain makes them",
)


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(WEIGHTS, dtype=torch.float32, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_the_pipeline_fits_the_repository() -> None:
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}


def test_the_pipeline_draws_64_pixels_of_finite_values(pipeline: StableDiffusionPipeline) -> None:
    images = pipeline(
        ["a photo of a dog on the beach"],
        height=64,
        width=64,
        num_inference_steps=5,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    assert images.shape == (1, 64, 64, 3)
    assert np.isfinite(images).all()
    assert images.std() > 0.02  # not one flat colour


def test_reserved_words_have_embeddings_as_long_as_known_ones(pipeline: StableDiffusionPipeline) -> None:
    table = pipeline.text_encoder.get_input_embeddings().weight
    reserved = pipeline.tokenizer.convert_tokens_to_ids([word + "</w>" for word in RESERVED_WORDS])
    known = pipeline.tokenizer.convert_tokens_to_ids(["dog</w>", "beach</w>", "red</w>", "rocket</w>"])
    ratio = table[reserved].norm(dim=1).mean() / table[known].norm(dim=1).mean()
    assert 0.5 < ratio.item() < 2.0
    assert table[reserved].std() > 0
