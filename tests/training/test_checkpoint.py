"""What a restart goes on from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.errors import SystemFailure
from cluster.storage import Storage
from training.checkpoint import State, adopt, best, delete, latest, load, save, steps_saved

RUN = "runs/rex/v1"


def state(step: int) -> State:
    generator = torch.Generator().manual_seed(step)
    parameters, first, second = (
        {"unet.a": torch.randn(3, 4, generator=generator), "b": torch.randn(2, generator=generator)}
        for _ in range(3)
    )
    return State(step, parameters, first, second)


def same(a: State, b: State) -> bool:
    return a.step == b.step and all(
        torch.equal(getattr(a, group)[name], value)
        for group in ("parameters", "first_moments", "second_moments")
        for name, value in getattr(b, group).items()
    )


def damage(storage: Storage, step: int) -> None:
    file = Path(storage.full(f"{RUN}/checkpoints/step_{step:06d}/state.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_the_newest_checkpoint_comes_back_bit_for_bit(storage: Storage) -> None:
    for step in (1, 200):
        save(storage, RUN, state(step), "f", keep=2)
    notes: list[str] = []
    found = latest(storage, RUN, "f", notes.append)
    assert found is not None and same(found, state(200)) and notes == []


def test_only_the_newest_are_kept(storage: Storage) -> None:
    for step in (100, 200, 300):
        save(storage, RUN, state(step), "f", keep=2)
    assert steps_saved(storage, RUN) == [200, 300]


def test_the_best_is_kept_besides_and_found_unless_damaged(storage: Storage) -> None:
    for step, loss in ((1, 0.5), (2, 0.3), (3, None), (4, 0.4), (5, 0.9)):
        save(storage, RUN, state(step), "f", keep=2, facts={"validation_loss": loss})
    assert steps_saved(storage, RUN) == [2, 4, 5]
    found = best(storage, RUN, "f", 0.45, pytest.fail)
    assert found is not None and found[0] == 0.3 and same(found[1], state(2))
    assert best(storage, RUN, "f", 0.3, pytest.fail) is None  # the end is as good
    assert best(storage, RUN, "g", 9.0, pytest.fail) is None
    damage(storage, 2)
    notes: list[str] = []
    found = best(storage, RUN, "f", 0.45, notes.append)
    assert found is not None and found[1].step == 4 and "step 2" in notes[0]
    save(storage, RUN, state(6), "f", keep=2, keep_best=False, facts={"validation_loss": 0.1})
    assert steps_saved(storage, RUN) == [5, 6]


def test_an_average_comes_back_with_the_rest(storage: Storage) -> None:
    whole = replace(state(1), average=state(9).parameters)
    save(storage, RUN, whole, "f", keep=1)
    found = load(storage, RUN, 1, "f")
    assert same(found, state(1)) and found.average is not None
    assert all(torch.equal(found.weights[name], t) for name, t in state(9).parameters.items())


def test_a_damaged_one_is_skipped_and_said(storage: Storage) -> None:
    for step in (1, 2, 3):
        save(storage, RUN, state(step), "f", keep=3)
    damage(storage, 3)
    Path(storage.full(f"{RUN}/checkpoints/step_000002/manifest.json")).unlink()
    notes: list[str] = []
    found = latest(storage, RUN, "f", notes.append)
    assert found is not None and found.step == 1
    assert len(notes) == 1 and "step 3" in notes[0] and "sha256" in notes[0]


def test_a_checkpoint_of_other_settings_is_not_gone_on_from(storage: Storage) -> None:
    save(storage, RUN, state(1), "f", keep=1)
    notes: list[str] = []
    assert latest(storage, RUN, "g", notes.append) is None and "other settings" in notes[0]
    with pytest.raises(SystemFailure):
        load(storage, RUN, 1, "g")


def test_a_run_without_checkpoints_starts_anew(storage: Storage) -> None:
    assert latest(storage, RUN, "f", pytest.fail) is None
    save(storage, RUN, state(1), "f", keep=1)
    delete(storage, RUN)
    assert latest(storage, RUN, "f", pytest.fail) is None


def test_a_damaged_one_is_not_taken_over(storage: Storage) -> None:
    for step in (1, 2, 3):
        save(storage, RUN, state(step), "f", keep=3)
    damage(storage, 2)
    Path(storage.full(f"{RUN}/checkpoints/step_000003/state.safetensors")).unlink()
    heir = "runs/rex/heir"
    assert [adopt(storage, heir, "g", RUN, "f", step) for step in (1, 2, 3)] == [True, False, False]
    assert steps_saved(storage, heir) == [1] and same(load(storage, heir, 1, "g"), state(1))
