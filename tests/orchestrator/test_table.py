"""A campaign on a terminal and in a log."""

import io
import re
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from orchestrator import campaign_watch, pace
from orchestrator.campaign_watch import CampaignWatch
from orchestrator.pace import Pace, span
from orchestrator.records import CampaignRow, RunRow
from orchestrator.table import campaign_table, status_view

DAMAGED = {
    "what": "03.jpg is damaged",
    "seen": "broken\ndata [bold]stream",
    "do": "save it again",
    "kind": "x",
}
CAMPAIGN = CampaignRow("album", "/s", "running", None, {}, 1_000.0, 1_200.0, 4.0, 4.0, 0.0, None, None, None)


def run(number: int, state: str, **fields: Any) -> RunRow:
    """A run of 400 steps as the ledger has it."""
    nothing = dict.fromkeys(RunRow.__dataclass_fields__)
    fixed = {
        "id": number,
        "position": number,
        "name": f"subject-{number}",
        "class_noun": "dog",
        "state": state,
    }
    counts = {"tenant": "t", "priority": 0, "steps": 400, "step": 0, "attempts": 1, "kills": 0, "smaller": 0}
    return RunRow(**{**nothing, **fixed, **counts, "prior_drawn": 0, **fields})


def album(size: int) -> list[RunRow]:
    """A campaign in the middle: 3 failed, 9 train, 6 succeeded, 2 are made ready, the others wait."""
    began = 1_000.0
    rows = [run(i, "failed", reason=DAMAGED, finished_at=began + i) for i in range(3)]
    working = {"rate": 12.4, "gang": "gang-1", "loss_subject": 0.13, "loss_class": 0.21}
    rows += [run(i, "training", step=100 + i, **working) for i in range(3, 12)]
    times = {"started_at": began, "finished_at": began + 65, "version": "v1"}
    rows += [run(i, "succeeded", step=400, **times) for i in range(12, 18)]
    rows += [run(i, "preparing", phase="drawing class images") for i in range(18, 20)]
    return rows + [run(i, "queued") for i in range(20, size)]


def printed(what: Any, width: int = 100) -> list[str]:
    """The lines that something takes on a terminal."""
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(what)
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [100, 120])
def test_the_table_fits_and_shows_first_who_works_and_who_failed(width: int) -> None:
    named = [replace(row, name=f"a-subject-with-a-very-long-name-{row.id}") for row in album(400)]
    lines = printed(campaign_table(named, width, limit=20), width)
    assert len(lines) == 21 and max(map(len, lines)) <= width
    assert [line.split()[1] for line in lines[1:]] == ["training"] * 9 + ["drawing"] * 2 + ["failed"] * 3 + [
        "succeeded"
    ] * 6
    assert "103/400 12.4 0.130 0.210 24 s gang-1" in lines[1] and "v1 in 1:05" in lines[-1]


def test_without_a_limit_the_table_is_in_the_manifests_order_and_leaves_out_what_nobody_has() -> None:
    lines = printed(campaign_table([run(0, "queued"), run(1, "succeeded", version="v2")]))
    assert lines[0].split() == ["subject", "phase", "step", "loss", "result"]
    assert [line.split()[0] for line in lines[1:]] == ["subject-0", "subject-1"]


def test_status_tells_reasons_whole_and_as_they_are() -> None:
    rows = album(30)
    counts = Counter(row.state for row in rows)
    text = "\n".join(printed(status_view(CAMPAIGN, rows, counts, 200, limit=100), 200))
    assert "subject-0: 03.jpg is damaged: broken data [bold]stream\n  do: save it again" in text
    assert "album: 6 of 30 succeeded, 9 training, 2 preparing, 3 failed, 10 queued; 3:20 min" in text
    some = "\n".join(printed(status_view(CAMPAIGN, rows[:20], counts, 200, limit=2), 200))
    assert "and 1 more failed" in some and "6 of 30 succeeded" in some


