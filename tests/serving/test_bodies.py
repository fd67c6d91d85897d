"""A small body goes beside its request's head, and whoever does not know of that notices nothing."""

import asyncio
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from serving.bodies import CARRIED, CARRIED_BYTES, Carrier, middlewares, unpacked

GONE: Message = {"type": "http.disconnect"}


def part(body: bytes, more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


def sent(
    headers: Mapping[str, str], messages: Sequence[Message], kind: str = "http"
) -> tuple[Scope, list[Message]] | None:
    """The scope that what is behind the carrier gets, and all that it receives; `None` if it is not called."""
    found: list[tuple[Scope, list[Message]]] = []
    left = list(messages)

    async def receive() -> Message:
        return left.pop(0)

    async def behind(scope: Scope, receive: Receive, send: Send) -> None:
        found.append((scope, [await receive() for _ in range(len(left) + (CARRIED in scope))]))

    async def send(_: Message) -> None: ...

    scope = {"type": kind, "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}
    asyncio.run(Carrier(behind)(scope, receive, send))
    return found[0] if found else None


def test_a_small_body_is_carried_and_received_once_and_then_the_client_leaves() -> None:
    found = sent({"content-length": "6"}, [part(b"abc", more=True), part(b"def"), GONE])
    assert found is not None
    scope, received = found
    assert scope[CARRIED] == b"abcdef" and received == [part(b"abcdef"), GONE]


def test_a_request_without_a_body_carries_an_empty_one() -> None:
    found = sent({}, [part(b""), GONE])
    assert found is not None
    scope, received = found
    assert scope[CARRIED] == b"" and received == [part(b""), GONE]


@pytest.mark.parametrize(
    ("headers", "kind"),
    [
        ({"content-length": str(CARRIED_BYTES + 1)}, "http"),
        ({"transfer-encoding": "chunked"}, "http"),
        ({"content-length": "many"}, "http"),
        ({}, "websocket"),
    ],
)
def test_what_may_be_large_or_is_no_request_is_left_as_it_is(headers: dict[str, str], kind: str) -> None:
    messages = [part(b"a", more=True), part(b"b"), GONE]
    found = sent(headers, messages, kind)
    assert found is not None
    scope, received = found
    assert CARRIED not in scope and received == messages


def test_a_client_that_leaves_before_its_body_is_there_is_answered_nothing() -> None:
    assert sent({"content-length": "6"}, [part(b"abc", more=True), GONE]) is None


def ray_receive(scope: Scope, asked: list[str]) -> Any:
    """What Ray Serve gives to an application behind its proxy."""
    from ray.serve._private.http_util import ASGIReceiveProxy

    async def ask(_: Any) -> bytes:
        asked.append("the proxy")
        return pickle.dumps([part(b"from the proxy"), GONE])

    return ASGIReceiveProxy(scope, None, ask)  # type: ignore[arg-type]


def received(scope: Scope, number: int) -> tuple[list[Message], list[str]]:
    """What an application receives when Serve calls it, and whom it asks for that."""

    async def serve() -> tuple[list[Message], list[str]]:
        asked: list[str] = []
        receive = ray_receive(scope, asked)
        fetching = asyncio.create_task(receive.fetch_until_disconnect())  # as Serve does, before the call
        app = unpacked(scope, receive)
        messages = [await app() for _ in range(number)]
        await asyncio.sleep(0)
        fetching.cancel()
        return messages, asked

    return asyncio.run(serve())


def test_a_body_that_came_along_is_asked_of_nobody() -> None:
    assert received({"type": "http", CARRIED: b"abc"}, 1) == ([part(b"abc")], [])


def test_a_body_that_did_not_is_asked_of_the_proxy() -> None:
    assert received({"type": "http"}, 2) == ([part(b"from the proxy"), GONE], ["the proxy"])


def test_another_server_is_received_from_as_ever_though_it_has_a_carrier_too() -> None:
    async def receive() -> Message:
        return GONE

    scope: Scope = {"type": "http", CARRIED: b"abc"}
    assert unpacked(scope, receive) is receive and CARRIED not in scope


def test_serve_takes_what_it_is_to_put_before_its_proxies() -> None:
    from ray.serve._private.http_util import validate_http_proxy_callback_return

    assert [one.cls for one in validate_http_proxy_callback_return(middlewares())] == [Carrier]
