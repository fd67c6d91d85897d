"""This file is where it is set which settings of a run become others on its way."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from training.section import Section

CHANGEABLE = (
    "train.lr",
    "train.text_encoder.lr",
    "train.new_tokens.lr",
    "train.weight_decay",
    "train.max_grad_norm",
    "prior.weight",
)
"""What a change may say, as in run.yaml: a step's update depends on it, and neither shapes nor data do."""


class _Part(Section):
    """A section of which only what was given is written down."""

    @model_serializer(mode="wrap")
    def _given(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        said: Mapping[str, Any] = write(self)
        return {key: value for key, value in said.items() if value not in (None, {})}


class ChangedTextEncoder(_Part):
    """The text encoder's part, from then on."""

    lr: float | None = Field(default=None, gt=0, le=1.0)
    """Its own learning rate."""


class ChangedNewTokens(_Part):
    """The subject's own tokens, from then on."""

    lr: float | None = Field(default=None, gt=0, le=1.0)
    """Learning rate of their embeddings."""


class ChangedTrain(_Part):
    """The optimisation, from then on."""

    lr: float | None = Field(default=None, gt=0, le=1.0)
    """Learning rate of the UNet."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Gradients are clipped to this global norm."""
    text_encoder: ChangedTextEncoder = ChangedTextEncoder()
    """The text encoder's part."""
    new_tokens: ChangedNewTokens = ChangedNewTokens()
    """Tokens of the subject's own."""


class ChangedPrior(_Part):
    """Prior preservation, from then on."""

    weight: float | None = Field(default=None, gt=0.0, le=100.0)
    """Weight of the class term in the loss."""


class Change(_Part):
    """Settings that are others from a step on, as in run.yaml. What is not given, or `null`, stays what it was."""

    after: int = Field(ge=1)
    """Steps that are trained before it."""
    train: ChangedTrain = ChangedTrain()
    """Of `train`: rates, decay and clipping. Warm-up and `lr_scheduler` go on and multiply the new rates."""
    prior: ChangedPrior = ChangedPrior()
    """Of `prior`: its weight."""
