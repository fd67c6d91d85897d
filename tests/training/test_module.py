"""The loss is the paper's, whatever the order of rows."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from training.batches import Batches
from training.lease import Lease
from training.loop import ResidentBase, build_module
from training.objective import PairBatch
from training.pipeline import open_base

FULL = {"method": "full", "pairs_per_step": 3, "text_encoder": {"train": True}}


def load(folder: Path) -> ResidentBase:
    return ResidentBase.load(str(folder), open_base(str(folder)).revision, torch.device("cpu"))


def textbook(base: ResidentBase, batch: PairBatch, weight: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Separate forwards for subject and class with stock parts: mean(subject) + weight * mean(class)."""
    unet, text_encoder = base.fresh(share=False)
    parameters = [*unet.requires_grad_().parameters(), *text_encoder.requires_grad_().parameters()]
    scheduler = DDPMScheduler.from_pretrained(base.info.path / "scheduler")
    terms = []
    for role in (0, 1):
        rows = [i for i, of in enumerate(batch.role.tolist()) if of == role]
        x0, noise, t = batch.latents[rows], batch.noise[rows], batch.timesteps[rows]
        text = text_encoder(batch.token_ids[rows])[0]
        output = unet(scheduler.add_noise(x0, noise, t), t, encoder_hidden_states=text).sample
        is_v = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(x0, noise, t) if is_v else noise
        terms.append(torch.nn.functional.mse_loss(output, target))
    loss = terms[0] + weight * terms[1]
    return loss.detach(), list(torch.autograd.grad(loss, parameters, allow_unused=True))


@pytest.mark.parametrize("kind", ["tiny_base", "tiny_base_v"])
def test_loss_and_gradients_equal_the_textbook_formula(
    kind: str,
    request: pytest.FixtureRequest,
    make_lease: Callable[..., Lease],
    make_batches: Callable[..., Batches],
) -> None:
    base = load(request.getfixturevalue(kind))
    lease = make_lease(base, train=FULL, prior={"weight": 0.7})
    module = build_module(base, lease.recipe, lease, 0)
    (batch,) = make_batches(lease, base).of_step(4)
    loss, subject, of_class = module(batch)
    loss.backward()
    expected, gradients = textbook(base, batch, 0.7)
    assert torch.allclose(loss, expected, atol=1e-5)
    assert torch.allclose(subject + 0.7 * of_class, expected, atol=1e-5)
    ours = [p.grad for p in module.parameters()]
    assert len(ours) == len(gradients) and any(g is not None and g.abs().max() > 1e-3 for g in ours)
    for mine, theirs in zip(ours, gradients, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or theirs is None or torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("train", [FULL, {"method": "lora", "pairs_per_step": 3}], ids=["full", "lora"])
def test_the_order_of_rows_cannot_misalign_prompts_and_roles(
    train: dict[str, Any],
    resident: ResidentBase,
    make_lease: Callable[..., Lease],
    make_batches: Callable[..., Batches],
) -> None:
    lease = make_lease(resident, train=train)
    module = build_module(resident, lease.recipe, lease, 0)
    (batch,) = make_batches(lease, resident).of_step(0)
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    columns = {f.name: getattr(batch, f.name) for f in fields(batch)}
    shuffled = PairBatch(**{name: column[order] for name, column in columns.items() if column is not None})
    with torch.no_grad():
        straight, mixed = torch.stack(module(batch)), torch.stack(module(shuffled))
        swapped = torch.stack(module(replace(batch, token_ids=batch.token_ids[order])))
    assert torch.allclose(straight, mixed, atol=1e-6)
    assert not torch.allclose(
        straight, swapped, atol=1e-6
    )  # a row's prompt matters, so the line above says something


def test_text_is_cached_exactly_when_nothing_of_it_is_trained(
    resident: ResidentBase, make_lease: Callable[..., Lease]
) -> None:
    for train_text in (False, True):
        for method in ("lora", "full"):
            lease = make_lease(resident, train={"method": method, "text_encoder": {"train": train_text}})
            module = build_module(resident, lease.recipe, lease, 0)
            assert (module.text is None) == (module.text_encoder is not None) == train_text
            assert ("text_encoder" in module.parameter_groups()) == train_text
            assert not any("text" in name for name in module.state_dict()) or train_text


def test_gradient_checkpointing_and_bf16_compute_the_same_loss(
    resident: ResidentBase, make_lease: Callable[..., Lease], make_batches: Callable[..., Batches]
) -> None:
    figures = []
    for engine in ({}, {"gradient_checkpointing": True}, {"precision": "bf16"}):
        lease = make_lease(resident, train=FULL, engine=engine)
        module = build_module(resident, lease.recipe, lease, 0)
        (batch,) = make_batches(lease, resident).of_step(0)
        loss, *_ = module(batch)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
        assert all(p.dtype is torch.float32 for p in module.parameters())
        figures.append(torch.stack([loss.detach(), norm]))
    assert torch.equal(figures[0], figures[1])
    assert torch.allclose(figures[0], figures[2], rtol=0.02) and not torch.equal(figures[0], figures[2])
