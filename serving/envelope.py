"""This file is where every request gets an id, a line in the log and a bound on its body, and every crash an answer."""

import json
import logging
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.answers import ApiError, answer_of
from serving.metrics import Metrics
from serving.painting import ClientGone

ACCESS = logging.getLogger("raybooth.access")
LOG = logging.getLogger("raybooth.serving")
GONE = 499  # what nginx calls a client that left before its answer

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def inner_path(scope: Scope) -> str:
    """The path of a request, without what the application is mounted under."""
    path: str = scope.get("path", "")
    return path.removeprefix(scope.get("root_path", ""))


class Envelope:
    """The outermost ASGI middleware.

    Args:
        app: What is behind it.
        metrics: Counts.
        body_bytes: The largest body of a path.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        body_bytes: Callable[[str], int],
        clock: Callable[[], float],
    ) -> None:
        self._app, self._metrics, self._body_bytes, self._clock = app, metrics, body_bytes, clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        identity = given if _ID.fullmatch(given) else uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = identity
        began, sent = time.perf_counter(), {"status": 0, "bytes": 0}

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent["status"] = message["status"]
                found = MutableHeaders(scope=message)
                found["x-request-id"] = identity
                for name, value in state.get("headers", {}).items():
                    found[name] = value
            sent["bytes"] += len(message.get("body", b""))
            await send(message)

        try:
            await self._bounded(scope, receive, sending, headers)
        except ClientGone:
            sent["status"] = GONE
        except Exception as error:
            answer = answer_of(error)
            if answer.status >= 500:
                LOG.exception("request %s failed", identity)
            if not sent["status"]:
                await answer.response()(scope, receive, sending)
        finally:
            seconds = time.perf_counter() - began
            self._note(scope, sent["status"] or GONE, sent["bytes"], seconds)

    async def _bounded(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        """Hand the request on, with no more of its body than its path allows."""
        most, read = self._body_bytes(inner_path(scope)), 0
        said = f"the body is too large. At most {most} bytes are read. Send less, or in several requests"
        declared = headers.get("content-length", "0")
        if not declared.isdigit() or int(declared) > most:
            raise ApiError(413, said)

        async def receiving() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise HTTPException(413, said)  # the framework makes a 400 of any other kind
            return message

        await self._app(scope, receiving, send)

    def _note(self, scope: Scope, status: int, size: int, seconds: float) -> None:
        state = scope["state"]
        route = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.requests.labels(
            scope["method"] if route != "unmatched" else "", route, str(status)
        ).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        caller, client = state.get("caller"), scope.get("client")
        line: dict[str, Any] = {
            "at": datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds"),
            "request_id": state["request_id"],
            "method": scope["method"],
            "path": scope["path"],
            "route": route,
            "status": status,
            "ms": round(1000 * seconds, 1),
            "bytes": size,
            "tenant": caller.tenant if caller else None,
            "key": caller.prefix if caller else None,
            "client": client[0] if client else None,
        }
        ACCESS.info(json.dumps(line | state.get("log", {}), ensure_ascii=False))
