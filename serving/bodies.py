"""This file is where a small body goes from Serve's proxy to an ingress beside its request's head.

Serve hands an ingress the head, and the ingress asks the proxy for the body and then for the client's leaving: two
calls of an actor, which cost more than our own part of a request. What is small enough is read by the proxy first and
carried along, in the scope. That a client has left is heard all the same: Serve cancels what is done for it.

Where the proxy has no `Carrier` in front (see `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`) or the application is served
by something else, everything is as Serve has it.
"""

import asyncio
from typing import Any, NoReturn

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CARRIED_BYTES = 64 * 1024  # a prompt with all settings; photos are asked for, piece by piece
CARRIED = "raybooth.body"
ASKING = "_receive_asgi_messages"  # of what Serve 2.60 hands to an application: asks the proxy


def middlewares() -> list[Middleware]:
    """What a proxy of Serve has in front: called by it."""
    return [Middleware(Carrier)]


class Carrier:
    """The ASGI middleware of a proxy: reads a body that is small, and writes it into the scope.

    Args:
        app: The proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http" or not _is_small(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return  # it has left, and nobody waits for an answer
            body += message.get("body", b"")
            more = message.get("more_body", False)
        scope[CARRIED] = body
        await self._app(scope, _once(body, receive), send)


def unpacked(scope: Scope, receive: Receive) -> Receive:
    """The `receive` of an application that its server has just called; it asks no proxy, if the body is here.

    Args:
        scope: Of the request; the body leaves it.
        receive: The server's.
    """
    body = scope.pop(CARRIED, None)
    if body is None or not hasattr(receive, ASKING):
        return receive
    # Serve has made the task that asks, which begins when this one waits for the first time
    setattr(receive, ASKING, _nothing)
    return _once(body, _nothing)


def _is_small(headers: Headers) -> bool:
    size = headers.get("content-length", "0")
    return "transfer-encoding" not in headers and size.isdigit() and int(size) <= CARRIED_BYTES


def _once(body: bytes, then: Receive) -> Receive:
    """A `receive` that has the whole body, and afterwards what another one has."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return left.pop() if left else await then()

    return receive


async def _nothing(*_: Any) -> NoReturn:
    """Waits until it is cancelled."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError("nobody has this future")
