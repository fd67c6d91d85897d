"""The benchmark for GPUs, on a tiny base and the CPU: it measures what it says, and says where there is no GPU."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import main, table
from benchmarks.gpu_cases import Bench, serve
from benchmarks.random_base import TINY, write_base

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
