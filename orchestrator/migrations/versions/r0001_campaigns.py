"""This file is where campaigns, their runs, claims, history and wishes enter the schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "campaigns",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("storage_uri", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("manifest", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("finished_at", sa.Double),
        sa.Column("worker_seconds", sa.Double, nullable=False),
        sa.Column("cpu_seconds", sa.Double, nullable=False),
        sa.Column("gpu_seconds", sa.Double, nullable=False),
        sa.Column("mlflow_run_id", sa.Text),
    )
    op.create_table(
        "claims",
        sa.Column("campaign", sa.Text, sa.ForeignKey("campaigns.name", ondelete="CASCADE"), primary_key=True),
        sa.Column("token", sa.Text),
        sa.Column("owner", sa.Text),
        sa.Column("heartbeat_at", sa.Double),
    )
    op.create_table(
        "runs",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("campaign", sa.Text, sa.ForeignKey("campaigns.name", ondelete="CASCADE"), nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("class_noun", sa.Text, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("steps", sa.Integer, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("phase", sa.Text),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("version", sa.Text),
        sa.Column("fingerprint", sa.Text),
        sa.Column("prior_key", sa.Text),
        sa.Column("group_no", sa.Integer),
        sa.Column("width", sa.Integer),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("kills", sa.Integer, nullable=False),
        sa.Column("smaller", sa.Integer, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("metrics", sa.Text),
        sa.Column("artifact", sa.Text),
        sa.Column("mlflow_run_id", sa.Text),
        sa.Column("prior_drawn", sa.Integer, nullable=False),
        sa.Column("gang", sa.Text),
        sa.Column("rate", sa.Double),
        sa.Column("loss_subject", sa.Double),
        sa.Column("loss_class", sa.Double),
        sa.Column("started_at", sa.Double),
        sa.Column("finished_at", sa.Double),
        sa.UniqueConstraint("campaign", "name", name="runs_campaign_name"),
    )
    op.create_index("runs_campaign_state", "runs", ["campaign", "state"])
    op.create_table(
        "specs",
        sa.Column(
            "run_id",
            sa.Integer,
            sa.ForeignKey("runs.id", ondelete="CASCADE"),
            primary_key=True,
            autoincrement=False,
        ),
        sa.Column("spec", sa.Text, nullable=False),
    )
    op.create_table(
        "history",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("run_id", sa.Integer, sa.ForeignKey("runs.id", ondelete="CASCADE"), nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("phase", sa.Text),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("reason", sa.Text),
    )
    op.create_index("ix_history_run_id", "history", ["run_id"])
    op.create_table(
        "wishes",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("campaign", sa.Text, sa.ForeignKey("campaigns.name", ondelete="CASCADE"), nullable=False),
        sa.Column("wish", sa.Text, nullable=False),
        sa.Column("run_ids", sa.Text),
        sa.Column("at", sa.Double, nullable=False),
    )
    op.create_index("ix_wishes_campaign", "wishes", ["campaign"])


def downgrade() -> None:
    for table in ("wishes", "history", "specs", "runs", "claims", "campaigns"):
        op.drop_table(table)
