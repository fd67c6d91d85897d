"""This file is where the ingress's tests get their parts: an artist that draws, subjects to draw, a server to ask."""

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from torch import nn

from cluster.registry import Registry
from cluster.storage import Storage
from serving.ingress import create_app
from serving.keys import Keys
from serving.protocol import PRISTINE, Drawn, Event, ImageOrder, Joined, QueueFull, Stepped
from serving.settings import ServingSettings
from serving.tenancy import stored_name
from training.artifact import (
    Identity,
    artifact_meta,
    artifact_path,
    open_artifact,
    write_weights,
)
from training.draw import Drawer
from training.lora import attach
from training.new_tokens import grow, started
from training.pipeline import BaseInfo, end_id, load_text_encoder, load_tokenizer, load_unet, open_base
from training.png import encode_png
from training.prompt import render_prompt
from training.recipe import Run

WAIT_S = 60.0  # for what another thread is about to do, on a busy machine


class GaveUp(Exception):
    """An image is not wanted any more."""


class DrawerArtist:
    """An artist over training's drawer: one image after the other, in a thread.

    Tests may hold its hand at a step, and read what became of each order.
    """

    def __init__(self, storage: Storage, drawer: Drawer) -> None:
        self.storage, self.drawer = storage, drawer
        self.held_at: int | None = None
        self.goes_on, self.is_held = threading.Event(), threading.Event()
        self.ended = threading.Condition()
        self.outcomes: dict[str, str] = {}
        self.orders: list[ImageOrder] = []
        self.room, self.retry_after_s, self.refused = 100, 3.0, threading.Event()
        self._one = threading.Lock()

    def hold(self, step: int) -> None:
        """From here on wait at a step until `goes_on` is set."""
        self.held_at = step
        self.goes_on.clear()
        self.is_held.clear()

    def release(self) -> None:
        """Go on."""
        self.held_at = None
        self.goes_on.set()

    def outcome(self, prefix: str = "") -> dict[str, str]:
        """What became of the orders, once all that were taken have ended."""
        with self.ended:
            assert self.ended.wait_for(lambda: len(self.outcomes) == len(self.orders), WAIT_S)
            return {key: value for key, value in self.outcomes.items() if key.startswith(prefix)}

    async def draw(self, order: ImageOrder) -> AsyncIterator[Event]:
        if len(self.orders) - len(self.outcomes) >= self.room:
            self.refused.set()
            raise QueueFull(self.room, self.retry_after_s)
        loop = asyncio.get_running_loop()
        said: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        given_up = threading.Event()
        self.orders.append(order)

        def tell(event: Event | BaseException) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(said.put_nowait, event)

        threading.Thread(target=self._draw, args=(order, tell, given_up), daemon=True).start()
        try:
            while True:
                event = await said.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, Drawn):
                    return
        finally:
            given_up.set()

    def _draw(
        self, order: ImageOrder, tell: Callable[[Event | BaseException], None], given_up: threading.Event
    ) -> None:
        outcome = "failed"
        try:
            with self._one:
                tell(Joined(0.0))
                tell(self._drawn(order, tell, given_up))
            outcome = "drawn"
        except GaveUp:
            outcome = "given up"
        except Exception as error:
            tell(error)
        finally:
            with self.ended:
                self.outcomes[order.id] = outcome
                self.ended.notify_all()

    def _drawn(self, order: ImageOrder, tell: Callable[[Event], None], given_up: threading.Event) -> Drawn:
        def step(done: int, steps: int) -> None:
            if self.held_at == done:
                self.is_held.set()
                while not given_up.is_set() and not self.goes_on.wait(0.01):
                    pass
            if given_up.is_set():
                raise GaveUp
            preview = b""
            if order.preview_every and done % order.preview_every == 0 and done < steps:
                preview = encode_png(torch.zeros(4, 4, 3, dtype=torch.uint8).numpy(), None)
            tell(Stepped(done, steps, preview))

        if given_up.is_set():
            raise GaveUp
        if order.subject == PRISTINE:
            self.drawer.wear(None)
            words = render_prompt(order.request.prompt, "", None)
            return self._png(order, words, step)
        with open_artifact(self.storage, order.subject, order.version) as artifact:
            self.drawer.wear(artifact.folder, artifact.manifest)
            who = artifact.identity
            words = render_prompt(order.request.prompt, who.class_noun, who.identifier, who.template)
            return self._png(order, words, step)

    def _png(self, order: ImageOrder, words: str, step: Callable[[int, int], None]) -> Drawn:
        request = type(order.request)(**{**vars(order.request), "prompt": words})
        [image] = self.drawer.draw([request], step)
        facts = request.parameters(order.subject, self.drawer.base.revision)
        return Drawn(encode_png(image, facts), facts)

    async def stats(self) -> Mapping[str, float]:
        return {"rows_running": float(len(self.orders) - len(self.outcomes))}


