"""When a run ends because its drawings gain no more, and what it leaves then."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.storage import Storage
from training.lease import Lease
from training.loop import ResidentBase
from training.patience import Look, Patience
from training.pipeline import load_tokenizer, token_ids
from training.prompt import CLASS_PROMPT, render_prompt
from training.stop_settings import Stop
from training.wish import Wish

Trained = dict[str, Any]
STOP = {"patience": 1, "min_gain": 1.0, "every": 2, "num_images": 1, "steps": 2, "prompts": ["{subject}"]}
POCKET = {"dino": "pocket", "clip": "pocket"}  # its CLIP embeds pictures of any base
LORA = "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize(
    ("scores", "best", "over"),
    [
        ([], None, False),
        ([0.5], 1, False),
        ([0.5, 0.505], 1, False),
        ([0.5, 0.505, 0.509], 1, True),
        ([0.5, 0.505, 0.515], 3, False),  # small gains add up
        ([0.5, 0.7, 0.6], 2, False),
        ([0.5, 0.7, 0.6, 0.705], 2, True),
        ([-0.2, -0.1, -0.3, 0.0], 4, False),
    ],
)
def test_patience_ends_with_as_many_looks_without_a_gain(
    scores: list[float], best: int | None, over: bool
) -> None:
    patience = Patience(Stop(patience=2, min_gain=0.01))
    for step, score in enumerate(scores, start=1):
        patience.add(Look(step, score, 0.0, 0.0, 0.0))
    assert (patience.best and patience.best.step, patience.over) == (best, over)
    again = Patience(Stop(patience=2, min_gain=0.01), [look.as_json() for look in patience.looks])
    assert (again.best, again.over) == (patience.best, over)


@pytest.fixture
def stopping(make_job: Callable[..., Lease], resident: ResidentBase, tmp_path: Path) -> Callable[..., Lease]:
    """A LoRA run of some steps that is looked at every second one; no look is a gain over the first.

    It may be judged by an embedder that is `absent`.
    """

    def make(
        name: str,
        steps: int = 12,
        stop: dict[str, Any] | None = STOP,
        absent: bool = False,
        **sections: Any,
    ) -> Lease:
        train = {"method": "lora", "steps": steps, "lr": 1e-2, "pairs_per_step": 2}
        if stop:
            judged = {"dino": str(tmp_path), "clip": "pocket"} if absent else POCKET
            train |= {"stop": {**stop, **judged}}
        checkpoint = {"every": 100, "keep": 1}
        lease = make_job(name, train=train, validate={"every": 0}, checkpoint=checkpoint, **sections)
        words = ["", "a photo of a zwx dog", render_prompt(CLASS_PROMPT, "dog", None)]
        ids = token_ids(load_tokenizer(resident.info), words, resident.info.token_limit).tolist()
        return replace(lease, look_ids=ids)

    return make


def of_kind(trained: Trained, kind: str) -> list[Any]:
    return [payload for event, payload in trained["events"] if event == kind]


def test_a_run_without_a_gain_ends_early_with_the_weights_that_drew_best(
    stopping: Callable[..., Lease],
    alone: Callable[..., Trained],
    storage: Storage,
    weights: Callable[[str], dict[str, bytes]],
) -> None:
    done = alone(stopping("rex"))
    assert [said["step"] for said in of_kind(done, "score")] == [2, 4]
    first = of_kind(done, "score")[0]
    assert first["score"] == pytest.approx(first["dino"] + first["clip_t"] - max(first["drift"], 0))
    kept = {key: done["metrics"][key] for key in ("best_step", "steps_saved", "score")}
    assert kept == {"best_step": 2, "steps_saved": 8, "score": first["score"]}
    [told] = [said["text"] for said in of_kind(done, "note")]
    assert "ended after step 4, with the weights of step 2; 8 of 12 steps are saved" in told
    alone(stopping("two", steps=2, stop=None))
    assert weights("rex") == weights("two")
    manifest = storage.manifest("artifacts/rex/v1")
    assert manifest is not None and manifest["steps"] == 2


def test_a_run_that_gains_trains_all_its_steps_and_is_looked_at_in_the_end(
    stopping: Callable[..., Lease], alone: Callable[..., Trained]
) -> None:
    done = alone(stopping("rex", steps=5, stop={**STOP, "patience": 3, "min_gain": 0.0}))
    assert [said["step"] for said in of_kind(done, "score")] == [2, 4, 5]
    scores = {said["step"]: said["score"] for said in of_kind(done, "score")}
    assert done["metrics"]["steps_saved"] == 0
    assert done["metrics"]["score"] == max(scores.values()) == scores[done["metrics"]["best_step"]]


@pytest.mark.resume
def test_a_run_that_was_left_at_a_look_or_between_two_ends_as_one_that_was_not(
    stopping: Callable[..., Lease],
    alone: Callable[..., Trained],
    storage: Storage,
    weights: Callable[[str], dict[str, bytes]],
) -> None:
    calm = alone(stopping("calm"))
    for name, step in (("at", 2), ("between", 3)):
        assert alone(stopping(name), {0: {step - 1: Wish.LEAVE}})["metrics"] is None
        again = alone(stopping(name))
        assert again["metrics"] == calm["metrics"]
        assert weights(name) == weights("calm")


@pytest.mark.slow
def test_two_workers_look_together(
    stopping: Callable[..., Lease], pair: Any, alone: Callable[..., Trained]
) -> None:
    one, both = alone(stopping("one")), pair(stopping("both"))[0]
    assert (both["metrics"]["best_step"], both["metrics"]["steps_saved"]) == (2, 8)
    scores = [[said["score"] for said in of_kind(trained, "score")] for trained in (one, both)]
    assert scores[1] == pytest.approx(scores[0], abs=1e-3)


@pytest.mark.slow
@pytest.mark.resume
def test_two_workers_that_were_left_when_all_was_decided_publish_it_together(
    stopping: Callable[..., Lease], pair: Any
) -> None:
    leave = {rank: {3: Wish.LEAVE} for rank in range(2)}
    assert [each["metrics"] for each in pair(stopping("both"), leave)] == [None, None]
    again = pair(stopping("both"))[0]
    assert (again["metrics"]["best_step"], again["metrics"]["steps_saved"]) == (2, 8)


@pytest.mark.slow
def test_what_one_worker_cannot_judge_fails_on_both(stopping: Callable[..., Lease], pair: Any) -> None:
    found = pair(stopping("rex", absent=True))
    assert ["is no embedder" in str(each["error"]) for each in found] == [True, True]
