"""This file is where a day of a fleet is simulated: 100,000 subjects, many tenants, nodes that are lost.

    python -m benchmarks.fleet [--subjects 100000] [--nodes 6] [--hours 24] [--price 0.10] [--json]

Controller, turns, queue, roster, recovery, crew, mailboxes and the ledger are the real ones; workers, nodes and time
are not. How long things take was measured with the pocket base on a CPU (`benchmarks/RESULTS.md`); give the figures of
your own base. Worker-hours are those of the workers they were taken from: GPU-hours where a worker is a GPU.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.simulated_nodes import Stages
from benchmarks.simulated_works import KIND, SimulatedWorks
from orchestrator.campaign_settings import Budget, Schedule
from orchestrator.controller import Controller
from orchestrator.facts import Fact, Failed
from orchestrator.ledger import Ledger
from orchestrator.records import CampaignRow, NewRun, RunRow
from orchestrator.roster import Outline

NAME = "fleet"
CLASSES = 20  # of subjects; each has a prior set


class Watched(Controller):
    """The real controller, its decisions timed: CPU time of this thread, without the record and the works."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.turn_s: list[float] = []
        self._deciding_s = 0.0
        self._turns.settle = self._timed(self._turns.settle)  # type: ignore[method-assign]
        self._turns.assign = self._timed(self._turns.assign)  # type: ignore[method-assign]

    def _hear(self, fact: Fact) -> None:
        if isinstance(fact, Failed):
            self._timed(super()._hear)(fact)
        else:
            super()._hear(fact)

    def _once(self, wait_s: float) -> None:
        self._deciding_s = 0.0
        super()._once(wait_s)
        self.turn_s.append(self._deciding_s)

    def _timed(self, act: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: Any) -> None:
            began = time.thread_time()
            act(*args)
            self._deciding_s += time.thread_time() - began

        return timed


def tenants(subjects: int, number: int, rng: random.Random) -> list[str]:
    """The tenant of each subject: the second is half as large as the first, the third a third; in any order."""
    weights = [1 / rank for rank in range(1, number + 1)]
    return rng.choices([f"tenant-{rank:03}" for rank in range(1, number + 1)], weights, k=subjects)


def simulate(
    folder: Path,
    subjects: int,
    nodes: int,
    stages: Stages,
    hours: float = 24.0,
    number: int = 200,
    schedule: Schedule = Schedule(bank=8, per_tenant=16),
    price: float = 0.0,
    room: int = 1,
    quantum_s: float = 10.0,
    seed: int = 0,
    look: Callable[[SimulatedWorks, Sequence[RunRow]], None] = lambda works, rows: None,
) -> dict[str, Any]:
    """Run a campaign of `subjects` over `hours`; returns what came of it.

    Args:
        folder: For the ledger.
        number: Of tenants.
        price: Of a node, an hour.
        room: Workers on a node.
        look: Shown the works and the runs at every turn.
    """
    figures: dict[str, Any] = {
        "subjects": subjects,
        "nodes": nodes,
        "load_average": round(os.getloadavg()[0], 1),
    }
    of = tenants(subjects, number, random.Random(seed))
    runs = [
        NewRun(f"s{i}", f"class-{i % CLASSES}", tenant, 0, stages.steps, {"subject": i})
        for i, tenant in enumerate(of)
    ]
    began, cpu = time.monotonic(), time.process_time()
    with Ledger(f"sqlite:///{folder / 'campaigns.db'}") as ledger:
        ledger.enroll(NAME, str(folder), {}, runs)
        rows = ledger.runs(NAME)
        outlines = {row.id: Outline(KIND, "lora", f"prior-{row.class_noun}") for row in rows}
        works = SimulatedWorks(
            outlines.__getitem__, stages, nodes, room, schedule.runs_per_gang, quantum_s, seed
        )

        def show(rows: Sequence[RunRow]) -> None:
            look(works, rows)
            if works.clock.now >= hours * 3600:
                controller.stop(f"{hours:g} hours are over")

        told = Counter[str]()

        def say(text: str) -> None:
            told["retries"] += "tried again" in text

        with ledger.claim(NAME) as claim:
            campaign: CampaignRow = ledger.campaign(NAME)
            controller = Watched(ledger, claim, campaign, schedule, Budget(), works, show, say)
            figures["state"] = controller.run()
        works.close()
        after = ledger.runs(NAME)
    figures |= _outcome(works, after, price) | {"retries": told["retries"]}
    figures["waiting_min"] = waiting(works.began, after)
    figures |= _planner(controller, len(works.leases) + told["retries"])
    figures |= {"wall_s": time.monotonic() - began, "cpu_s": time.process_time() - cpu}
    return figures