@pytest.fixture(scope="session")
def base(tiny_base: Path) -> BaseInfo:
    """The tiny base, open."""
    return open_base(str(tiny_base))


@pytest.fixture(scope="session")
def shelf(base: BaseInfo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to copy: a storage root with `rex` of the operator and `tom` of the tenant `acme`."""
    root, scratch = tmp_path_factory.mktemp("shelf"), tmp_path_factory.mktemp("scratch")
    for tenant, name in (("default", "rex"), ("acme", "tom")):
        register_kind(Storage(str(root)), base.path, scratch / name, stored_name(tenant, name), "lora", "v1")
    return root


@pytest.fixture
def subjects(storage: Storage, shelf: Path) -> Storage:
    """A storage root with `rex` of the operator and `tom` of the tenant `acme`."""
    shutil.copytree(shelf, storage.uri, dirs_exist_ok=True)
    return storage


@pytest.fixture(scope="session")
def drawer(base: BaseInfo) -> Drawer:
    """What draws with the tiny base."""
    return Drawer(base)


@pytest.fixture
def artist(subjects: Storage, drawer: Drawer) -> Iterator[DrawerArtist]:
    """Who draws them."""
    artist = DrawerArtist(subjects, drawer)
    yield artist
    artist.release()


class Time:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Time:
    """Seconds since the epoch, which pass when a test says so."""
    return Time()


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """A real server on a free port of the loopback; its address."""
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="error", lifespan="on", timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    ready = threading.Event()
    startup = server.startup

    async def started(sockets: Any = None) -> None:
        await startup(sockets)
        ready.set()

    server.startup = started  # type: ignore[method-assign]
    thread.start()
    assert ready.wait(WAIT_S)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive()


SETTINGS = {"sizes": ("16x16",), "catalog_s": 0}


def settings_for(base: BaseInfo, **more: Any) -> ServingSettings:
    """Settings for the tiny base."""
    return ServingSettings.model_validate({"base": base.model, **SETTINGS, **more})


class Clients:
    """Clients of a server, by tenant and scope."""

    def __init__(self, address: str, keys: Keys, stop: Callable[[], None]) -> None:
        self.address, self.keys, self.stop = address, keys, stop
        self._opened: list[httpx2.Client] = []

    def of(self, tenant: str = "default", **key: Any) -> httpx2.Client:
        """A client with a new key."""
        _, token = self.keys.create("test", tenant, **key)
        return self.with_token(token)

    def with_token(self, token: str | None) -> httpx2.Client:
        """A client with a token, or without any."""
        headers = {"authorization": f"Bearer {token}"} if token else {}
        client = httpx2.Client(base_url=self.address, headers=headers, timeout=WAIT_S, trust_env=False)
        self._opened.append(client)
        return client

    def close(self) -> None:
        """Close all of them."""
        for client in self._opened:
            client.close()


Serve = Callable[..., Clients]


@pytest.fixture
def serve(subjects: Storage, artist: DrawerArtist, base: BaseInfo, clock: Time) -> Iterator[Serve]:
    """Starts an ingress over the subjects, with settings; gives its clients."""
    with ExitStack() as stack:

        def start(*, trainer: Any = None, eraser: Any = None, **settings: Any) -> Clients:
            app = create_app(settings_for(base, **settings), subjects, artist, trainer, eraser, clock)
            inner = stack.enter_context(ExitStack())
            clients = Clients(inner.enter_context(serving(app)), Keys(subjects, clock), inner.close)
            inner.callback(clients.close)
            return clients

        yield start


@pytest.fixture
def clients(serve: Serve) -> Clients:
    """Clients of an ingress over the subjects."""
    return serve()


@pytest.fixture
def publish(subjects: Storage, base: BaseInfo, tmp_path: Path) -> Callable[[str, str], None]:
    """Registers another version."""
    return lambda name, version: register_kind(
        subjects, base.path, tmp_path / f"{name}-{version}", name, "lora", version
    )


# -- subjects of every kind, for the engine --------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "lora": {"rank": 4}},
    "wide": {"method": "lora", "lora": {"rank": 20}},
    "text": {"method": "lora", "lora": {"rank": 4}, "text_encoder": {"train": True}},
    "full": {"method": "full"},
    "token": {"method": "lora", "lora": {"rank": 4}, "new_tokens": {"count": 2}},
}
Publish = Callable[..., None]
"""Registers a subject: its name, its kind, its version (`v1`)."""


def register_kind(
    storage: Storage, base_folder: Path, scratch: Path, name: str, kind: str, version: str
) -> None:
    """A version as if trained: its weights are moved far enough that the picture changes."""
    base = open_base(str(base_folder))
    run = Run.model_validate(
        {
            "base": {"model": str(base_folder)},
            "subject": {"name": name, "class": "dog", "images": ["photos"]},
            "train": KINDS[kind],
        }
    )
    unet, text_encoder = load_unet(base), load_text_encoder(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum((name + version).encode()))
        if kind == "full":
            for p in (*unet.parameters(), *text_encoder.parameters()):
                p.data.add_(torch.randn_like(p), alpha=0.02)
        else:
            attach(unet, text_encoder, run.train.lora, run.train.text_encoder.train, seed=0)
            if run.train.new_tokens.count:
                start = started(text_encoder, "<zwx>", [97], run.train.new_tokens.count)
                grow(text_encoder, start, end_id(load_tokenizer(base)))
            for p in (p for m in (unet, text_encoder) for p in m.parameters() if p.requires_grad):
                nn.init.normal_(p, std=0.3)
    write_weights(base, run, unet, text_encoder, scratch)
    template, vocabulary = "a {identifier} {class}", len(load_tokenizer(base))
    own = tuple(range(vocabulary, vocabulary + run.train.new_tokens.count))
    identity = Identity("<zwx>" if own else "zwx", "dog", template, own or (97,), (97,) if own else ())
    storage.publish(scratch, artifact_path(name, version), artifact_meta(base, run, identity, "f", None, {}))
    Registry(storage).add(
        name, version, {"artifact": artifact_path(name, version), "fingerprint": version, "class": "dog"}
    )


@pytest.fixture
def published(storage: Storage, tiny_base: Path, tmp_path: Path) -> Publish:
    """Registers subjects in `storage`."""

    def register(name: str, kind: str = "lora", version: str = "v1") -> None:
        register_kind(storage, tiny_base, tmp_path / f"{name}-{version}", name, kind, version)

    return register


@pytest.fixture(scope="module")
def zoo(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A storage root with a subject of every kind, named as its kind, and second ones, `lora2`; not to be changed."""
    folder = tmp_path_factory.mktemp("zoo")
    storage = Storage(str(folder / "storage"))
    for kind in KINDS:
        register_kind(storage, tiny_base, folder / kind, kind, kind, "v1")
    for kind in ("lora", "full", "token"):
        register_kind(storage, tiny_base, folder / f"{kind}2", f"{kind}2", kind, "v1")
    return storage
