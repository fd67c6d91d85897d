"""This file is where Ray Tune trains a population: it says when to decide, and `population` what is decided."""

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.search import BasicVariantGenerator

from cluster.storage import Storage
from orchestrator.bench import LOST, RUNG, WORTH, Bench, trial_run
from orchestrator.population import donor_of, heir, split
from orchestrator.space import Space, key_of
from orchestrator.takeover import take_over
from training.changes import settled


class Members(BasicVariantGenerator):  # type: ignore[misc]  # Ray has no types here
    """The members of a population, all at once. It is not done before they are: else Tune would keep no process."""

    def __init__(self) -> None:
        super().__init__()
        self._begun = self._ended = 0

    def next_trial(self) -> Any:
        if self._begun == self.total_samples:
            return None
        self._begun += 1
        return super().next_trial()

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        super().on_trial_complete(trial_id, result, error)
        self._ended += 1
        if self._ended == self.total_samples:
            self.set_finished()


class Population(PopulationBasedTraining):  # type: ignore[misc]  # Ray has no types here
    """PBT in step, whose decisions follow from the seed and can be told again, and that lets one member be.

    Members wait in a row, and no more than `gangs` run at a time.
    """

    def __init__(self, bench: Bench, space: Space, seed: int, gangs: int, spared: str) -> None:
        super().__init__(
            time_attr=RUNG,
            metric=WORTH,
            mode="max",
            perturbation_interval=1,
            custom_explore_fn=dict,  # it wants one, and `_get_new_config` decides
            log_config=False,
            synch=True,
        )
        self._bench, self._space, self._seed = bench, space, seed
        self._gangs, self._spared = gangs, spared
        self._numbers: dict[Any, int] = {}  # of the members

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        again = trial in self._numbers  # it has failed
        self._numbers.setdefault(trial, len(self._numbers))
        super().on_trial_add(tune_controller, trial)
        if not again:
            trial.set_status(Trial.PAUSED)  # Tune would start all that are pending
        if len(self._numbers) == 1:
            # while others are waited for, Tune would keep one idle process, with its gang, and end the rest
            cache = tune_controller._tune_controller._actor_cache
            cache.increase_max(trial.placement_group_factory, self._gangs)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        if (
            trial.status != Trial.ERROR
        ):  # it is given up, not tried again: the others would wait for it without end
            tune_controller.request_stop_experiment()

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        busy = [t for t in tune_controller.get_trials() if t.status in (Trial.RUNNING, Trial.PENDING)]
        return super().choose_trial_to_run(tune_controller) if len(busy) < self._gangs else None

    def _quantiles(self) -> tuple[list[Any], list[Any]]:
        told = [
            (trial, state)
            for trial, state in self._trial_state.items()
            if state.last_result is not None and not trial.is_finished()
        ]
        parts = split(
            [state.last_score for _, state in told],
            [bool(state.last_result[LOST]) for _, state in told],
            [place for place, (trial, _) in enumerate(told) if _key(trial) == self._spared],
        )
        lower, upper = ([told[place][0] for place in part] for part in parts)
        return lower, upper

    def _checkpoint_or_exploit(self, trial: Any, tune_controller: Any, upper: Any, lower: Any) -> None:
        if trial in lower:  # of one there is no choice by chance
            number = donor_of(self._numbers[trial], self._step_of(trial), self._seed, len(upper))
            upper = [upper[number]]
        super()._checkpoint_or_exploit(trial, tune_controller, upper, lower)

    def _exploit(self, tune_controller: Any, trial: Any, trial_to_clone: Any) -> None:
        member, step = self._numbers[trial], self._step_of(trial)
        old, donor = trial.config["values"], trial_to_clone.config["values"]
        runs = [trial_run(self._bench, spec, donor) for spec in self._bench.specs]
        idle = {key for run in runs for key in settled(run.train, step)}
        taken = [_key(one) for one in self._numbers]
        self._heir = heir(self._space, donor, step, self._seed, member, taken, idle)
        if self._heir is not None:
            take_over(Storage(self._bench.storage_uri), self._bench, old, donor, self._heir, step, member)
            super()._exploit(tune_controller, trial, trial_to_clone)

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"values": self._heir}, {}

    def _step_of(self, trial: Any) -> int:
        return self._bench.rungs[int(self._trial_state[trial].last_result[RUNG]) - 1]


def _key(trial: Any) -> str:
    return key_of(trial.config["values"])