def test_the_live_table_stays_within_the_terminal_with_notes_above_and_bars_below() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, height=24, color_system=None)
    with CampaignWatch(console=console) as watch, watch.stage("drawing class images", 200) as stage:
        stage.at(50)
        stage.at(100)
        watch.show(CAMPAIGN, album(400))
        watch.note("class images: [all] are there")
        *_, frame = stream.getvalue().split("\x1b[2K")
        lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", frame).splitlines()
        assert len(lines) <= 25 and lines[0] == "class images: [all] are there"
        assert any("drawing class images" in line and "100/200" in line for line in lines[-3:])
    _, ended = stream.getvalue().split("\x1b[?25h")  # the cursor is back
    assert len(ended.splitlines()) < 70 and ended.count("03.jpg is da") == 3 and "380 queued" in ended


def test_a_log_gets_a_line_per_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign_watch, "REFRESH_S", 0.0)
    monkeypatch.setattr(campaign_watch, "SHARE", 1e9)
    stream = io.StringIO()
    waiting, bad, new = run(0, "queued"), run(1, "preparing"), run(0, "preparing")
    trained = replace(waiting, state="training", step=12, gang="gang-1")
    again = replace(
        trained, state="queued", attempts=2, reason={"what": "a node was lost", "seen": "", "do": ""}
    )
    done = replace(
        trained, state="succeeded", version="v1", loss_subject=0.5, started_at=0.0, finished_at=34.0
    )
    failed = replace(bad, state="failed", reason=DAMAGED)
    with CampaignWatch(stream) as watch:
        for now in (new, waiting, replace(trained, phase="starting", step=30), trained, trained):
            watch.show(CAMPAIGN, [now, bad])
        for rows in ([again, failed], [done, failed]):
            watch.show(CAMPAIGN, rows)
    first, *lines, last = stream.getvalue().splitlines()
    assert first.startswith("album: 0 of 2 succeeded, 2 preparing; 3:20 min")
    assert lines == [
        "subject-0: ready, waits for a gang",
        "subject-0: training from step 12 of 400 on gang-1",
        "subject-0: queued again, attempt 2: a node was lost",
        "subject-1: failed: 03.jpg is damaged: broken data [bold]stream. save it again",
        "subject-0: succeeded as v1 in 34 s, loss 0.500",
    ]
    assert last.startswith("album: 1 of 2 succeeded, 1 failed; 3:20 min")


def test_ten_thousand_subjects_are_shown_without_being_felt() -> None:
    rows = album(10_000)
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=50)
    with CampaignWatch(console=console) as watch:
        began = time.process_time()
        for _ in range(1_000):  # as often as anybody asks, it rests nine tenths of the time
            watch.show(CAMPAIGN, rows)
        assert time.process_time() - began < 1.0
        assert not watch.due


def test_the_pace_is_that_of_all_runs_and_a_step_back_is_no_standstill() -> None:
    of_all = Pace()
    assert of_all.speed is None and of_all.left_s is None
    of_all.take(0.0, [run(0, "training", step=100), run(1, "training", step=0)])
    of_all.take(10.0, [run(0, "training", step=200), run(1, "training", step=100)])
    assert of_all.speed == 20.0 and of_all.left_s == 500 / 20
    of_all.take(20.0, [run(0, "training", step=300), run(1, "queued", step=0)])  # its checkpoint is lost
    assert of_all.speed == pytest.approx(10.0)
    of_all.take(20.0 + pace.WINDOW_S + 1, [run(0, "succeeded", step=400), run(1, "failed")])
    assert of_all.left_s is None


@pytest.mark.parametrize(
    ("seconds", "told"), [(None, ""), (0.4, "0 s"), (59.6, "1:00 min"), (200, "3:20 min"), (3720, "1:02 h")]
)
def test_spans_of_time(seconds: float | None, told: str) -> None:
    assert span(seconds) == told
