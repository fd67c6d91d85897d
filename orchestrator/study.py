"""This file is where recipes are searched: Ray Tune decides which are tried and which go on; a record outlives it.

Tune's own state is in a temporary folder and is never read again. A study that is started again asks for the same
recipes in the same order; trials that are on record tell what they know in a moment, so searcher and scheduler end
where they were.
"""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.logging import WARNING, set_verbosity
from ray import tune
from ray.train._internal.session import _TrainingResult
from ray.tune.error import TuneError
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from cluster.errors import RayboothError, SystemFailure
from cluster.objects import StorageError
from cluster.storage import Storage
from orchestrator.bench import KEY, LOST, RUNG, STEP, WORTH, Bench, forget, read_trial, trial_path
from orchestrator.pbt import Members, Population
from orchestrator.space import Choice, Range, Space
from orchestrator.trial import Workplace

ETA = 3  # one of three trials goes on at every rung


def search(
    bench: Bench,
    recipes: Sequence[Mapping[str, Any]],
    space: Space | None,
    trials: int,
    scheduler: str,
    seed: int,
    gangs: int,
    spared: str,
    on_result: Callable[[str, Mapping[str, Any]], None],
) -> None:
    """Try recipes until all are tried. Call it in a session.

    Args:
        bench: What the trials share.
        recipes: Tried first, in this order; without `space` they are all, and of a population they are.
        space: What Optuna's TPE chooses further ones from, or what a population changes on the way.
        trials: How many in all.
        scheduler: `asha` stops those that are not among the best at a rung; with `pbt` the worst go on from where the
            best are, with other settings; else all go to the last rung.
        seed: Of Optuna, and of what a population decides.
        gangs: Trials at a time.
        spared: Key of the recipe that goes its own way to its end, as the others are compared with it.
        on_result: Told of every rung: the trial's key and its row.

    Raises:
        SystemFailure: A trial failed by no fault of its recipe; started again, the study goes on.
        StorageError: A record, or a checkpoint that is taken over, cannot be read or written.
    """
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # they would write every trial down again
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = (
        "1"  # Ctrl-C ends the command; the record is whole at any moment
    )
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    tried = tune.with_resources(tune.with_parameters(_Tried, bench=bench), {"CPU": 0.1})
    searcher: Any = None
    parameters, samples = {"values": tune.grid_search([dict(one) for one in recipes])}, 1
    if scheduler == "pbt":
        assert space is not None  # the settings that it changes
        searcher, decides = Members(), Population(bench, space, seed, gangs, spared)
    else:
        decides = _scheduler(bench, scheduler == "asha", spared)
        if space is not None:
            searcher = searching(space, recipes, seed)
            parameters, samples = {}, trials
    with tempfile.TemporaryDirectory(prefix="raybooth-study-") as scratch:
        tuner = tune.Tuner(
            tried,
            param_space=parameters,
            tune_config=tune.TuneConfig(
                num_samples=samples,
                search_alg=searcher,
                scheduler=decides,
                # of a population all live at once, and its scheduler says who runs
                max_concurrent_trials=None if scheduler == "pbt" else gangs,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=bench.study,
                storage_path=scratch,
                verbose=0,
                callbacks=[_Told(bench, on_result)],
                failure_config=tune.FailureConfig(max_failures=1),
            ),
        )
        try:
            results = tuner.fit()
        except TuneError as error:
            raise _raised_by_us(error) from None
    if results.errors:
        said = [line for line in str(results.errors[0]).splitlines() if line.strip()] or [""]
        raise SystemFailure(
            f"{len(results.errors)} trials of the study failed",
            said[-1].strip(),
            "run the same command again: what is found stays found",
        )


