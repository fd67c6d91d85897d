"""This file is where `python -m orchestrator` starts the command line."""

from orchestrator.cli import main

main()
