"""This package is where the ledger's schema changes are written down, one revision each, for Alembic."""
