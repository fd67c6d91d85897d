"""This file is where it is set which parts of a base are trained and how: adapters, text encoder, new tokens."""

from typing import Literal

from pydantic import Field, model_validator

from training.section import Section

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # the ends of the names of a UNet's attention layers
OF_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # those of SD3's that see the text


class TextEncoder(Section):
    """The text encoder's part in training."""

    train: bool = False
    """Train it too: its LoRA with method `lora`, all of it with `full`."""
    lr: float = Field(default=5e-6, gt=0, le=1.0)
    """Its own learning rate."""
    stop_after: int | None = Field(default=None, ge=1)
    """Step after which it stays as it is; `null` trains it to the end."""


class NewTokens(Section):
    """Tokens of the subject's own (pivotal tuning): embeddings that are learnt beside the weights."""

    count: int = Field(default=0, ge=0, le=8)
    """How many the identifier becomes, 1 or 2 as a rule; 0 takes a word that the base has."""
    lr: float = Field(default=5e-4, gt=0, le=1.0)
    """Learning rate of their embeddings."""
    stop_after: int | None = Field(default=None, ge=1)
    """Step after which they stay as they are; `null` trains them to the end."""
    initializer: str | None = Field(default=None, min_length=1, max_length=64)
    """Word whose embedding they start as; `null` is the class noun."""

    @model_validator(mode="after")
    def _takes_effect(self) -> "NewTokens":
        for name in () if self.count else ("lr", "stop_after", "initializer"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"`{name}` takes no effect with count: 0; set count, or leave it out")
        return self


class Lora(Section):
    """Adapters (method `lora`)."""

    kind: Literal["lora", "lokr", "oft"] = "lora"
    """`lora`: two factors of low rank. `lokr`: a Kronecker product. `oft`: a rotation, `rank` being the size of its
    blocks. The last two are published as the weights that they make."""
    rank: int = Field(default=8, ge=1, le=1024)
    """Rank of the two factors."""
    alpha: float = Field(default=8.0, gt=0)
    """Scale: the update is alpha / rank * B A."""
    targets: tuple[str, ...] = ATTENTION
    """Modules of the UNet (of SD3: of the transformer) that get an adapter, by the end of their name."""
    dora: bool = False
    """DoRA: the length of each row of a weight is trained apart from its direction, which the factors change."""
    text_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")
    """Text encoder modules that get an adapter when it is trained."""

    @model_validator(mode="after")
    def _takes_effect(self) -> "Lora":
        if self.dora and self.kind != "lora":
            raise ValueError(f"`dora` takes no effect with kind: {self.kind}; leave it out")
        if self.kind == "oft" and self.alpha != type(self).model_fields["alpha"].default:
            raise ValueError("`alpha` takes no effect with kind: oft; leave it out")
        return self
