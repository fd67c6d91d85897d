"""The benchmark for GPUs, on a tiny base and the CPU: it measures what it says, and says where there is no GPU."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.gpu import main, table
from benchmarks.gpu_cases import Bench, serve
from benchmarks.random_base import TINY, TOKENS, TRUE, write_base

OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "steps": 1,
    "pairs": 1,
    "rank": 4,
    "draw_steps": 2,
    "bank": (1, 2),
    "widths": (1, 2),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--json"])
    assert main() == 2
    assert json.loads(capsys.readouterr().out)["error"]["do"] == "to see it work: --tiny --device cpu"


@pytest.mark.usefixtures("group")
def test_every_kind_of_case_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.lease.fetch", list)  # as the benchmark does, and back again
    folder = str(write_base(tmp_path / "tiny", TINY["sd15"]))
    bench = Bench(folder, OPTIONS)
    [full], [lora] = bench.train("full", 2), bench.train("lora", 0)
    banks, drawn = bench.bank(OPTIONS["bank"]), serve(folder, OPTIONS)
    assert [row["width"] for row in (*banks, *drawn)] == [1, 2, 1, 2]
    for row in (full, lora, *banks, *drawn):
        assert row["step_ms"] > 0 and row["images_per_s"] > 0 and row["peak_mb"] > 0
    # weights of the full run have gradients, which are a product for each of their own
    assert full["tflop"] > 1.2 * lora["tflop"] > 0 and drawn[0]["tflop"] == drawn[1]["tflop"]
    rows = [{"base": "sd15", "case": "serve", "side": "ours", "share": 0.5, **row} for row in drawn]
    assert "| sd15 | serve, images = 2 | ours |" in table(rows)[3] and "50.0 %" in table(rows)[3]


def test_bases_of_true_size_have_the_parameters_of_the_published_ones() -> None:
    found = {}
    with torch.device("meta"):
        for name, kind in TRUE.items():
            parts: list[torch.nn.Module] = [
                UNet2DConditionModel(in_channels=4, out_channels=4, **kind.unet),
                AutoencoderKL(**kind.vae),
            ]
            for model, text in zip((CLIPTextModel, CLIPTextModelWithProjection), kind.texts, strict=False):
                parts.append(model(CLIPTextConfig(**text, max_position_embeddings=TOKENS)))
            found[name] = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert found == {
        "sd15": [859_520_964, 83_653_863, 123_060_480],
        "sdxl": [2_567_463_684, 83_653_863, 123_060_480, 694_659_840],
    }
