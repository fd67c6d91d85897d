"""Where long work stands, in a log."""

import io
import re

import pytest

from orchestrator import progress


def test_a_run_that_goes_on_expects_the_time_of_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 20))  # s
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    stream = io.StringIO()
    with progress.Lines(stream).stage("training rex", 400) as stage:
        stage.at(200)  # where the run before it ended
        stage.at(210)  # 20 s later
    assert re.search(r"training rex: 210/400, eta 380 s", stream.getvalue())


def test_work_that_starts_anew_counts_from_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    stream = io.StringIO()
    with progress.Lines(stream).stage("drawing", 4) as stage:
        stage.advance()
    assert "drawing: 1/4, eta 60 s" in stream.getvalue()
