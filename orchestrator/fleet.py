"""This file is where the figures of a campaign are made for Prometheus, out of what is on record of its runs.

It only compares rows with those it saw before, so it needs no word from the controller and cannot disturb it. What was
done before its first look is not counted again.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from cluster.figures import Family, Figures
from orchestrator.campaign_settings import Budget
from orchestrator.records import ENDED, RUN_STATES, CampaignRow, RunRow

EVERY_S = 5.0  # between two looks; Prometheus comes every 15 to 30 s
_SECONDS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600)

FAMILIES = (
    Family("raybooth_subjects", "gauge", "Runs of the campaign", ("state", "tenant")),
    Family("raybooth_phase_seconds", "histogram", "How long a run was in a state", ("phase",), _SECONDS),
    Family("raybooth_runs_ended", "counter", "Runs that came to their end", ("outcome", "tenant")),
    Family("raybooth_retries", "counter", "Runs that were queued again after a failure", ("reason",)),
    Family("raybooth_steps", "counter", "Optimizer steps, of all runs together"),
    Family("raybooth_steps_per_second", "gauge", "Optimizer steps a second, of all runs together"),
    Family("raybooth_gpu_seconds", "counter", "GPU seconds that gangs held"),
    Family("raybooth_cpu_seconds", "counter", "CPU core seconds that gangs held"),
    Family(
        "raybooth_queue_age_seconds", "gauge", "How long the run that waits longest does; 0 when none waits"
    ),
    Family("raybooth_progress_age_seconds", "gauge", "Since a run took a step or came to another state"),
    Family("raybooth_budget_used_ratio", "gauge", "Spent of a budget, from 0 to 1", ("budget",)),
)


class Fleet:
    """The figures of one campaign.

    Args:
        figures: Takes them.
        budget: Of the campaign.
        clock: Seconds that only grow.
        now: Seconds since the epoch.
    """

    def __init__(
        self,
        figures: Figures,
        budget: Budget,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._figures, self._budget, self._clock, self._now = figures, budget, clock, now
        self._seen: dict[int, RunRow] = {}
        self._since: dict[int, float] = {}  # when a run came into its state
        self._kinds: set[tuple[str, str]] = set()
        self._spent: CampaignRow | None = None
        self._looked_at: float | None = None
        self._moved_at = clock()

    def look(self, rows: Sequence[RunRow], campaign: CampaignRow, at_once: bool = False) -> None:
        """Put the figures as they are now; at most every `EVERY_S` seconds unless `at_once`.

        Args:
            rows: All runs of the campaign.
            campaign: As it is on record.
        """
        at = self._clock()
        if not at_once and self._looked_at is not None and at - self._looked_at < EVERY_S:
            return
        steps = sum(self._compare(row, at) for row in rows)
        if steps:
            self._moved_at = at
        self._put("raybooth_steps", steps)
        if self._looked_at is not None and at > self._looked_at:
            self._put("raybooth_steps_per_second", steps / (at - self._looked_at))
        self._looked_at = at
        self._count(rows)
        waiting = [at - self._since[row.id] for row in rows if row.state in ("queued", "preparing")]
        self._put("raybooth_queue_age_seconds", max(waiting, default=0.0))
        is_open = any(row.state not in ENDED for row in rows)
        self._put("raybooth_progress_age_seconds", at - self._moved_at if is_open else 0.0)
        self._spend(campaign)

    def _compare(self, row: RunRow, at: float) -> int:
        """Put what became of a run since the last look; returns the steps that it took."""
        before = self._seen.get(row.id)
        self._seen[row.id] = row
        if before is None:
            self._since[row.id] = at
            return 0
        if row.state != before.state:
            self._moved_at = at
            if before.state not in ENDED:
                lasted = at - self._since[row.id]
                self._put("raybooth_phase_seconds", lasted, phase=before.state)
            if row.state in ENDED:
                self._put("raybooth_runs_ended", 1, outcome=row.state, tenant=row.tenant)
            self._since[row.id] = at
        # each failure brings a reason of its own, and goes on record before the run is tried again
        if row.reason is not None and row.reason is not before.reason and row.state not in ENDED:
            self._put("raybooth_retries", 1, reason=str(row.reason.get("kind") or "other"))
        return max(row.step - before.step, 0)

    def _count(self, rows: Sequence[RunRow]) -> None:
        counts = Counter((row.state, row.tenant) for row in rows)
        # a gauge that is not put stays as it was
        self._kinds |= {(state, tenant) for _, tenant in counts for state in RUN_STATES}
        for state, tenant in sorted(self._kinds):
            self._put("raybooth_subjects", counts[state, tenant], state=state, tenant=tenant)

    def _spend(self, campaign: CampaignRow) -> None:
        before, self._spent = self._spent, campaign
        if before is not None:
            self._put("raybooth_gpu_seconds", campaign.gpu_seconds - before.gpu_seconds)
            self._put("raybooth_cpu_seconds", campaign.cpu_seconds - before.cpu_seconds)
        used: Mapping[str, tuple[float | None, float]] = {
            "hours": (self._budget.hours, self._now() - campaign.created_at),
            "cpu_hours": (self._budget.cpu_hours, campaign.cpu_seconds),
            "gpu_hours": (self._budget.gpu_hours, campaign.gpu_seconds),
        }
        for budget, (hours, seconds) in used.items():
            if hours is not None:
                self._put("raybooth_budget_used_ratio", seconds / 3600 / hours, budget=budget)

    def _put(self, name: str, value: float, **labels: str) -> None:
        self._figures.put(name, value, labels)
