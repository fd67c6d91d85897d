"""This file is where the ledger's tables are named as SQLAlchemy sees them; `migrations/` is what makes them."""

import json
from typing import Any

from sqlalchemy import (
    Column,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.types import TypeDecorator

REVISION = "0001"
"""The newest of `migrations/versions`: a database that says this needs no Alembic."""


class Json(TypeDecorator[Any]):
    """JSON as text. A database's own type would refuse what may be in a reason or in figures (NUL, NaN)."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else json.dumps(value, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        return None if value is None else json.loads(value)


METADATA = MetaData()

CAMPAIGNS = Table(
    "campaigns",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("storage_uri", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("reason", Json),
    Column("manifest", Json, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("finished_at", Double),
    Column("worker_seconds", Double, nullable=False),
    Column("cpu_seconds", Double, nullable=False),
    Column("gpu_seconds", Double, nullable=False),
    Column("mlflow_run_id", Text),
)

# A table of its own, as it is written every few seconds: a campaign's row may carry thousands of prompts.
CLAIMS = Table(
    "claims",
    METADATA,
    Column("campaign", Text, ForeignKey("campaigns.name", ondelete="CASCADE"), primary_key=True),
    Column("token", Text),
    Column("owner", Json),
    Column("heartbeat_at", Double),
)

RUNS = Table(
    "runs",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("campaign", Text, ForeignKey("campaigns.name", ondelete="CASCADE"), nullable=False),
    Column("position", Integer, nullable=False),
    Column("name", Text, nullable=False),
    Column("class_noun", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("digest", Text, nullable=False),  # of the spec and what is wrong with it: whether it has changed
    Column("state", Text, nullable=False),
    Column("phase", Text),
    Column("step", Integer, nullable=False),
    Column("version", Text),
    Column("fingerprint", Text),
    Column("prior_key", Text),
    Column("group_no", Integer),
    Column("width", Integer),
    Column("attempts", Integer, nullable=False),
    Column("kills", Integer, nullable=False),
    Column("smaller", Integer, nullable=False),
    Column("reason", Json),
    Column("metrics", Json),
    Column("artifact", Text),
    Column("mlflow_run_id", Text),
    Column("prior_drawn", Integer, nullable=False),
    Column("gang", Text),
    Column("rate", Double),
    Column("loss_subject", Double),
    Column("loss_class", Double),
    Column("started_at", Double),
    Column("finished_at", Double),
    UniqueConstraint("campaign", "name", name="runs_campaign_name"),
    Index("runs_campaign_state", "campaign", "state"),
)

# Apart from the runs, which are written often and read all at once.
SPECS = Table(
    "specs",
    METADATA,
    Column(
        "run_id", Integer, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    ),
    Column("spec", Json, nullable=False),
)

HISTORY = Table(
    "history",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("run_id", Integer, ForeignKey("runs.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("at", Double, nullable=False),
    Column("state", Text, nullable=False),
    Column("phase", Text),
    Column("attempt", Integer, nullable=False),
    Column("reason", Json),
)

WISHES = Table(
    "wishes",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("campaign", Text, ForeignKey("campaigns.name", ondelete="CASCADE"), nullable=False, index=True),
    Column("wish", Text, nullable=False),
    Column("run_ids", Json),
    Column("at", Double, nullable=False),
)
