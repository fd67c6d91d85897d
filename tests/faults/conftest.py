"""This file is where tests injure runs: real gangs with leases to train, and the table of what each injury cost.

`pytest -m faults` prints the table: per fault the steps that were run twice, the seconds without a new step, and
whether the artifact equals that of an undisturbed run.
"""

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest

from cluster.mailbox import Event, Mailbox, create, put
from cluster.storage import Storage
from training.artifact import open_artifact
from training.gang import GangShape, run_gang
from training.lease import Lease
from training.pipeline import load_tokenizer, open_base, token_ids
from training.recipe import Run

PATIENCE_S = 900  # for a run on a machine that is busy elsewhere
STEPS = 40
EVERY = 10
TABLE = pytest.StashKey[list[tuple[str, str, str, str]]]()


# -- the table ---------------------------------------------------------------------------------------------


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Adds a line to the table."""

    def add(fault: str, equal: str, twice: int | None = None, lost_s: float | None = None) -> None:
        shown = ("-" if twice is None else str(twice), "-" if lost_s is None else f"{lost_s:.1f}", equal)
        request.config.stash.setdefault(TABLE, []).append((fault, *shown))

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table."""
    rows = config.stash.get(TABLE, [])
    if rows:
        lines = [("fault", "steps twice", "seconds lost", "artifact"), *rows]
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        terminalreporter.section("faults")
        for line in lines:
            terminalreporter.write_line("  ".join(map(str.ljust, line, widths)).rstrip())


# -- runs --------------------------------------------------------------------------------------------------


@dataclass
class Story:
    """What a lease's gang reported, with the time of each."""

    events: list[tuple[float, Event]] = field(default_factory=list)

    def add(self, event: Event) -> None:
        self.events.append((time.monotonic(), event))

    def of(self, kind: str, *keys: str) -> list[Any]:
        """The payloads of a kind of event, or one or more of their values."""
        said = [event.payload for _, event in self.events if event.kind == kind]
        return [p[keys[0]] if len(keys) == 1 else tuple(p[k] for k in keys) for p in said] if keys else said

    @property
    def twice(self) -> int:
        """Steps that were run again after a restart."""
        reached, again = 0, 0
        for _, event in self.events:
            if event.kind == "started":
                again += max(reached - event.payload["from_step"], 0)
            elif event.kind == "step":
                reached = max(reached, event.payload["step"])
        return again

    @property
    def pauses(self) -> list[float]:
        """Per restart, the seconds between the last new step before it and the first one after it."""
        reached, at, restarted, pauses = 0, 0.0, False, []
        for when, event in self.events:
            if event.kind == "started" and reached:
                restarted = True
            elif event.kind == "step" and event.payload["step"] > reached:
                pauses += [when - at] if restarted else []
                reached, at, restarted = event.payload["step"], when, False
        return pauses


Act = Callable[[Event, Story], None]


def patient() -> type[Mailbox]:
    """A mailbox whose gang trains on only when the test has acted on what it said: no fault comes too late."""

    class Patient(Mailbox):  # in here, so that Ray sends it whole: the actor's process cannot import tests
        def __init__(self) -> None:
            super().__init__()
            self._delivered = self._acted_on = 0  # events

        async def report(self, n: int, rank: int, kind: str, payload: Any, slot: int = 0) -> None:
            await super().report(n, rank, kind, payload, slot)
            if kind in ("started", "steps", "checkpoint", "note"):
                async with self._changed:
                    mine = self._delivered + len(self._events)
                    await self._changed.wait_for(lambda: self._acted_on >= mine)

        async def drain(self, wait_s: float = 0.0) -> list[Event]:
            async with self._changed:
                self._acted_on = self._delivered
                self._changed.notify_all()
            events = await super().drain(wait_s)
            self._delivered += len(events)
            return events

    return Patient


