"""This file is where a campaign that was written is put on record."""

from cluster.storage import Storage
from orchestrator.ledger import Ledger
from orchestrator.manifest import CampaignSpec, Row
from orchestrator.records import Enrolled, NewRun
from orchestrator.recovery import Kind


def enroll(spec: CampaignSpec, ledger: Ledger, storage: Storage) -> Enrolled:
    """Put a campaign on record, or what is new in it; raises as `Ledger.enroll`."""
    return ledger.enroll(spec.name, storage.uri, spec.as_json(), [_new_run(row) for row in spec.rows])


def _new_run(row: Row) -> NewRun:
    run, error = row.run, row.error
    return NewRun(
        name=row.name,
        class_noun=row.class_noun,
        tenant=row.tenant,
        priority=row.priority,
        steps=run.train.steps if run else 0,
        spec=run.model_dump(mode="json", by_alias=True) if run else None,
        reason={**error.as_json(), "kind": Kind.BAD_INPUT.value} if error else None,
    )
