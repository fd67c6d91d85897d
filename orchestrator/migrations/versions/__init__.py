"""This package is where each change of the ledger's schema has its file. A file that was released is not edited."""