class Gang:
    """A gang at work, and its mailbox: trains lease after lease, whatever is done to it.

    What a test does about a start, a step, a checkpoint or a note is done before the worker that told of it trains on.
    """

    def __init__(self, shape: GangShape, scratch: Path | None = None) -> None:
        self._began = time.monotonic()
        self.start_s: float | None = None
        """Seconds from nothing to the first run: processes, imports, the base."""
        self.name = f"test-{uuid4().hex[:8]}"
        self.box = create(self.name, patient())
        self._pool = ThreadPoolExecutor(1)
        notes = str(scratch) if scratch else None
        self._run: Future[None] = self._pool.submit(run_gang, self.name, shape, notes)

    def train(self, lease: Lease, act: Act = lambda event, story: None) -> Story:
        """Train a lease to its end; `act` is told of every event when it comes."""
        number, story, until = self.box.post(lease), Story(), time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            assert not self._run.done(), self._run.exception()
            for event in self.box.drain(wait_s=0.05):
                if event.lease == number:
                    if event.kind == "started" and self.start_s is None:
                        self.start_s = time.monotonic() - self._began
                    story.add(event)
                    act(event, story)
                    if event.kind in ("published", "failed"):
                        return story
        raise TimeoutError([event for _, event in story.events if event.kind != "step"])

    def restarts_within(self) -> float:
        """Seconds: a start took so long, and the machine may be busier since; what we add to it is little."""
        assert self.start_s is not None
        return 30 + 4 * self.start_s

    def close(self) -> None:
        self.box.stop()
        self._run.result(timeout=60)
        self.box.close()
        self._pool.shutdown()


@pytest.fixture(scope="session")
def make_gang() -> type[Gang]:
    """Gangs of a shape, in the Ray session that is open."""
    return Gang


@pytest.fixture(scope="module")
def make_lease(tiny_base: Path) -> Callable[..., Lease]:
    """A full run of 40 steps with a checkpoint every 10, on the tiny base: 3 photos, `class_rows` class images.

    One class image may be `spoilt`.
    """
    info = open_base(str(tiny_base))
    tokenizer = load_tokenizer(info)
    ids = token_ids(tokenizer, ["a photo of a zwx dog", "a photo of a dog"], info.token_limit).tolist()

    def block(seed: int, rows: int, spoilt: int | None = None) -> Any:
        mean = np.random.default_rng(seed).standard_normal((rows, 4, 8, 8), dtype=np.float32)
        if spoilt is not None:
            mean[spoilt] = np.nan
        return put({"mean": mean, "std": np.full_like(mean, 0.1)})

    def make(name: str, root: str, class_rows: int = 5, spoilt: int | None = None, **sections: Any) -> Lease:
        train = {"method": "full", "steps": STEPS, "lr": 1e-4, "pairs_per_step": 2}
        text = {"train": True, "lr": 1e-5}
        described = {
            "subject": {"name": name, "class": "dog", "images": ["x"]},
            "checkpoint": {"every": EVERY, **sections.pop("checkpoint", {})},
            "validate": {"every": 0},
            "train": {**train, "text_encoder": text, **sections.pop("train", {})},
            **sections,
        }
        run = Run.model_validate(described)
        return Lease(
            run=run.model_dump(mode="json", by_alias=True),
            name=name,
            version="v1",
            base_model=info.model,
            base_revision=info.revision,
            storage_uri=root,
            subject_latents=[block(1, 3)],
            class_latents=[block(2, class_rows, spoilt)],
            subject_ids=ids[0],
            class_ids=ids[1],
            identity={
                "identifier": "zwx",
                "class_noun": "dog",
                "template": "a {identifier} {class}",
                "token_ids": [1],
            },
            meta={"fingerprint": f"{name}-f", "subject_names": ["one.png", "two.png", "three.png"]},
        )

    return make


@pytest.fixture(scope="session")
def weights() -> Callable[[Storage, str], dict[str, str]]:
    """Tells the sha256 of every file of an artifact."""

    def of(storage: Storage, name: str) -> dict[str, str]:
        with open_artifact(storage, name, "v1") as artifact:
            return {file: entry["sha256"] for file, entry in artifact.manifest["files"].items()}

    return of


@pytest.fixture(scope="session")
def workers() -> Callable[..., list[int]]:
    """Tells the process ids of the training workers below a process, this one by default."""

    def find(of: int = os.getpid()) -> list[int]:
        parents = {pid: parent for pid, parent, _ in _processes()}
        mine = [pid for pid, _, title in _processes() if "RayTrainWorker" in title]
        return [pid for pid in mine if of in _ancestors(pid, parents)]

    return find


def _processes() -> Iterable[tuple[int, int, str]]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes().decode(errors="replace")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        yield int(folder.name), parent, title


def _ancestors(pid: int, parents: dict[int, int]) -> list[int]:
    line = []
    while pid in parents:
        pid = parents[pid]
        line.append(pid)
    return line
