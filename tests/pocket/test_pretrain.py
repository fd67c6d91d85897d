"""Tests of the pretraining's bookkeeping: budgets, restarts, shared weights, the samples a step sees."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pocket.diffusion import Batches, tokenize
from pocket.latents import Pool
from pocket.replicas import Replicas
from pocket.stage import WARMUP_STEPS, Stage
from pocket.vocabulary import write_tokenizer
from pocket.world import caption_words


def test_a_stage_goes_on_where_its_checkpoint_stood(tmp_path: Path) -> None:
    stage = Stage("unet", tmp_path / "unet.pt", budget_s=100.0, batch_size=8)
    assert stage.restore() is None
    stage.step, stage.trained_s = 7, 40.0
    stage.save(model={"weight": torch.ones(2)})
    again = Stage("unet", tmp_path / "unet.pt", budget_s=100.0, batch_size=8)
    state = again.restore()
    assert state is not None and torch.equal(state["model"]["weight"], torch.ones(2))
    assert (again.step, again.progress) == (7, 0.4)
    assert [path.name for path in tmp_path.iterdir()] == ["unet.pt"]


@pytest.mark.parametrize(
    ("step", "spent", "expected"),
    [
        (0, 0.0, 1.0 / WARMUP_STEPS),
        (WARMUP_STEPS, 0.1, 1.0),
        (5000, 0.7, 1.0),
        (5000, 0.85, 0.5),
        (5000, 1.0, 0.01),
    ],
)
def test_the_learning_rate_is_a_trapezoid(tmp_path: Path, step: int, spent: float, expected: float) -> None:
    stage = Stage("unet", tmp_path / "unet.pt", budget_s=1.0, batch_size=8)
    stage.step, stage.trained_s = step, spent
    assert stage.lr(1.0, decay_from=0.7) == pytest.approx(expected)


def test_replicas_share_weights_and_average_gradients() -> None:
    model = nn.Linear(3, 1, bias=False)
    replicas = Replicas(model, 2)
    inputs = torch.tensor([[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]])

    def loss_of(replica: nn.Linear, rank: int) -> Tensor:
        return (replica.weight * inputs[rank]).sum()

    replicas.gradients(loss_of)
    assert model.weight.grad is not None
    assert torch.allclose(model.weight.grad, inputs.mean(dim=0, keepdim=True))
    with torch.no_grad():
        model.weight.zero_()
    assert replicas.models[1].weight.abs().sum() == 0


def test_captions_are_emptied_and_varied_at_their_rates(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, caption_words())
    caption = "a photo of a dog on the beach"
    batches = Batches(Pool(torch.zeros(1, 16, 8, 8), [caption]), tokenizer)
    rows = batches.tokens([caption] * 2000, random.Random(0))
    plain, empty = tokenize(tokenizer, [caption, ""])
    as_written = (rows == plain).all(dim=1).float().mean().item()
    emptied = (rows == empty).all(dim=1).float().mean().item()
    assert emptied == pytest.approx(0.10, abs=0.03)
    assert as_written == pytest.approx(0.86, abs=0.03)
    assert torch.equal(rows, batches.tokens([caption] * 2000, random.Random(0)))
