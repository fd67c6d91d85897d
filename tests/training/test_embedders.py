"""Embedders give the vectors that their own libraries give, and refuse what they cannot read with the remedy."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit.modeling_vit import ViTModel

from cluster.errors import UserError
from pocket.clip import embed_images, embed_texts, load_clip
from pocket.subject import subject_photos
from training.basekind import KINDS
from training.embedders import DEFAULTS, Embedder, decoded
from training.pipeline import load_tokenizer, open_base
from training.png import encode_png

LOOK = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [photo.resize((64, 64)) for photo in subject_photos("robot", 3)]


def test_every_family_has_embedders() -> None:
    assert DEFAULTS.keys() == {"pocket", *(kind.family for kind in KINDS)}


def test_pockets_clip_gives_the_vectors_that_it_was_trained_to_give(pictures: list[Image.Image]) -> None:
    embedder, (clip, _) = Embedder("pocket"), load_clip()
    pixels = [np.asarray(one) for one in pictures]
    assert np.allclose(embedder.images(pixels), embed_images(clip, pictures).numpy(), atol=1e-5)
    assert [one.tolist() for one in decoded([encode_png(one, None) for one in pixels])] == [
        one.tolist() for one in pixels
    ]
    texts = ["a photo of a robot on the beach", "an owl"]
    tokenizer = load_tokenizer(open_base("pocket"))  # the same words
    assert np.allclose(embedder.texts(texts), embed_texts(clip, tokenizer, texts).numpy(), atol=1e-5)
    assert embedder.reads and embedder.texts(["robot " * 100]).shape == (1, 128)  # cut, not refused


def test_a_vision_transformer_is_seen_by_its_class_token_and_of_the_middle_square(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = ViTModel(
        ViTConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        ),
        add_pooling_layer=False,
    ).eval()
    net.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(LOOK))
    wide = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    embedder = Embedder(str(tmp_path))
    middle = torch.from_numpy(wide[:, 8:40]).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        expected = net((middle - 0.5) / 0.25).last_hidden_state[0, 0].numpy()
    assert embedder.images([wide])[0] == pytest.approx(expected / np.linalg.norm(expected), abs=1e-5)
    assert not embedder.reads and str(tmp_path) in embedder.name


@pytest.mark.parametrize(
    ("files", "seen"),
    [
        ({}, "config.json"),
        ({"config.json": {"model_type": "bert"}}, "it is a bert"),
        ({"config.json": {"model_type": "clip"}, "pytorch_model.bin": {}}, "pickles are never read"),
        ({"config.json": {"model_type": "clip"}, "model.safetensors": {}}, "preprocessor_config.json"),
    ],
)
def test_what_cannot_be_used_is_refused_with_what_was_seen(
    tmp_path: Path, files: dict[str, object], seen: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError) as refused:
        Embedder(str(tmp_path))
    assert seen in refused.value.seen and refused.value.do


def test_a_model_that_is_nowhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="there is no embedder nowhere"):
        Embedder("nowhere")
