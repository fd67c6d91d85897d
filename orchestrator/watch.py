"""This file is where a gang at work is watched: what it reports, what it is asked, and how it ends."""

import time
from collections.abc import Mapping
from typing import Any

from cluster.errors import SystemFailure, failure_of
from cluster.mailbox import CHECKPOINT, NOBODY, Event, MailboxClient
from cluster.session import free_resources
from orchestrator.events import GangThread
from orchestrator.progress import Stage, Stages
from orchestrator.run_record import RunRecord
from orchestrator.signals import Signals, Terminated

POLL_S = 0.2  # a bar feels live at 5 Hz
GRACE_S = 25.0  # for a checkpoint after SIGTERM: a pod has 30 s until it is killed
PATIENCE_S = 60.0  # of silence until people are told of it


class Watch:
    """One lease with its gang.

    Args:
        mailbox: Of the campaign; the lease is posted.
        gang: The thread that runs the gang.
        record: Takes every event.
        stage: The bar of the steps.
        stages: Takes notes for people.
        signals: What this process is told from outside.
    """

    def __init__(
        self,
        mailbox: MailboxClient,
        gang: GangThread,
        record: RunRecord,
        stage: Stage,
        stages: Stages,
        signals: Signals,
    ) -> None:
        self._mailbox, self._gang, self._record = mailbox, gang, record
        self._stage, self._stages, self._signals = stage, stages, signals
        self._heard_at, self._told_of_silence = time.monotonic(), False
        self._starts = 0
        self._leave_by: float | None = None

    def until_published(self) -> Mapping[str, float]:
        """Watch until the lease ends; returns the metrics of its artifact.

        Raises:
            UserError: The run cannot be trained.
            SystemFailure: It failed, or its gang did.
            Terminated: SIGTERM; with a checkpoint, if there was anything to save.
        """
        while True:
            alive = self._gang.is_alive()
            heard = self._mailbox.drain(POLL_S)
            said = self._record.heard([event for event in heard if event.lease != NOBODY])
            rows = [entry for entry in said if entry["event"] == "step"]
            if rows:
                self._stage.at(int(rows[-1]["step"]), _figures(rows[-1]))
            for event in heard:
                if (metrics := self._take(event)) is not None:
                    return metrics
            self._pass_on_signals()
            if not alive:
                raise ended(self._gang)
            self._tell_of_silence(bool(heard))

    def _take(self, event: Event) -> Mapping[str, float] | None:
        """Act on an event; the metrics when it says that the run is published."""
        said: Mapping[str, Any] = event.payload
        if event.kind == "note":
            self._stages.note(str(said["text"]))
        elif event.kind == "started":
            self._starts += 1
            self._stage.at(int(said["from_step"]))  # where the bar stands, and its speed is counted from
            if said["from_step"] or self._starts > 1:
                self._stages.note(f"going on from step {said['from_step']} with {said['workers']} worker(s)")
        elif event.kind == "checkpoint" and said["why"] == "asked":
            self._stages.note(f"saved a checkpoint at step {said['step']}, as asked")
        elif event.kind == "left":
            if self._signals.leave:
                raise Terminated(f"a checkpoint was saved at step {said['step']}")
            self._stages.note(
                f"the workers change: saved at step {said['step']}, going on when they are there"
            )
        elif event.kind == "failed":
            raise failure_of(said)
        elif event.kind == "published":
            if self._signals.leave:
                raise Terminated("the artifact is published and not yet registered")
            return dict(said["metrics"])
        return None

    def _pass_on_signals(self) -> None:
        if self._signals.save:
            self._signals.save = False
            if not self._mailbox.ask(CHECKPOINT):
                self._stages.note("nothing to save: no worker trains at the moment")
        if self._signals.leave and self._leave_by is None:
            self._leave_by = time.monotonic() + GRACE_S
            if not self._mailbox.retire():
                raise Terminated("no worker trained, so there was nothing to save")
            self._stages.note("terminating: saving a checkpoint first")
        if self._leave_by is not None and time.monotonic() > self._leave_by:
            raise Terminated(f"no checkpoint could be saved within {GRACE_S:.0f} s; the one before stays")

    def _tell_of_silence(self, heard: bool) -> None:
        """A gang that waits for a node says nothing, so we do."""
        now = time.monotonic()
        if heard:
            self._heard_at, self._told_of_silence = now, False
        elif now - self._heard_at > PATIENCE_S and not self._told_of_silence:
            self._told_of_silence = True
            free = free_resources()
            self._stages.note(f"no news from the workers for {PATIENCE_S:.0f} s; the cluster has {free} free")


def ended(gang: GangThread) -> SystemFailure:
    """The failure of a run whose gang is no more."""
    seen = (str(gang.error or "").strip().splitlines() or [""])[-1]
    failure = SystemFailure("the gang ended before the run did", seen, "run the same command again")
    failure.__cause__ = gang.error
    return failure


def _figures(row: Mapping[str, float]) -> str:
    """What stands beside the training bar."""
    prior = f" prior {row['loss_class']:.3f}" if row.get("loss_class") is not None else ""
    return f"loss {row['loss_subject']:.3f}{prior} {row['steps_per_second']:.1f} it/s"
