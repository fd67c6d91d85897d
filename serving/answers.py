"""This file is where it is decided how an error looks to a client: a status, and OpenAI's `{"error": {...}}`."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse

from cluster.errors import RayboothError, UserError
from cluster.objects import StorageError
from serving.protocol import DeadlinePassed, Draining, QueueFull, ReplicasLost
from serving.safety import SafetyUnavailable, Unsafe

DRAINING_RETRY_S = 1.0  # another replica is there already, or is being started
STORAGE_RETRY_S = 5.0

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
_CODES = {
    400: "bad_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "too_large",
    422: "invalid_value",
    429: "rate_limit_exceeded",
    500: "internal_error",
    503: "unavailable",
    504: "deadline_passed",
}


class ErrorDetail(BaseModel):
    """What went wrong."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    message: str
    """What happened, what was seen, what to do."""
    type: str
    """The kind of error."""
    param: str | None
    """The field that it is about, by its path."""
    code: str
    """For programs."""


class ErrorAnswer(BaseModel):
    """Every answer that is not a success."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer that is no success.

    Args:
        status: Of HTTP.
        message: For people.
        code: For programs; `None` takes the status's own.
        param: The field that it is about.
        retry_after_s: When to ask again.
        allow: The methods that the path knows, of a 405.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(status, message, code, param, retry_after_s, allow)
        self.status, self.message, self.param = status, message, param
        self.code = code or _CODES.get(status, "error")
        self.retry_after_s, self.allow = retry_after_s, allow

    def __str__(self) -> str:
        return self.message

    @property
    def headers(self) -> dict[str, str]:
        """What goes with it."""
        found = {"www-authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after_s is not None:
            found["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.allow:
            found["allow"] = self.allow
        return found

    def as_json(self) -> dict[str, Any]:
        """The body."""
        fallback = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _KINDS.get(self.status, fallback)
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code},
        }

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.as_json(), self.status, self.headers)

    def event(self) -> bytes:
        """The last of the server-sent events of an answer that had begun already."""
        return f"event: error\ndata: {json.dumps(self.as_json())}\n\n".encode()


def answer_of(error: BaseException) -> ApiError:
    """The answer to whoever asked for what ended in `error`. What is ours alone is not told in detail."""
    match error:
        case ApiError():
            return error
        case QueueFull():
            return ApiError(429, str(error), "queue_full", retry_after_s=error.retry_after_s)
        case DeadlinePassed():
            return ApiError(504, str(error), "deadline_passed")
        case SafetyUnavailable():
            return ApiError(503, str(error), "safety_unavailable", retry_after_s=DRAINING_RETRY_S)
        case Unsafe():
            return ApiError(422, str(error), "content_policy_violation", param="prompt")
        case Draining() | ReplicasLost():
            return ApiError(503, str(error), "draining", retry_after_s=DRAINING_RETRY_S)
        case UserError():
            return ApiError(422, str(error), "cannot_be_done")
        case StorageError():
            said = "the storage cannot be reached at the moment. Try again"
            return ApiError(503, said, "storage_unavailable", retry_after_s=STORAGE_RETRY_S)
        case RayboothError():
            return ApiError(500, f"{error.what}. Ask the operator, with the x-request-id of this answer")
    return ApiError(500, "something went wrong here. Ask the operator, with the x-request-id of this answer")


def invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The 422 for what pydantic found: the first mistake's field as `param`, all of them in the message."""
    found = [(_path(error["loc"]), error["msg"], error.get("input")) for error in errors]
    told = "; ".join(f"{path or 'the body'}: {said}{_seen(value)}" for path, said, value in found[:5])
    return ApiError(422, told, param=found[0][0] or None)


def _path(place: Sequence[Any]) -> str:
    return ".".join(str(part) for part in place if part not in ("body", "query", "path", "header"))


def _seen(value: Any) -> str:
    """What was given, where it is short enough to help."""
    shown = repr(value)
    return f", not {shown}" if value is not None and len(shown) <= 60 else ""


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for its `responses`, with those that any route with a key has."""
    about = {
        400: "The request cannot be understood",
        401: "No key, or one that is not valid",
        403: "The key has not the scope that this needs, or the address may not ask without a key",
        404: "There is no such thing, or it is another tenant's",
        405: "The path knows no such method",
        409: "It cannot be done as things stand",
        413: "The body is too large",
        422: "A field is not as it should be: `param` names it",
        429: "Too many requests, or the queue is full: ask again after Retry-After seconds",
        500: "Our fault",
        503: "Not at the moment: ask again after Retry-After seconds",
        504: "Not ready in time",
    }
    every = {401, 403, 405, 413, 422, 429, 500, 503, *statuses}
    return {
        status: {
            "model": ErrorAnswer,
            "description": about[status],
            **({"headers": {"Retry-After": _RETRY}} if status in (429, 503) else {}),
        }
        for status in sorted(every)
    }


_RETRY = {"description": "Seconds.", "schema": {"type": "integer"}}
