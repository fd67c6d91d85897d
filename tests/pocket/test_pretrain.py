"""Tests of the pretraining's bookkeeping: budgets, restarts, shared weights, the samples a step sees."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pocket.diffusion import Batches, tokenize
from pocket.latents import Pool
from pocket.replicas import Replicas
from pocket.stage import WARMUP_SAMPLES, Stage
from pocket.vocabulary import write_tokenizer
from pocket.world import caption_words


def test_a_stage_goes_on_where_its_checkpoint_stood(tmp_path: Path) -> None:
    stage = Stage("unet", tmp_path / "unet.pt", samples=100, batch_size=8)
    assert stage.restore() is None
    stage.seen = 40
    stage.save(model={"weight": torch.ones(2)})
    again = Stage("unet", tmp_path / "unet.pt", samples=100, batch_size=8)
    state = again.restore()
    assert state is not None and torch.equal(state["model"]["weight"], torch.ones(2))
    assert (again.seen, again.progress) == (40, 0.4)
    assert [path.name for path in tmp_path.iterdir()] == ["unet.pt"]


def test_a_stage_sees_every_sample_once_over_its_restarts(tmp_path: Path) -> None:
    stage = Stage("unet", tmp_path / "unet.pt", samples=32, batch_size=8)
    steps = stage.steps()
    seen = [next(steps).first for _ in range(3)]  # the third was begun, not ended
    stage.save()
    again = Stage("unet", tmp_path / "unet.pt", samples=32, batch_size=8)
    again.restore()
    assert seen[:2] + [tick.first for tick in again.steps()] == [0, 8, 16, 24]


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (0, 8 / WARMUP_SAMPLES),
        (WARMUP_SAMPLES, 1.0),
        (70_000, 1.0),
        (85_000, 0.5),
        (100_000, 0.01),
    ],
)
def test_the_learning_rate_is_a_trapezoid(tmp_path: Path, seen: int, expected: float) -> None:
    stage = Stage("unet", tmp_path / "unet.pt", samples=100_000, batch_size=8)
    stage.seen = seen
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
    batches = Batches(Pool(torch.zeros(1, 16, 8, 8), [caption]), tokenizer, torch.device("cpu"))
    rows = batches.tokens([caption] * 2000, random.Random(0))
    plain, empty = tokenize(tokenizer, [caption, ""])
    as_written = (rows == plain).all(dim=1).float().mean().item()
    emptied = (rows == empty).all(dim=1).float().mean().item()
    assert emptied == pytest.approx(0.10, abs=0.03)
    assert as_written == pytest.approx(0.86, abs=0.03)
    assert torch.equal(rows, batches.tokens([caption] * 2000, random.Random(0)))
