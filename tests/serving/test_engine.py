"""The engine draws what it is asked for, each image as if alone, and lets go of what nobody wants."""

import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import init_empty_weights

from cluster.errors import SystemFailure, UserError
from cluster.storage import Storage
from serving.engine import Engine, EngineSettings
from serving.protocol import DeadlinePassed, Draining, Drawn, ImageOrder, Joined, QueueFull, Stepped
from training.artifact import open_artifact
from training.draw import Drawer
from training.imports import loading
from training.pipeline import BaseInfo, open_base
from training.png import decode_png, png_parameters
from training.prompt import render_prompt
from training.request import DrawRequest

PROMPT = "a photo of {subject} on the beach"
LONG = 900  # steps that no test waits for
WAIT_S = 60.0


@pytest.fixture
def base(tiny_base: Path) -> BaseInfo:
    return open_base(str(tiny_base))


Make = Callable[..., Engine]


@pytest.fixture
def engine_of(base: BaseInfo) -> Iterator[Make]:
    """Makes engines that end with the test."""
    engines: list[Engine] = []

    def make(storage: Storage | None, of: BaseInfo = base, **settings: Any) -> Engine:
        engines.append(Engine(of, storage, "cpu", settings=EngineSettings(**settings)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


class Asked:
    """One image and what was said of it."""

    def __init__(self, engine: Engine, id: str, subject: str, request: DrawRequest, **order: Any) -> None:
        self.engine, self.id = engine, id
        self.said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.steps: list[int] = []
        version = "" if subject == "base" else "v1"
        order_ = ImageOrder(id, subject, version, request, progress=True, **order)
        self.ticket = engine.submit(order_, self.said.put)

    def until(self, kind: type[Any]) -> Any:
        """The first event of a kind; raises what goes wrong."""
        while True:
            event = self.said.get(timeout=WAIT_S)
            if isinstance(event, Stepped):
                self.steps.append(event.step)
            if isinstance(event, kind):
                return event
            if isinstance(event, Exception):
                raise event


MIXED = [
    ("lora", DrawRequest(PROMPT, 7, steps=5)),
    ("wide", DrawRequest(PROMPT, 8, "snow", steps=3, guidance=3.0, sampler="euler")),
    ("base", DrawRequest("a red clock", 9, steps=4, guidance=1.0)),
    ("token", DrawRequest(PROMPT, 16, steps=4)),
    ("full", DrawRequest(PROMPT, 12, steps=12)),
    ("text", DrawRequest(PROMPT, 10, steps=6, guidance=2.0, sampler="dpm++2m")),
    ("lora2", DrawRequest("{class} in the snow", 11, steps=4, guidance=1.0, eta=1.0)),
    ("full2", DrawRequest(PROMPT, 13, steps=10, guidance=1.0)),
    ("token2", DrawRequest(PROMPT, 15, "a {subject}", steps=5, guidance=3.0)),
    ("lora", DrawRequest(PROMPT, 14, steps=2, height=32, width=16)),
]


def drawn_alone(base: BaseInfo, storage: Storage, subject: str, request: DrawRequest) -> Any:
    if subject == "base":
        return Drawer(base, device="cpu").draw([request])[0]
    with open_artifact(storage, subject, "v1") as artifact:
        who = artifact.identity
        words = render_prompt(request.prompt, who.class_noun, who.identifier, who.template)
        drawer = Drawer(base, artifact.folder, artifact.manifest, device="cpu")
        return drawer.draw([DrawRequest(**{**vars(request), "prompt": words})])[0]


def test_subjects_methods_sizes_and_samplers_together_come_out_as_alone(
    engine_of: Make, zoo: Storage, base: BaseInfo
) -> None:
    engine = engine_of(zoo)
    asked = [Asked(engine, str(i), name, request) for i, (name, request) in enumerate(MIXED)]
    for one, (name, request) in zip(asked, MIXED, strict=True):
        drawn = one.until(Drawn)
        assert (decode_png(drawn.png) == drawn_alone(base, zoo, name, request)).all(), name
        assert one.steps == list(range(1, request.steps + 1))
        told = png_parameters(drawn.png)
        assert told["subject"] == ("base" if name == "base" else f"{name}-v1")
        assert ("artifact" in told) == (name != "base") and told["seed"] == request.seed
    stats = engine.stats()
    assert (stats["images"], stats["running"], stats["waiting"]) == (len(MIXED), 0, 0)
    assert stats["steps"] == sum(request.steps for _, request in MIXED)
    assert (stats["subjects"], stats["cache_hits"] + stats["cache_misses"]) == (8, 9)


def test_new_tokens_wait_while_another_thread_loads_a_model(
    engine_of: Make, zoo: Storage, base: BaseInfo
) -> None:
    request = DrawRequest(PROMPT, 7, steps=2)
    engine = engine_of(zoo)
    with loading(), init_empty_weights():  # as diffusers loads: modules of all threads come out empty
        asked = Asked(engine, "a", "token", request)
        time.sleep(0.5)
    assert (decode_png(asked.until(Drawn).png) == drawn_alone(base, zoo, "token", request)).all()


OF_THE_BASE = [
    DrawRequest("a dog in snow", 1, steps=4, guidance=5.0),
    DrawRequest("a dog in snow", 1, "snow", steps=3, guidance=5.0, sampler="euler"),
    DrawRequest("a cat", 2, steps=2, guidance=1.0),
    DrawRequest("a cat", 3, steps=2, guidance=5.0, height=24, width=16),
]


def test_images_of_an_sdxl_together_come_out_as_alone(engine_of: Make, tiny_sdxl: Path) -> None:
    sdxl = open_base(str(tiny_sdxl))
    engine = engine_of(None, of=sdxl)
    asked = [Asked(engine, str(i), "base", request) for i, request in enumerate(OF_THE_BASE)]
    for one, request in zip(asked, OF_THE_BASE, strict=True):
        assert (decode_png(one.until(Drawn).png) == Drawer(sdxl, device="cpu").draw([request])[0]).all()


def test_images_of_an_sd3_together_come_out_as_alone(engine_of: Make, tiny_sd3: Path) -> None:
    sd3 = open_base(str(tiny_sd3))
    engine = engine_of(None, of=sd3)
    asked = [Asked(engine, str(i), "base", request) for i, request in enumerate(OF_THE_BASE)]
    for one, request in zip(asked, OF_THE_BASE, strict=True):
        drawn = one.until(Drawn)
        assert (decode_png(drawn.png) == Drawer(sd3, device="cpu").draw([request])[0]).all()
        assert drawn.facts["sampler"] == "euler"  # the base's own, where none was named
    refused = Asked(engine, "no", "base", DrawRequest("a dog", 1, sampler="ddim"))
    with pytest.raises(UserError, match="flow matching"):
        refused.until(Drawn)


def test_a_row_joins_a_batch_that_is_under_way(engine_of: Make, zoo: Storage) -> None:
    engine = engine_of(zoo)
    long = Asked(engine, "long", "lora", DrawRequest(PROMPT, 1, steps=LONG))
    long.until(Joined)
    Asked(engine, "short", "wide", DrawRequest(PROMPT, 2, steps=2)).until(Drawn)
    assert engine.stats()["running"] == 1
    engine.cancel(long.ticket)


def test_a_full_queue_says_so_and_when_to_come_again(engine_of: Make) -> None:
    engine = engine_of(None, max_waiting=1)
    width = 4
    asked = [Asked(engine, str(i), "base", DrawRequest("a dog", i, steps=LONG)) for i in range(width + 1)]
    asked[0].until(Stepped)
    with pytest.raises(QueueFull) as refused:
        Asked(engine, "more", "base", DrawRequest("a dog", 9))
    assert refused.value.retry_after_s >= 1
    engine.cancel(asked[0].ticket)
    asked[-1].until(Joined)
    Asked(engine, "again", "base", DrawRequest("a dog", 9))


def test_a_cancelled_row_takes_part_in_no_further_step(engine_of: Make) -> None:
    engine = engine_of(None)
    asked = Asked(engine, "a", "base", DrawRequest("a dog", 1, steps=LONG))
    asked.until(Stepped)
    engine.cancel(asked.ticket)
    Asked(engine, "b", "base", DrawRequest("a dog", 2, steps=3)).until(Drawn)
    stats = engine.stats()
    assert (stats["running"], stats["cancelled"]) == (0, 1) and stats["steps"] < LONG


@pytest.mark.parametrize("subject", ["base", "lora"])
def test_an_image_that_is_late_is_given_up(engine_of: Make, zoo: Storage, subject: str) -> None:
    engine = engine_of(zoo)
    asked = Asked(engine, "a", subject, DrawRequest("a dog", 1, steps=LONG), deadline_s=0.3)
    with pytest.raises(DeadlinePassed, match=r"of 900 steps"):
        asked.until(Drawn)
    assert engine.stats()["expired"] == 1 and engine.stats()["running"] == 0


def test_a_deadline_also_ends_one_whose_subject_is_not_read_yet(
    engine_of: Make, zoo: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, may = engine_of(zoo), threading.Event()
    read = engine._studio.read
    monkeypatch.setattr(engine._wardrobe, "_read", lambda *args: may.wait(WAIT_S) and read(*args))
    asked = Asked(engine, "a", "lora", DrawRequest(PROMPT, 1, steps=3), deadline_s=0.1)
    with pytest.raises(DeadlinePassed, match="0 of 3"):
        asked.until(Drawn)
    may.set()
    Asked(engine, "b", "lora", DrawRequest(PROMPT, 1, steps=3)).until(Drawn)


def test_previews_show_what_the_image_is_becoming(engine_of: Make) -> None:
    asked = Asked(engine_of(None), "a", "base", DrawRequest("a dog", 1, steps=6), preview_every=2)
    previews: list[bytes] = []
    while not isinstance(event := asked.said.get(timeout=WAIT_S), Drawn):
        if isinstance(event, Stepped):
            previews.append(event.preview)
    assert [bool(preview) for preview in previews] == [False, True, False, True, False, False]
    assert all(decode_png(preview).shape == (16, 16, 3) for preview in previews if preview)


@pytest.mark.parametrize(
    ("subject", "request_", "said"),
    [
        ("base", DrawRequest("a dog " * 40, 1), "too long"),
        ("base", DrawRequest("{subject}", 1), "no subject"),
        ("base", DrawRequest("a dog", 1, steps=5000), "1 to 1000"),
        ("lora", DrawRequest("{thing}", 1), "braces"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_the_reason(
    engine_of: Make, zoo: Storage, subject: str, request_: DrawRequest, said: str
) -> None:
    engine = engine_of(zoo)
    with pytest.raises(UserError, match=said):
        Asked(engine, "a", subject, request_).until(Drawn)
    Asked(engine, "b", "base", DrawRequest("a dog", 1, steps=2)).until(Drawn)
    assert engine.stats()["waiting"] == 0


def test_a_damaged_artifact_fails_alone(
    engine_of: Make, storage: Storage, published: Callable[..., None]
) -> None:
    published("rex")
    published("tom")
    file = next(Path(storage.full("artifacts/rex/v1")).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    engine = engine_of(storage)
    bad = Asked(engine, "a", "rex", DrawRequest(PROMPT, 1, steps=3))
    good = Asked(engine, "b", "tom", DrawRequest(PROMPT, 1, steps=3))
    good.until(Drawn)
    with pytest.raises(SystemFailure, match="damaged"):
        bad.until(Drawn)


def test_a_deleted_subject_is_gone_and_one_trained_anew_is_drawn_anew(
    engine_of: Make, storage: Storage, published: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.subjects.LOOK_S", 0.02)
    published("rex")
    engine = engine_of(storage)
    first = Asked(engine, "a", "rex", DrawRequest(PROMPT, 1, steps=3)).until(Drawn)
    shutil.rmtree(storage.full("artifacts/rex"))
    until = time.monotonic() + WAIT_S
    while engine.resident():
        assert time.monotonic() < until
        time.sleep(0.01)
    with pytest.raises(SystemFailure, match="missing"):
        Asked(engine, "b", "rex", DrawRequest(PROMPT, 1, steps=3)).until(Drawn)
    published("tom", "full", "v1")
    shutil.move(storage.full("artifacts/tom"), storage.full("artifacts/rex"))
    again = Asked(engine, "c", "rex", DrawRequest(PROMPT, 1, steps=3)).until(Drawn)
    assert again.png != first.png


def test_a_step_that_fails_fails_its_rows_and_nothing_else(
    engine_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(None)
    step, broken = engine._studio.step, threading.Event()

    def fails_once(rows: Any) -> None:
        if not broken.is_set():
            broken.set()
            raise MemoryError("out of memory")
        step(rows)

    monkeypatch.setattr(engine._studio, "step", fails_once)
    with pytest.raises(SystemFailure, match="out of memory"):
        Asked(engine, "a", "base", DrawRequest("a dog", 1, steps=3)).until(Drawn)
    Asked(engine, "b", "base", DrawRequest("a dog", 1, steps=3)).until(Drawn)
    assert engine.healthy


def test_a_draining_engine_ends_what_it_took_and_takes_nothing_new(engine_of: Make) -> None:
    engine = engine_of(None)
    asked = Asked(engine, "a", "base", DrawRequest("a dog", 1, steps=20))
    engine.drain()
    with pytest.raises(Draining):
        Asked(engine, "b", "base", DrawRequest("a dog", 1))
    asked.until(Drawn)


def test_a_closed_engine_leaves_nobody_waiting(engine_of: Make) -> None:
    engine = engine_of(None)
    asked = [Asked(engine, str(i), "base", DrawRequest("a dog", i, steps=LONG)) for i in range(6)]
    asked[0].until(Stepped)
    engine.close()
    for one in asked:
        with pytest.raises(Draining):
            one.until(Drawn)


def test_subjects_beyond_the_memory_take_turns(engine_of: Make, zoo: Storage) -> None:
    engine = engine_of(zoo, cache_bytes=1)
    names = ("lora", "full", "lora2", "full2", "wide", "text")
    asked = [Asked(engine, name, name, DrawRequest(PROMPT, 1, steps=4)) for name in names]
    for one in asked:
        one.until(Drawn)
    assert engine.stats()["subjects"] <= 1 and engine.stats()["cache_evictions"] >= len(names) - 1


def test_an_order_that_is_asked_twice_is_drawn_twice(engine_of: Make) -> None:
    engine = engine_of(None)
    asked = [Asked(engine, "same", "base", DrawRequest("a dog", 1, steps=4)) for _ in range(2)]
    engine.cancel(asked[0].ticket)
    assert asked[1].until(Drawn) and engine.healthy


def test_who_was_taken_when_the_engine_ends_is_told(engine_of: Make) -> None:
    engine = engine_of(None)
    held = threading.Event()
    engine._inbox.put(
        lambda: held.wait(WAIT_S) and None
    )  # the thread is busy, what comes now stays in the inbox
    asked = Asked(engine, "a", "base", DrawRequest("a dog", 1))
    engine._closed.set()
    held.set()
    with pytest.raises(Draining):
        asked.until(Drawn)
