"""Adapters start as nothing, come back whole, and do not depend on anything but the seed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cluster.errors import SystemFailure, UserError
from training.conditioning import Conditioning, predict
from training.lora import CHANGED, FILE, attach, read_lora, save_changed, save_lora
from training.lora_algebra import merge
from training.part_settings import Lora
from training.pipeline import load_text_encoder, load_unet, open_base

LORA = Lora(rank=4, alpha=2.0)


def models(folder: Path) -> tuple[nn.Module, nn.Module]:
    base = open_base(str(folder))
    return load_unet(base), load_text_encoder(base)


def adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def output(unet: nn.Module) -> torch.Tensor:
    x, text = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(2, 32, 32)
    with torch.no_grad():
        return predict(unet, x, torch.tensor([10, 700]), Conditioning(text))


def test_fresh_adapters_change_nothing_and_only_they_are_trained(tiny_base: Path) -> None:
    unet, text_encoder = models(tiny_base)
    before = output(unet)
    state = torch.random.get_rng_state()
    attach(unet, text_encoder, LORA, train_text=False, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(output(unet), before)
    assert {name for name, p in unet.named_parameters() if p.requires_grad} == set(adapters(unet))
    assert not any(p.requires_grad for p in text_encoder.parameters())
    assert not adapters(text_encoder)


def test_the_start_depends_on_the_seed_alone(tiny_base: Path) -> None:
    starts: list[dict[str, torch.Tensor]] = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(starts))
        unet, text_encoder = models(tiny_base)
        attach(unet, text_encoder, LORA, train_text=True, seed=seed)
        starts.append({**adapters(unet), **adapters(text_encoder)})
    same, again, other = starts
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert not any(torch.equal(same[name], other[name]) for name in same if "lora_A" in name)


@pytest.mark.parametrize("train_text", [False, True])
def test_what_is_saved_comes_back(tiny_base: Path, tmp_path: Path, train_text: bool) -> None:
    unet, text_encoder = models(tiny_base)
    attach(unet, text_encoder, LORA, train_text, seed=3)
    for model in (unet, text_encoder):
        for p in adapters(model).values():
            nn.init.normal_(p, std=0.1)
    save_lora(unet, text_encoder if train_text else None, tmp_path, LORA)
    found = read_lora(tmp_path)
    assert set(found) == {"unet", "text_encoder"} if train_text else {"unet"}
    for part, trained in (("unet", unet), ("text_encoder", text_encoder)):
        written = {
            f"{layer}.lora_{factor}.default.weight": tensor
            for layer, factors in found.get(part, {}).items()
            for factor, tensor in (("A", factors.a), ("B", factors.b))
        }
        assert {n: p.tolist() for n, p in adapters(trained).items()} == {
            n: p.tolist() for n, p in written.items()
        }
        assert {factors.scale for factors in found.get(part, {}).values()} <= {0.5}


def test_dora_trains_lengths_too_and_comes_back_as_what_was_computed(tiny_base: Path, tmp_path: Path) -> None:
    unet, text_encoder = models(tiny_base)
    pristine = {name: p.clone() for name, p in unet.named_parameters()}
    before, lora = output(unet), Lora(rank=4, alpha=2.0, dora=True, targets=("to_q", "conv1"))
    attach(unet, text_encoder, lora, train_text=False, seed=3)
    assert torch.allclose(output(unet), before, atol=1e-5)
    assert sum("magnitude" in name for name, p in unet.named_parameters() if p.requires_grad) > 2
    for name, p in adapters(unet).items():
        if "magnitude" in name:
            p.data.mul_(1.3)
        else:
            nn.init.normal_(p, std=0.2)
    trained = output(unet)
    save_lora(unet, None, tmp_path, lora)
    weights = merge({f"unet.{name}": p for name, p in pristine.items()}, read_lora(tmp_path))
    fresh, _ = models(tiny_base)
    fresh.load_state_dict({name.removeprefix("unet."): p for name, p in weights.items()})
    assert torch.allclose(output(fresh), trained, atol=1e-4) and not torch.allclose(
        trained, before, atol=1e-2
    )


@pytest.mark.parametrize("kind", ["lokr", "oft"])
def test_other_kinds_start_as_nothing_and_come_back_as_the_weights_that_they_make(
    tiny_base: Path, tmp_path: Path, kind: Any
) -> None:
    unet, text_encoder = models(tiny_base)
    pristine = {name: p.clone() for name, p in unet.named_parameters()}
    before, lora = output(unet), Lora(rank=4, kind=kind)
    starts = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(starts))
        unet, text_encoder = models(tiny_base)
        attach(unet, text_encoder, lora, train_text=False, seed=seed)
        starts.append({name: p.clone() for name, p in unet.named_parameters() if p.requires_grad})
    assert torch.allclose(output(unet), before, atol=1e-5) and starts[0]
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    assert kind == "oft" or any(not torch.equal(starts[0][name], starts[2][name]) for name in starts[0])
    for p in unet.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    trained = output(unet)
    save_changed(unet, None, tmp_path)
    assert torch.equal(output(unet), trained)  # nothing was merged into what goes on
    changed = {n.removeprefix("unet."): p for n, p in load_file(tmp_path / CHANGED).items()}
    fresh, _ = models(tiny_base)
    fresh.load_state_dict({**pristine, **changed})
    assert torch.allclose(output(fresh), trained, atol=1e-4) and not torch.allclose(
        trained, before, atol=1e-2
    )


def test_a_target_that_names_nothing_is_refused(tiny_base: Path) -> None:
    unet, text_encoder = models(tiny_base)
    with pytest.raises(UserError, match=r"train\.lora\.targets names 'to_z'"):
        attach(unet, text_encoder, Lora(targets=("to_q", "to_z")), False, 0)


def test_a_file_that_is_no_adapter_of_ours_is_refused(tmp_path: Path) -> None:
    save_file({"unet.to_q.lora_A.weight": torch.zeros(4, 8)}, tmp_path / FILE)
    with pytest.raises(SystemFailure, match="no adapter of ours"):
        read_lora(tmp_path)
