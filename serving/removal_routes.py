"""This file is where a subject is deleted over HTTP, with a receipt of what went."""

import asyncio
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from cluster.errors import UserError
from serving.answers import ApiError, documented
from serving.booth import Booth
from serving.door import AdminCaller
from serving.protocol import PRISTINE
from serving.tenancy import shown_name, stored_name
from serving.trainer import Eraser


class ReceiptAnswer(BaseModel):
    """What a deletion removed."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    """Of the receipt, which is kept under the storage root as `receipts/ID.json`."""
    object: Literal["receipt"] = "receipt"
    """What this is."""
    subject: str
    """Who was deleted."""
    deleted_at: str
    """ISO 8601."""
    removed: list[str]
    """Folders and objects under the storage root, and what was removed elsewhere."""
    files: int
    """Under those."""
    kept: list[str]
    """What still knows of the subject, and why."""


def removal_routes(booth: Booth, eraser: Eraser) -> APIRouter:
    """The route that deletes a subject.

    Args:
        booth: What it works with.
        eraser: Deletes.
    """
    router = APIRouter(prefix="/v1", tags=["models"])

    @router.delete(
        "/models/{model}",
        responses=documented(404, 409),
        summary="Delete a subject: photos, latents, checkpoints, artifacts, images, records",
    )
    async def delete(model: str, caller: AdminCaller) -> ReceiptAnswer:
        stored = stored_name(caller.tenant, model)
        if model == PRISTINE or shown_name(caller.tenant, stored) != model:
            raise ApiError(
                404, f"there is no model {model[:64]!r} that can be deleted", "model_not_found", "model"
            )
        try:
            receipt = await asyncio.to_thread(eraser.erase, stored)
        except UserError as error:
            status, code = (409, "is_trained") if "being trained" in error.what else (404, "model_not_found")
            said = str(error).replace(stored, model)
            raise ApiError(status, said, code, "model") from error
        booth.catalog.forget(stored)
        booth.metrics.deletions.inc()
        return ReceiptAnswer(
            id=receipt.id,
            subject=model,
            deleted_at=receipt.at,
            removed=list(receipt.removed),
            files=receipt.files,
            kept=list(receipt.kept),
        )

    return router