def _outcome(works: SimulatedWorks, rows: Sequence[RunRow], price: float) -> dict[str, Any]:
    tally, node_h = works.tally, works.nodes.held_s / 3600
    return {
        "ended": dict(Counter(row.state for row in rows)),
        "hours": works.clock.now / 3600,
        "worker_hours": tally.worker_s / 3600,
        "training_share": tally.training_s / tally.worker_s,
        "node_hours": node_h,
        "cost": node_h * price,
        "cost_per_1000": node_h * price / max(sum(row.state == "succeeded" for row in rows), 1) * 1000,
        "nodes_lost": works.nodes.losses,
        "worker_starts": tally.starts,
        "steps": tally.steps,
        "steps_lost": tally.steps_lost,
        "leases": len(works.leases),
    }


def _planner(controller: Watched, decisions: int) -> dict[str, float]:
    """A decision is a group handed to a gang, or what becomes of a run that failed."""
    first, *others = controller.turn_s
    return {
        "decisions": decisions,
        "planner_ms_per_decision": 1000 * sum(controller.turn_s) / max(decisions, 1),
        "planner_ms_per_decision_after_the_first_turn": 1000 * sum(others) / max(decisions, 1),
        "planner_first_turn_s": first,
        "planner_turn_p50_ms": 1000 * statistics.median(others),
        "planner_turn_p99_ms": 1000 * quantile(others, 0.99),
        "planner_turn_most_ms": 1000 * max(others),
    }


def waiting(began: dict[int, float], rows: Sequence[RunRow]) -> dict[str, dict[str, float]]:
    """Minutes from the start of the campaign to a run's first, by the size of its tenant; those that began."""
    sizes = Counter(row.tenant for row in rows)
    found: dict[str, list[float]] = {"all": []}
    for row in rows:
        if row.id in began:
            size = len(str(sizes[row.tenant] - 1))
            group = f"tenants of {10 ** (size - 1) + 1} to {10**size}"
            for key in ("all", group):
                found.setdefault(key, []).append(began[row.id] / 60)
    return {
        key: {"runs": len(of), "median": statistics.median(of), "p95": quantile(of, 0.95)}
        for key, of in sorted(found.items(), key=lambda item: (len(item[0]), item[0]))
        if of
    }


def quantile(of: Sequence[float], share: float) -> float:
    """The value below which a share of them lies."""
    return sorted(of)[min(int(share * len(of)), len(of) - 1)]


def main() -> None:
    """Simulate what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--subjects", type=int, default=100_000)
    parser.add_argument("--nodes", type=int, default=6)
    parser.add_argument("--workers-per-node", type=int, default=1)
    parser.add_argument("--tenants", type=int, default=200)
    parser.add_argument("--per-tenant", type=int, default=16, help="schedule.per_tenant; 0 is no limit")
    parser.add_argument("--bank", type=int, default=8, choices=(1, 2, 4, 8), help="schedule.bank")
    parser.add_argument("--hours", type=float, default=24.0, help="until what trains is saved and left")
    parser.add_argument("--price", type=float, default=0.10, help="of a node, an hour")
    parser.add_argument("--quantum-s", type=float, default=10.0, help="between two looks of the controller")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    for field in fields(Stages):
        kind: Any = int if isinstance(field.default, int) else float
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    asked = parser.parse_args()
    stages = Stages(**{field.name: getattr(asked, field.name) for field in fields(Stages)})
    schedule = Schedule(bank=asked.bank, per_tenant=asked.per_tenant or None)
    with tempfile.TemporaryDirectory() as folder:
        figures = simulate(
            Path(folder),
            asked.subjects,
            asked.nodes,
            stages,
            asked.hours,
            asked.tenants,
            schedule,
            asked.price,
            asked.workers_per_node,
            asked.quantum_s,
            asked.seed,
        )
    figures = rounded(figures)
    if asked.json:
        print(json.dumps(figures))
        return
    for key, value in figures.items():
        if isinstance(value, dict):
            value = "; ".join(f"{inner}: {of}" for inner, of in value.items())
        print(f"{key.replace('_', ' '):<48} {value}")


def rounded(value: Any) -> Any:
    """With three places where there are any."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return round(value, 3) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
