"""The figures of a campaign: from a real controller on a real ledger, and out of a real Ray's agent."""

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.idle_works import IdleWorks
from cluster.mailbox import SYSTEM
from orchestrator.campaign_settings import Budget, Schedule
from orchestrator.controller import Controller
from orchestrator.facts import Failed
from orchestrator.fleet import FAMILIES, Fleet
from orchestrator.ledger import Ledger
from orchestrator.records import CampaignRow, NewRun, RunRow


class Kept:
    """Figures as they come: the last value of a gauge, the sum of a counter, all of a histogram."""

    def __init__(self) -> None:
        self.kinds = {family.name: family for family in FAMILIES}
        self.values: dict[str, dict[tuple[str, ...], float]] = defaultdict(lambda: defaultdict(float))
        self.seen: dict[str, list[float]] = defaultdict(list)

    def put(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        family = self.kinds[name]
        assert set(labels) == set(family.labels)
        key = tuple(labels[label] for label in family.labels)
        if family.kind == "histogram":
            self.seen[name].append(value)
        elif family.kind == "gauge":
            self.values[name][key] = value
        else:
            assert value >= 0
            self.values[name][key] += value


def test_a_campaign_tells_who_ended_how_and_what_it_took(ledger: Ledger) -> None:
    given: dict[str, Any] = {"class_noun": "dog", "priority": 0, "steps": 10, "spec": {"x": 1}}
    runs = [NewRun("ada", tenant="a", **given), NewRun("bob", tenant="b", **given)]
    ledger.enroll("night", "/root", {}, runs)
    ids = {row.name: row.id for row in ledger.runs("night")}

    def fails(run: int, attempt: int) -> Failed | None:
        return Failed(run, SYSTEM, "the storage is away", "", "") if run == ids["bob"] else None

    kept, now = Kept(), iter(range(10_000))
    fleet = Fleet(kept, Budget(gpu_hours=1), clock=lambda: float(next(now)))
    with ledger.claim("night") as claim:
        controller = Controller(
            ledger,
            claim,
            ledger.campaign("night"),
            Schedule(attempts=3),
            Budget(gpu_hours=1),
            IdleWorks(fails=fails),
            lambda rows: fleet.look(rows, ledger.campaign("night"), at_once=True),
            lambda text: None,
        )
        controller.run()
    assert kept.values["raybooth_runs_ended"] == {("succeeded", "a"): 1, ("failed", "b"): 1}
    assert kept.values["raybooth_retries"] == {("system",): 2}
    subjects = {key: value for key, value in kept.values["raybooth_subjects"].items() if value}
    assert subjects == {("succeeded", "a"): 1, ("failed", "b"): 1}
    assert kept.values["raybooth_steps"][()] > 0
    assert kept.values["raybooth_progress_age_seconds"] == {(): 0.0}
    assert set(kept.values["raybooth_budget_used_ratio"]) == {("gpu_hours",)}
    assert kept.seen["raybooth_phase_seconds"]
    assert set(kept.values) | set(kept.seen) == {family.name for family in FAMILIES}


def test_what_stands_still_is_told_by_its_age(ledger: Ledger) -> None:
    ledger.enroll("night", "/root", {}, [NewRun("ada", "dog", "a", 0, 10, {"x": 1})])
    [row], campaign = ledger.runs("night"), ledger.campaign("night")
    kept, at = Kept(), [0.0]
    fleet = Fleet(kept, Budget(), clock=lambda: at[0])

    def look(when: float, row: RunRow, campaign: CampaignRow = campaign) -> None:
        at[0] = when
        fleet.look([row], campaign, at_once=True)

    look(0, row)
    look(100, row)
    assert kept.values["raybooth_queue_age_seconds"][()] == 100
    training = replace(row, state="training")
    look(110, training)
    spent = replace(campaign, gpu_seconds=campaign.gpu_seconds + 7)
    look(120, replace(training, step=5), spent)
    assert kept.values["raybooth_progress_age_seconds"][()] == 0
    assert kept.values["raybooth_steps_per_second"][()] == 0.5
    assert kept.values["raybooth_gpu_seconds"][()] == 7
    look(500, replace(training, step=5), spent)
    assert kept.values["raybooth_progress_age_seconds"][()] == 380
    assert kept.values["raybooth_queue_age_seconds"][()] == 0
    assert kept.seen["raybooth_phase_seconds"] == [110]


def test_looks_are_seldom_unless_asked_for(ledger: Ledger) -> None:
    ledger.enroll("night", "/root", {}, [NewRun("ada", "dog", "a", 0, 10, {"x": 1})])
    rows, campaign = ledger.runs("night"), ledger.campaign("night")
    kept, at = Kept(), [0.0]
    fleet = Fleet(kept, Budget(), clock=lambda: at[0])
    fleet.look(rows, campaign)
    at[0] = 4.0
    fleet.look([replace(rows[0], step=9)], campaign)
    assert kept.values["raybooth_steps"][()] == 0
    at[0] = 6.0
    fleet.look([replace(rows[0], step=9)], campaign)
    assert kept.values["raybooth_steps"][()] == 9


def test_no_label_holds_a_subject() -> None:
    assert {label for family in FAMILIES for label in family.labels} == {
        "state",
        "tenant",
        "phase",
        "outcome",
        "reason",
        "budget",
    }


SCRIPT = """
import json, socket, sys, time, urllib.request
import ray
from cluster.figures import RayFigures
from orchestrator.fleet import FAMILIES

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
ray.init(
    address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
    object_store_memory=80 * 1024**2, _metrics_export_port=port, _temp_dir=sys.argv[1],
    _system_config={"metrics_report_interval_ms": 500},
)
figures = RayFigures(FAMILIES)
for family in FAMILIES:
    figures.put(family.name, 1.0, {label: "x" for label in family.labels})
until = time.monotonic() + 60
while time.monotonic() < until:
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    except OSError:
        text = ""
    named = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ray_raybooth_")]
    if len(named) == len(FAMILIES):
        break
    time.sleep(0.25)
print(json.dumps(named))
"""


@pytest.mark.slow
def test_rays_agent_exports_every_figure_by_the_name_that_alerts_and_dashboards_use(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("r")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert sorted(json.loads(done.stdout.splitlines()[-1])) == sorted(family.exported for family in FAMILIES)
