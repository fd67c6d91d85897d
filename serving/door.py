"""This file is where a request is let in: by its key, within its rate, and to what the key's scopes allow.

It stands before the application, so that nobody without a key has a body read or a path looked up.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope

from cluster.objects import StorageError
from serving.answers import ApiError, answer_of
from serving.envelope import inner_path
from serving.keys import SCOPES, Key, Keys, Scope
from serving.quota import Quota, Quotas, taken
from serving.settings import ServingSettings, is_loopback
from serving.tenancy import OPERATOR

GUARDED = "/v1/"
SIGNED = "/v1/outputs/"  # whoever has such a URL may read it; its signature is checked there

_BEARER = re.compile(r"bearer +(\S+) *", re.IGNORECASE)


@dataclass(frozen=True)
class Caller:
    """Who asks."""

    tenant: str
    scopes: tuple[Scope, ...]
    prefix: str
    """Of the key; `-` without one."""


class Door:
    """The ASGI middleware that lets requests in.

    Args:
        app: What is behind it.
        settings: Rates, and whether keys are asked for.
        keys: The keys.
        clock: Seconds since the epoch.
    """

    def __init__(
        self, app: ASGIApp, settings: ServingSettings, keys: Keys, clock: Callable[[], float]
    ) -> None:
        self._app, self._settings, self._keys, self._clock = app, settings, keys, clock
        self._quotas = Quotas()

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer 401, 403 or 429."""
        path = inner_path(scope)
        if scope["type"] != "http" or not path.startswith(GUARDED) or path.startswith(SIGNED):
            await self._app(scope, receive, send)
            return
        try:
            caller, quota = await self._identified(scope)
        except (ApiError, StorageError) as error:
            await answer_of(error).response()(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["caller"] = caller
        try:
            with taken(quota, self._clock()) as give_back:
                state["headers"] = quota.headers()
                await self._app(scope, receive, _before_the_end(send, give_back))
        except ApiError as error:  # of the quota: those of the application were answered there
            state["headers"] = quota.headers()
            await error.response()(scope, receive, send)

    async def _identified(self, scope: AsgiScope) -> tuple[Caller, Quota]:
        rates, now = self._settings.rates, self._clock()
        if self._settings.auth == "off":
            _check_here(scope)
            quota = self._quotas.of("-", rates.per_minute, rates.burst, rates.at_once, now)
            return Caller(OPERATOR, SCOPES, "-"), quota
        key = await self._key(Headers(scope=scope).get("authorization", ""))
        quota = self._quotas.of(
            key.id, key.per_minute or rates.per_minute, rates.burst, key.at_once or rates.at_once, now
        )
        return Caller(key.tenant, key.scopes, key.prefix), quota

    async def _key(self, header: str) -> Key:
        match = _BEARER.fullmatch(header)
        if match is None:
            raise ApiError(
                401, "there is no API key. Send it as `Authorization: Bearer rb_...`", "no_api_key"
            )
        token = match[1]
        if self._keys.is_held(token):
            key = self._keys.opened_by(token)
        else:
            key = await asyncio.to_thread(self._keys.opened_by, token)
        if key is None:
            said = (
                "the API key is not valid. It is mistyped, expired or revoked: ask the operator for another"
            )
            raise ApiError(401, said)
        return key


def _before_the_end(send: Send, call: Callable[[], None]) -> Send:
    """`send`, which calls before the answer's last part leaves: a client that has it may ask again at once."""

    async def told(message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            call()
        await send(message)

    return told


def _check_here(scope: AsgiScope) -> None:
    """Without keys, only this machine is served, and no web page that had its name resolved to this machine."""
    client, host = scope.get("client"), Headers(scope=scope).get("host", "")
    if (client and not is_loopback(client[0])) or not is_loopback(host):
        said = (
            f"keys are off, so that only this machine is served, by its loopback address, not {host[:64]!r}"
        )
        raise ApiError(403, said)


def caller_with(scope: Scope) -> Callable[..., Awaitable[Caller]]:
    """A dependency: who asks, who must have a scope.

    Args:
        scope: What is about to be done.
    """

    async def who(
        request: Request,
        _: Annotated[HTTPAuthorizationCredentials | None, Security(HTTPBearer(auto_error=False))] = None,
    ) -> Caller:
        caller: Caller = request.state.caller
        if scope not in caller.scopes:
            said = f"this key may not do that. It has the scopes {', '.join(caller.scopes) or 'none'}, not {scope}"
            raise ApiError(403, said, "missing_scope")
        return caller

    return who


ImagesCaller = Annotated[Caller, Depends(caller_with("images"))]
TrainingsCaller = Annotated[Caller, Depends(caller_with("trainings"))]
AdminCaller = Annotated[Caller, Depends(caller_with("admin"))]
