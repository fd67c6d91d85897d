"""This file is where it is decided what a client sees of a prediction."""

from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from serving.answers import ErrorDetail
from serving.outputs import Outputs
from serving.predictions import Prediction

Status = Literal["starting", "processing", "succeeded", "failed", "canceled"]


class _Answer(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class Links(_Answer):
    """What can be done with it."""

    get: str
    """To look at it."""
    cancel: str
    """To give it up, with POST."""


class PredictionAnswer(_Answer):
    """Images that nobody waits for."""

    id: str
    """Its name."""
    object: Literal["prediction"] = "prediction"
    """What this is."""
    model: str
    """As it was asked for."""
    version: str | None
    """What that was at the time; `null` of the base."""
    input: dict[str, Any]
    """What is drawn, with the seed that was picked."""
    status: Status
    """`starting` waits for its turn."""
    output: list[str] | None
    """URLs of its images, once it has succeeded, for anyone who has them, until `expires_at`."""
    error: ErrorDetail | None
    """Why it failed."""
    progress: dict[str, int] | None = None
    """`steps` done of `of`, where the process that draws it was asked."""
    metrics: dict[str, float]
    """Seconds: `predict_time` from the start, `total_time` from the request."""
    metadata: dict[str, str]
    """As given."""
    webhook: str | None
    """Whom it tells."""
    webhook_state: Literal["delivered", "given up"] | None
    """Whether the webhook has heard of the end."""
    created_at: str
    """ISO 8601, as the other times."""
    started_at: str | None
    """When it got its turn."""
    completed_at: str | None
    """When it ended."""
    expires_at: str
    """When it is removed, with its images."""
    urls: Links
    """What can be done with it."""


class PredictionsAnswer(_Answer):
    """A page of predictions."""

    object: Literal["list"] = "list"
    """What this is."""
    data: list[PredictionAnswer]
    """The newest first."""
    next: str | None
    """The cursor of the next page; `null` when there is none."""


def shown(prediction: Prediction, outputs: Outputs, steps: int | None = None) -> PredictionAnswer:
    """A prediction for its tenant.

    Args:
        prediction: What is on record.
        outputs: Signs the URLs of its images.
        steps: Done, where that is known.
    """
    output = None
    if prediction.status == "succeeded":
        places = map(prediction.image, range(prediction.count))
        output = [outputs.url(place, int(prediction.expires), prediction.address) for place in places]
    at, done = prediction.started, prediction.completed
    times = {"predict_time": at, "total_time": prediction.created}
    address = f"{prediction.address}/v1/predictions/{prediction.id}"
    whole = prediction.count * int(prediction.input["steps"])
    return PredictionAnswer(
        id=prediction.id,
        model=prediction.model,
        version=prediction.version or None,
        input=dict(prediction.input),
        status=prediction.status,
        output=output,
        error=ErrorDetail(**prediction.error) if prediction.error else None,
        progress={"steps": steps, "of": whole} if steps is not None else None,
        metrics={name: round(done - since, 3) for name, since in times.items() if done and since},
        metadata=dict(prediction.metadata),
        webhook=prediction.webhook,
        webhook_state=prediction.webhook_state,
        created_at=iso(prediction.created),
        started_at=iso(at) if at else None,
        completed_at=iso(done) if done else None,
        expires_at=iso(prediction.expires),
        urls=Links(get=address, cancel=f"{address}/cancel"),
    )


def iso(seconds: float) -> str:
    """A time for clients."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
