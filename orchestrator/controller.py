"""This file is where a campaign is run: it hears what happened, decides, puts that on record, and only then acts.

The work itself is behind `Works`, so that what is here is tested without Ray and measured without training.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from cluster.mailbox import GANG_KILLED, GIVE_UP_AFTER
from orchestrator.campaign_settings import Budget, Schedule
from orchestrator.claims import Claim, ClaimLost
from orchestrator.facts import (
    Began,
    Checked,
    Fact,
    Failed,
    Measured,
    Published,
    Ready,
    Registered,
    Said,
    Stepped,
    Stopped,
)
from orchestrator.labour import Works
from orchestrator.ledger import Ledger
from orchestrator.records import ENDED, CampaignRow, RunRow, saved_of, state_of
from orchestrator.recovery import Again, Failure, History, Kind, Size, decide
from orchestrator.roster import Roster
from orchestrator.turns import Turns

POLL_S = 0.5  # a table feels live, and every look asks the mailbox of each gang
RECORD_S = 1.0  # how old the steps on record may be; states are recorded at once
CANCELLED = {"what": "cancelled", "seen": "", "do": "raybooth campaign retry goes on with it"}
WISHES_S = 0.5  # until a cancel is heard


class Controller:
    """The controller of one campaign.

    Args:
        ledger: The record.
        claim: On the campaign.
        campaign: As it is on record.
        schedule: Its settings.
        budget: What it may spend.
        works: Does the work.
        show: Shown the runs a few times a second.
        say: Takes lines for people.
    """

    def __init__(
        self,
        ledger: Ledger,
        claim: Claim,
        campaign: CampaignRow,
        schedule: Schedule,
        budget: Budget,
        works: Works,
        show: Callable[[Sequence[RunRow]], None],
        say: Callable[[str], None],
    ) -> None:
        self._ledger, self._claim, self._campaign = ledger, claim, campaign
        self._schedule, self._budget, self._works, self._show, self._say = schedule, budget, works, show, say
        self.roster = Roster(ledger.runs(campaign.name), schedule.per_tenant)
        self._cancelled: set[int] = set()
        self._acts: list[Callable[[], None]] = []
        self._turns = Turns(self.roster, schedule, works, self._act)
        self._stopping: str | None = None
        self._recorded_at = self._asked_at = 0.0
        self._moved = True

    def run(self) -> str:
        """Run the campaign until every run has ended, or it is stopped; returns its state.

        Raises:
            ClaimLost: Another controller has it now.
        """
        self._ledger.record_campaign(self._claim, state="running", reason=None, finished_at=None)
        for row in self.roster.open():
            self._begin(row)
        while self.roster.unfinished and (
            self._stopping is None or self._works.leave() or self.roster.is_any("publishing")
        ):
            self._once(POLL_S)
        self._once(0.0)
        return self._finish()

    def stop(self, why: str) -> None:
        """Have what trains saved, and begin nothing more; the campaign can be gone on with."""
        if self._stopping is None:
            self._stopping = why
            self._works.leave()

    def _act(self, act: Callable[[], None]) -> None:
        """Have something done once what was decided is on record."""
        self._acts.append(act)

    # -- one turn ------------------------------------------------------------------------------------------

    def _once(self, wait_s: float) -> None:
        if self._claim.lost:
            raise ClaimLost(f"another controller has the campaign {self._campaign.name}")
        for fact in self._works.facts(wait_s):
            self._hear(fact)
        self._mind_wishes()
        if self.roster.unfinished:
            self._mind_budget()
        self._turns.settle()
        if self._stopping is None:
            self._turns.assign()
        self._record()
        acts, self._acts = self._acts, []
        for act in acts:
            act()
        self._show(self.roster.rows)

    def _hear(self, fact: Fact) -> None:
        row = self.roster[fact.run]
        if isinstance(fact, Said):
            self._say(f"{row.name}: {fact.text}")
            return
        if isinstance(fact, Measured):
            self._say(f"{fact.width} runs such as {row.name} are trained together")
            self._turns.measured(fact.run)
            return
        # what a gang says of a run that is not with it any more means nothing
        if row.state in ENDED or (row.state != "training" and isinstance(fact, Began | Stepped | Published)):
            return
        change, run = self.roster.change, fact.run
        match fact:
            case Checked(version=version, fingerprint=fingerprint, prior_key=key, notes=notes):
                change(run, phase="encoding", version=version, fingerprint=fingerprint, prior_key=key)
                for note in notes:
                    self._say(f"{row.name}: note: {note}")
            case Ready(prior_drawn=drawn):
                change(run, state="queued", phase="waiting for a gang", prior_drawn=row.prior_drawn + drawn)
                self.roster.ready(run)
            case Began(step=step):
                change(run, phase=None, step=step)
            case Stepped(row=said):
                figures = {key: said.get(key) for key in ("loss_subject", "loss_class")}
                self.roster.note(run, step=int(said["step"]), rate=said.get("steps_per_second"), **figures)
            case Published(metrics=metrics):
                step = row.steps - saved_of(metrics)
                change(run, state="publishing", phase=None, metrics=dict(metrics), step=step)
                self.roster.end_lease(run)
                self._act(partial(self._works.publish, run, metrics))
            case Registered():
                found = {"version": fact.version, "artifact": fact.artifact, "metrics": dict(fact.metrics)}
                step = row.steps - saved_of(fact.metrics)
                self._end(run, "succeeded", None, **found, mlflow_run_id=fact.mlflow_run_id, step=step)
            case Stopped():
                self._stopped(row, fact)
            case Failed():
                self._failed(row, fact)

    # -- how runs begin and end ----------------------------------------------------------------------------

    def _begin(self, row: RunRow) -> None:
        """Make a run ready that has not ended, whatever a controller before this one had come to with it.

        The try that was under way when that one was killed costs the run nothing.
        """
        if row.state in ("training", "publishing"):
            self.roster.change(row.id, state="queued", attempts=max(row.attempts - 1, 0))
            row = self.roster[row.id]
        try:
            outline = self._works.outline(row.id, Size(row.smaller))
        except Exception as error:
            self._failed(row, Failed.of(row.id, error))
            return
        self.roster.outline(row.id, outline)
        self.roster.change(row.id, state="preparing", phase="checking photos", gang=None)
        self._act(partial(self._works.check, row.id, Size(row.smaller)))

    def _end(self, run: int, state: str, reason: Mapping[str, Any] | None, **fields: Any) -> None:
        self.roster.change(
            run, state=state, phase=None, reason=reason, gang=None, finished_at=time.time(), **fields
        )
        self.roster.end_lease(run)
        self._cancelled.discard(run)
        self._turns.not_measured(run)
        if state != "succeeded":
            why = str(reason["what"]) if reason else None
            self._act(partial(self._works.end, run, state, why))

    def _stopped(self, row: RunRow, fact: Stopped) -> None:
        self._turns.not_measured(row.id)
        if row.id in self._cancelled:
            self._end(row.id, "cancelled", CANCELLED)
        else:
            kept, phase = max(row.attempts - 1, 0), "saved, to be gone on with"
            self.roster.change(row.id, state="queued", phase=phase, gang=None, attempts=kept)
            self.roster.end_lease(row.id)
            self._act(partial(self._works.end, row.id, "interrupted", self._stopping))

    def _failed(self, row: RunRow, fact: Failed) -> None:
        self._turns.not_measured(row.id)
        if row.id in self._cancelled:
            self._end(row.id, "cancelled", CANCELLED)
            return
        trained = row.state in ("training", "publishing")
        # a gang tells of itself only after it was started again some times
        kills = row.kills + (GIVE_UP_AFTER - 1 if fact.kind == GANG_KILLED else 0)
        outline = self.roster.outlines.get(row.id)
        history = History(
            attempts=row.attempts + (not trained),
            kills=kills,
            smaller=Size(row.smaller),
            width=row.width or 1,
            members=self.roster.members(row.id),
            most_attempts=self._schedule.attempts,
            can=outline.can if outline else frozenset(),
        )
        decided = decide(Failure(Kind(fact.kind), fact.reason), history)
        if not isinstance(decided, Again):
            state = getattr(decided, "state", "failed")
            self._end(row.id, state, decided.reason, attempts=history.attempts, kills=kills)
            return
        self._say(f"{row.name}: tried again: {fact.what}. {fact.seen}")
        self._act(partial(self._works.end, row.id, "interrupted", fact.what))
        self.roster.change(
            row.id,
            state="queued",
            phase="to be tried again",
            gang=None,
            reason=fact.reason,
            attempts=decided.attempts,
            kills=decided.kills,
            smaller=int(decided.smaller),
        )
        self.roster.end_lease(row.id)
        if decided.width != (row.width or 1):
            self.roster.regroup(row.id, decided.width)
        self.roster.unready(row.id)
        self._begin(self.roster[row.id])

    # -- what people want ----------------------------------------------------------------------------------

    def _mind_wishes(self) -> None:
        """Do what was asked. A cancel stays asked for until its runs have ended: this process may not live so long."""
        now = time.monotonic()
        if now - self._asked_at < WISHES_S:
            return
        self._asked_at = now
        done: list[int] = []
        for wish in self._ledger.wishes(self._claim):
            runs = list(wish.run_ids) if wish.run_ids is not None else [row.id for row in self.roster.rows]
            if wish.wish == "cancel":
                for run in runs:
                    self._cancel(run)
            elif wish.wish == "requeue":
                fresh = {row.id: row for row in self._ledger.runs(self._campaign.name, "queued")}
                for run in runs:
                    if run in fresh and self.roster[run].state in ENDED:
                        self.roster.again(fresh[run])
                        self._begin(fresh[run])
            if wish.wish != "cancel" or not self.roster.unfinished.intersection(runs):
                done.append(wish.id)
        if done:
            self._record()
            self._ledger.done(self._claim, done)

    def _cancel(self, run: int) -> None:
        state = self.roster[run].state
        if state in ENDED or run in self._cancelled:
            return
        if state in ("training", "publishing"):  # what is published may be on record in a moment
            self._cancelled.add(run)
        if state == "training":
            self.roster.note(run, phase="cancelling")
            self._act(partial(self._works.drop, run))
        elif state != "publishing":
            self._end(run, "cancelled", CANCELLED)

    def _mind_budget(self) -> None:
        spent, before = self._works.spent, self._campaign
        limits = {
            "budget.hours": (self._budget.hours, time.time() - self._campaign.created_at),
            "budget.cpu_hours": (self._budget.cpu_hours, before.cpu_seconds + spent["cpu"]),
            "budget.gpu_hours": (self._budget.gpu_hours, before.gpu_seconds + spent["gpu"]),
        }
        for name, (limit, seconds) in limits.items():
            if limit is not None and seconds > limit * 3600 and self._stopping is None:
                self._say(f"{name} is spent: what trains is saved, and nothing more begins")
                self.stop(f"{name} of {limit:g} is spent: set more and run the campaign again")

    # -- the record ----------------------------------------------------------------------------------------

    def _record(self) -> None:
        now = time.monotonic()
        if not self.roster.urgent and now - self._recorded_at < RECORD_S:
            return
        self._recorded_at = now
        changes = self.roster.take_changes()
        if changes:
            held = {f"{unit}_seconds": seconds for unit, seconds in self._works.spent.items()}
            before = {unit: getattr(self._campaign, unit) for unit in held}
            spent = {unit: before[unit] + held[unit] for unit in held}
            self._ledger.record(self._claim, changes, **spent)  # in one transaction: there is one every turn

    def _finish(self) -> str:
        if self._stopping is not None and self.roster.unfinished:
            state, do = "stopped", f"go on: raybooth campaign resume {self._campaign.name}"
            reason: dict[str, str] | None = {"what": self._stopping, "seen": "", "do": do}
        else:
            state, reason = state_of(self.roster.rows), None
        self._ledger.record_campaign(self._claim, state=state, reason=reason, finished_at=time.time())
        return state
