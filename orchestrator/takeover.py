"""This file is where a member of a population takes over what another one has trained."""

from typing import Any

from cluster.storage import Storage
from orchestrator.bench import Bench, Record, forget, read_trial, trial_path, trial_run, version_of
from orchestrator.prepare import prepare, run_path
from orchestrator.space import Values, key_of
from training import checkpoint

REPLACED = "replaced"  # the state of a history whose member goes on with another's


def take_over(
    storage: Storage, bench: Bench, old: Values, donor: Values, new: Values, step: int, member: int
) -> None:
    """Have a member go on from the donor's checkpoints of `step`, and let its own history go; again is no harm.

    Where the donor has no whole checkpoint, the member trains its history from the first step, to the same bits.

    Args:
        storage: Root.
        bench: What the members share.
        old: The history that ends.
        donor: The history that is taken over; it goes on too.
        new: The history that begins.
        step: Steps that the donor has trained.
        member: The number of the member, for people.

    Raises:
        StorageError: A checkpoint cannot be read or written.
    """
    key = key_of(new)
    record: Record = read_trial(storage, bench.study, key) or {
        **_begun(new),
        "of": key_of(donor),
        "instead_of": key_of(old),
        "member": member,
    }
    for spec in bench.specs if not record["rows"] else ():
        mine, theirs = (prepare(trial_run(bench, spec, values), storage) for values in (new, donor))
        paths = [run_path(mine.name, version_of(bench.study, key_of(values))) for values in (new, donor)]
        if not checkpoint.steps_saved(storage, paths[0]):
            checkpoint.adopt(storage, paths[0], mine.fingerprint, paths[1], theirs.fingerprint, step)
    storage.write_json(trial_path(bench.study, key), record)
    if (left := read_trial(storage, bench.study, key_of(old))) and left["state"] == "running":
        storage.write_json(trial_path(bench.study, key_of(old)), {**left, "state": REPLACED})
    forget(storage, bench, key_of(old))


def _begun(values: Values) -> dict[str, Any]:
    return {"values": dict(values), "state": "running", "rows": []}
