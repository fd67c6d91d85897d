"""This file is where a campaign is left running without this process: on the cluster, or in the background here."""

import os
import subprocess
import sys
import time
from pathlib import Path

from cluster.errors import SystemFailure, UserError
from cluster.session import resolve_address, run_detached
from cluster.storage import Storage

STARTING_S = 60.0  # for a background process to take the campaign, on a busy machine
LAST_WORD_S = 45.0  # a controller that was not heard of for 30 s has its campaign no more


def detach(campaign: str, ledger: str, storage: Storage, address: str | None) -> str:
    """Leave a campaign running.

    On a cluster its controller is a detached actor, which Ray starts again on another node should its own be lost;
    without one it is a process of its own on this machine, which outlives the terminal.

    Args:
        campaign: A name that is on record.
        ledger: URI of the record; for a cluster a database that its nodes reach.
        storage: Its root.
        address: The cluster; `None` is this machine.

    Returns:
        Where it runs, for people.

    Raises:
        UserError: The record is a file of this machine, which the cluster's nodes do not have.
        SystemFailure: The process in the background ended at once.
    """
    joined = resolve_address(address)
    if joined is None:
        return _in_background(campaign, ledger, storage)
    if ledger.startswith("sqlite:") and not storage.is_local:
        raise UserError(
            "a detached campaign needs a record that the cluster reaches",
            f"it is the file {ledger.removeprefix('sqlite:///')} of this machine",
            "give --ledger postgresql://USER:PASSWORD@HOST/NAME",
        )
    name = f"raybooth-campaign-{campaign}"
    run_detached(joined, name, "orchestrator.detached:control", (campaign, ledger, storage.uri), storage)
    return f"actor {name} on {joined}"


def control(campaign: str, ledger: str, storage: str) -> None:
    """Run a campaign in a process of the cluster that it trains on."""
    from orchestrator.campaign import run_campaign
    from orchestrator.campaign_watch import CampaignWatch
    from orchestrator.ledger import Ledger

    with Ledger(ledger) as record, CampaignWatch() as watch:
        until = time.monotonic() + LAST_WORD_S
        while record.holder(campaign) and time.monotonic() < until:
            time.sleep(1)  # the controller before this one was lost with its node, and is not known to be
        run_campaign(campaign, record, Storage(storage), "auto", watch)


def _in_background(campaign: str, ledger: str, storage: Storage) -> str:
    folder = Path(storage.uri) if storage.is_local else Path.cwd()
    log = folder / "campaigns" / campaign / "controller.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "orchestrator", "campaign", "resume", campaign, "--storage", storage.uri]
    with log.open("ab") as sink:
        began = log.stat().st_size
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
            env={**os.environ, "RAYBOOTH_LEDGER": ledger},  # not an argument: it may hold a password
        )
    until = time.monotonic() + STARTING_S
    while time.monotonic() < until and not _has_begun(campaign, ledger, process.pid):
        if process.poll() is not None:
            if process.returncode in (0, 3):
                break
            said = log.read_bytes()[began:].decode(errors="replace").strip().splitlines()
            raise SystemFailure(
                "the campaign in the background ended at once", " ".join(said[-3:]), f"see {log}"
            )
        time.sleep(0.2)
    return f"process {process.pid} on this machine, log {log}"


def _has_begun(campaign: str, ledger: str, pid: int) -> bool:
    from orchestrator.ledger import Ledger

    with Ledger(ledger) as record:
        return f"process {pid} " in f"{record.holder(campaign)} "
