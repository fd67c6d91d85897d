"""This file is where Alembic finds the connection to migrate: the one that `orchestrator.database` hands it."""

from alembic import context

from orchestrator.tables import METADATA

# SQLite changes a column by copying its table; the transaction is the caller's
context.configure(
    connection=context.config.attributes["connection"], target_metadata=METADATA, render_as_batch=True
)
context.run_migrations()
