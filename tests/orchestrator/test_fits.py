"""A run that cannot fit into memory is refused, with the settings that would do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UserError
from orchestrator.fits import Room, check_memory, fit
from training.pipeline import BaseInfo, open_base
from training.recipe import Run

MB = 1_000_000


@pytest.fixture
def base(tiny_base: Path) -> BaseInfo:
    return open_base(str(tiny_base))


@pytest.fixture
def run_of() -> Callable[..., Run]:
    """Makes a full run of 512 pairs a step, of which the activations are the largest part."""

    def make(pairs: int = 512, **sections: Any) -> Run:
        train = {"method": "full", "text_encoder": {"train": True}, "pairs_per_step": pairs}
        subject = {"name": "rex", "class": "dog", "images": ["x"]}
        return Run.model_validate({"subject": subject, "train": train, "validate": {"every": 0}, **sections})

    return make


def test_what_fits_is_let_through_and_so_is_what_is_not_known(
    base: BaseInfo, run_of: Callable[..., Run]
) -> None:
    run = run_of(pairs=1)
    assert check_memory(base, run, "cpu", Room(10**12, None)).fits
    assert check_memory(base, run, "cuda", Room(None, None)).room is None


def test_each_setting_that_is_enough_is_named(base: BaseInfo, run_of: Callable[..., Run]) -> None:
    run = run_of()
    need = fit(base, run, "cuda", Room(None, None)).estimate.peak
    with pytest.raises(UserError) as caught:
        check_memory(base, run, "cuda", Room(10**12, need - MB))
    for setting in ("engine.gradient_checkpointing=true", "train.accumulation=4 ", "train.method=lora"):
        assert setting in caught.value.do
    assert f"1 x {need / 1e9:.1f} GB" in caught.value.what and "optimizer 0.01" in caught.value.seen


def test_settings_that_only_together_are_enough_are_named_together(
    base: BaseInfo, run_of: Callable[..., Run]
) -> None:
    alone = fit(base, run_of(pairs=1, train={"method": "lora"}), "cuda", Room(None, None)).estimate.peak
    with pytest.raises(UserError) as caught:
        check_memory(base, run_of(pairs=64), "cuda", Room(10**12, alone + MB))
    assert "gradient_checkpointing=true and train.accumulation=64 and" in caught.value.do


def test_a_machine_too_small_for_anything_is_said_to_be(base: BaseInfo, run_of: Callable[..., Run]) -> None:
    with pytest.raises(UserError, match="no setting of this run is enough"):
        check_memory(base, run_of(pairs=1), "cpu", Room(MB, None))


def test_workers_on_a_cpu_share_its_memory(base: BaseInfo, run_of: Callable[..., Run]) -> None:
    run = run_of(pairs=2, cluster={"workers": 2})
    need = fit(base, run, "cpu", Room(None, None)).estimate.peak
    with pytest.raises(UserError) as caught:
        check_memory(base, run, "cpu", Room(int(1.5 * need), None))
    assert "2 x " in caught.value.what and "cluster.workers=1" in caught.value.do


def test_offloaded_memory_must_fit_beside_the_gpu(base: BaseInfo, run_of: Callable[..., Run]) -> None:
    run = run_of(pairs=1, engine={"offload": True})
    assert fit(base, run, "cuda", Room(10**12, 10**12)).fits
    assert not fit(base, run, "cuda", Room(MB, 10**12)).fits


def test_fewer_workers_of_an_elastic_gang_are_counted_with_their_larger_shards(
    base: BaseInfo, run_of: Callable[..., Run]
) -> None:
    run = run_of(cluster={"workers": 4, "min_workers": 1})
    need = fit(base, run_of(), "cuda", Room(None, None)).estimate.peak
    assert fit(base, run, "cuda", Room(10**12, need)).fits
    found = fit(base, run, "cuda", Room(10**12, need - MB))
    assert not found.fits and found.workers == 1