def _raised_by_us(error: BaseException) -> BaseException:
    """What our scheduler or callback raised: Tune raises an error with its text in its place, which is returned where
    what was raised is none for people."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, RayboothError | StorageError):
        found = found.__cause__ or found.__context__
    return found or error


def searching(space: Space, recipes: Sequence[Mapping[str, Any]], seed: int) -> OptunaSearch:
    """Optuna's TPE, which is told these recipes first.

    A study that goes on tells it what it chose before. From the same seed it would draw its first choices once more,
    so each number of known recipes has a seed of its own.
    """
    points = [dict(one) for one in recipes]
    set_verbosity(WARNING)  # it would tell the terminal that it has begun
    return OptunaSearch(
        space=distributions(space),
        metric=WORTH,
        mode="max",
        points_to_evaluate=points,
        seed=seed + len(points) - 1,
    )


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """The space as Optuna takes it."""
    return {key: _distribution(one) for key, one in space.items()}


def _distribution(one: Range | Choice) -> BaseDistribution:
    if isinstance(one, Choice):
        return CategoricalDistribution(list(one.options))
    if one.whole:
        return IntDistribution(int(one.low), int(one.high), log=one.log)
    return FloatDistribution(one.low, one.high, log=one.log)


def rungs(steps: int, eta: int = ETA, number: int = 3) -> tuple[int, ...]:
    """The steps at which trials are scored: the last is `steps`, each is an `eta`-th of the one behind it."""
    found = {max(round(steps / eta**back), 1) for back in range(number)}
    return tuple(sorted(found))


class _Tried(tune.Trainable):  # type: ignore[misc]  # Ray has no types here
    """A trial in a process of its own, which stays for the next one with the gang, the base and the photos it has."""

    def setup(self, config: dict[str, Any], bench: Bench) -> None:
        self._place = Workplace(bench)
        self._trial = self._place.begin(_values(config))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._trial = self._place.begin(_values(new_config))
        return True

    def step(self) -> dict[str, Any]:
        row = self._trial.step()
        told = {key: row[key] for key in (STEP, WORTH, "dino", "clip_t", "drift", "steps_spent", RUNG, LOST)}
        return {**told, KEY: self._trial.key, "done": row["last"], "last": row["last"]}

    def save(self, checkpoint_dir: str | None = None) -> _TrainingResult:
        """What Tune takes for a checkpoint: the last result, which says how many rungs are told.

        The record has all else. Files would have to lie where every node sees them.
        """
        return _TrainingResult(tune.Checkpoint.from_directory("in-the-record"), dict(self._last_result))

    def restore(self, checkpoint_path: _TrainingResult) -> None:
        """Go on behind the rungs of a result: this trial's, or the one's that it takes over."""
        self._trial.go_on(int(checkpoint_path.metrics[RUNG]))

    def cleanup(self) -> None:
        self._place.close()


def _values(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The recipe in a config of Tune's: its own, or the one of a list."""
    found: Mapping[str, Any] = config.get("values", config)
    return found


class _Told(tune.Callback):  # type: ignore[misc]  # Ray has no types here
    """Tells of rungs, and puts down which trials the scheduler stopped."""

    def __init__(self, bench: Bench, on_result: Callable[[str, Mapping[str, Any]], None]) -> None:
        self._bench, self._on_result = bench, on_result
        self._storage = Storage(bench.storage_uri)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes itself down as a pickle, which nobody reads, and a terminal cannot be written

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        self._on_result(str(result[KEY]), dict(result))

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        if result.get("last", True):
            return
        record = read_trial(self._storage, self._bench.study, str(result[KEY]))
        if record and record["state"] == "running":
            path = trial_path(self._bench.study, str(result[KEY]))
            self._storage.write_json(path, {**record, "state": "stopped"})
        with suppress(OSError):
            forget(self._storage, self._bench, str(result[KEY]))


class _Sparing(AsyncHyperBandScheduler):  # type: ignore[misc]  # Ray has no types here
    """ASHA that lets one trial go to its end."""

    def __init__(self, spared: str, **settings: Any) -> None:
        super().__init__(**settings)
        self._spared = spared

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decided: str = super().on_trial_result(tune_controller, trial, result)
        if result[KEY] == self._spared and not result["last"]:
            return str(TrialScheduler.CONTINUE)
        return decided


def _scheduler(bench: Bench, asha: bool, spared: str) -> Any:
    if not asha or len(bench.rungs) == 1:
        return FIFOScheduler()
    return _Sparing(
        spared,
        time_attr=STEP,
        metric=WORTH,
        mode="max",
        grace_period=bench.rungs[0],
        reduction_factor=ETA,
        max_t=bench.rungs[-1],
    )
