"""This file is where `raybooth train` starts: a run is prepared, its version found, and its way begun."""

from cluster.machine import sees_gpu
from cluster.registry import Registry
from cluster.session import resolve_address
from cluster.storage import Storage
from orchestrator.fits import Memory, Room
from orchestrator.prepare import Destination, Prepared, destination, one_at_a_time, prepare
from orchestrator.progress import Stages
from orchestrator.signals import Signals
from orchestrator.single import Outcome, SingleRun
from training.recipe import Run


def train_subject(
    run: Run, storage: Storage, stages: Stages, address: str | None = None, new_version: bool = False
) -> Outcome:
    """Train one subject from its photos to a registered artifact.

    Args:
        run: The run.
        storage: Root of everything that lasts.
        stages: Shows progress.
        address: Ray cluster to join; `None` starts a private one on this machine.
        new_version: Train again although a version of the same fingerprint is registered.

    Returns:
        The outcome; a version that is there already is returned without work.

    Raises:
        UserError: Something in the run cannot be used, or it does not fit into memory.
        SystemFailure: The run failed; the same command goes on.
        Interrupted: SIGTERM; with a checkpoint, if there was anything to save.
    """
    signals = Signals()
    with signals.heard():
        return _train(run, storage, stages, address, new_version, signals)


def _train(
    run: Run, storage: Storage, stages: Stages, address: str | None, new_version: bool, signals: Signals
) -> Outcome:
    storage.check_writable()
    prepared = prepare(run, storage)
    for note in prepared.notes:
        stages.note(f"note: {note}")
    with storage.lock_or_refuse(f"locks/train-{prepared.name}", one_at_a_time(prepared.name)):
        goal = destination(storage, prepared.name, prepared.fingerprint, new_version)
        if goal.state == "succeeded":
            return _finished_before(storage, prepared, goal)
        if goal.state == "unfinished":
            stages.note(f"{prepared.name} {goal.version} was not finished: going on with it")
        if resolve_address(address) is None:  # else workers run on machines that are not known yet
            device = "cuda" if sees_gpu() and run.cluster.gpus_per_worker != 0 else "cpu"
            Memory(device, Room.here(device)).check(prepared.base, run)
        return SingleRun(storage, stages, prepared, goal, signals).run(address)


def _finished_before(storage: Storage, prepared: Prepared, goal: Destination) -> Outcome:
    entry = Registry(storage).show(prepared.name)["versions"][goal.version]
    return Outcome(
        "succeeded",
        prepared.name,
        goal.version,
        storage.full(entry["artifact"]),
        entry["mlflow"]["run_id"],
        entry["metrics"],
        entry["prior_key"],
        already_there=True,
    )
