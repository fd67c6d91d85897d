"""This file is where it is told what bases of one kind have in common: their parts, and what their denoiser is told.

Everything that differs between Stable Diffusion 1.x/2.x, SDXL and SD3 follows from the fields of a kind; what differs
between two bases of one kind is read from their JSON (`training/pipeline.py`). The denoiser is the model that predicts
what is to be taken from noisy latents: a UNet, or SD3's transformer. Where code says `unet` it stands for either.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.errors import UserError

CLIP, CLIP_PROJECTED, T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
DENOISERS = {"UNet2DConditionModel": "unet", "SD3Transformer2DModel": "transformer"}
"""The part that a denoiser is, by its class."""
FLOW_MATCH = "FlowMatchEulerDiscreteScheduler"
# What has to be known of SD3's
_OF_TRANSFORMER = (
    "joint_attention_dim",
    "pooled_projection_dim",
    "pos_embed_max_size",
    "patch_size",
    "sample_size",
)
_NONE = [None, None]
_NO_IMAGE = {"feature_extractor": _NONE, "image_encoder": _NONE}


@dataclass(frozen=True)
class BaseKind:
    """The bases of one pipeline class of diffusers."""

    pipeline: str
    """What their model_index.json names."""
    family: str
    """Whose defaults apply (`training/defaults.py`)."""
    encoders: tuple[tuple[str, str], ...]
    """Text encoders in the order in which they read a prompt: the part, and the class that its config.json names."""
    denoiser: str = "unet"
    """The part that is one of `DENOISERS`."""
    flow: bool = False
    """Whether its noise process is a rectified flow (`training/flow.py`), not one of diffusion."""
    optional: tuple[str, ...] = ()
    """Text encoders that a base may lack."""
    addition: str | None = None
    """`addition_embed_type` of the UNet: `text_time` is told pooled text and sizes beside the hidden states."""
    scheduler: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What the pipeline corrects in whatever scheduler config it loads."""
    index: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What the model_index.json of a pipeline that is written says, whatever the base's does: what is left out."""

    @property
    def parts(self) -> dict[str, tuple[str, str]]:
        """Per part: the class that must be named in its config.json, and the name of its weights."""
        return {
            self.denoiser: (
                next(named for named, part in DENOISERS.items() if part == self.denoiser),
                "diffusion_pytorch_model",
            ),
            "vae": ("AutoencoderKL", "diffusion_pytorch_model"),
            **{part: (named, "model") for part, named in self.encoders},
        }

    @property
    def texts(self) -> tuple[str, ...]:
        """The parts that are text encoders."""
        return tuple(part for part, _ in self.encoders)

    @property
    def trainable(self) -> tuple[str, ...]:
        """The parts that may be trained: the denoiser and every CLIP. A T5 stays as it is, as in diffusers' scripts."""
        return (self.denoiser, *(part for part, named in self.encoders if named != T5))

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The folders of their tokenizers, in the same order."""
        return tuple(part.replace("text_encoder", "tokenizer") for part in self.texts)

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of such a base that are read."""
        return (*self.parts, *self.tokenizers, "scheduler")

    @property
    def sized(self) -> bool:
        """Whether the UNet is told sizes (`Conditioning.sizes`)."""
        return self.addition == "text_time"


KINDS = (
    BaseKind(
        "StableDiffusionPipeline",
        "sd",
        (("text_encoder", CLIP),),
        # latents are not clipped, and steps start at timestep 1
        scheduler={"clip_sample": False, "steps_offset": 1},
        index={"safety_checker": _NONE, **_NO_IMAGE, "requires_safety_checker": False},
    ),
    BaseKind(
        "StableDiffusionXLPipeline",
        "sdxl",
        (("text_encoder", CLIP), ("text_encoder_2", CLIP_PROJECTED)),
        addition="text_time",
        index=_NO_IMAGE,
    ),
    BaseKind(
        "StableDiffusion3Pipeline",
        "sd3",
        (("text_encoder", CLIP_PROJECTED), ("text_encoder_2", CLIP_PROJECTED), ("text_encoder_3", T5)),
        denoiser="transformer",
        flow=True,
        optional=("text_encoder_3",),
        index=_NO_IMAGE,
    ),
)
FOLDERS = tuple(dict.fromkeys(name for kind in KINDS for name in kind.folders))
"""All folders of a base that may be read."""


def kind_of(index: Mapping[str, Any], model: str) -> BaseKind:
    """The kind of the base `model`, by its model_index.json; without what it may lack and lacks.

    Raises:
        UserError: It is of none of them.
    """
    named = index.get("_class_name")
    for kind in KINDS:
        if named == kind.pipeline:
            lacking = [part for part in kind.optional if not any(index.get(part) or ())]
            there = tuple(one for one in kind.encoders if one[0] not in lacking)
            return replace(kind, encoders=there) if lacking else kind
    raise UserError(
        f"the base {model} is neither a Stable Diffusion 1.x/2.x nor an SDXL nor an SD3",
        f"its model_index.json names {named}",
        f"name a base whose pipeline is {' or '.join(kind.pipeline for kind in KINDS)}",
    )


def is_clip(tokenizer: Any) -> bool:
    """Whether a tokenizer is a CLIP's; T5's, the other one, knows pieces of words."""
    return type(tokenizer).__name__.startswith("CLIP")


def check_scheduler(scheduler: Mapping[str, Any], kind: BaseKind, model: str) -> None:
    """Refuse a scheduler of diffusion for a base of flow matching, and the other way round.

    Args:
        scheduler: Its config.
        kind: Of the base.
        model: The base, for people.

    Raises:
        UserError: It is so.
    """
    if kind.flow != (scheduler.get("_class_name") == FLOW_MATCH):
        raise UserError(
            f"the scheduler of the base {model} is of an unknown kind",
            f"it is {scheduler.get('_class_name')}, and the base is a {kind.pipeline}",
            f"use a base with a {FLOW_MATCH}" if kind.flow else "use a base with a scheduler of diffusion",
        )


def check_widths(
    unet: Mapping[str, Any], texts: Sequence[Mapping[str, Any]], kind: BaseKind, model: str
) -> None:
    """Refuse a denoiser that is told something else than the text encoders of its base say: a refiner's, say.

    Args:
        unet: Its config.
        texts: Those of the text encoders, in order.
        kind: Of the base.
        model: The base, for people.

    Raises:
        UserError: It is so.
    """
    if kind.flow:
        _check_joint(unet, texts, kind, model)
    if not kind.sized:
        return
    says = [
        sum(int(text["hidden_size"]) for text in texts),
        int(texts[-1]["projection_dim"]) + 6 * int(unet["addition_time_embed_dim"]),
    ]
    takes = [int(unet["cross_attention_dim"]), int(unet["projection_class_embeddings_input_dim"])]
    if takes != says:
        raise UserError(
            f"the unet of the base {model} does not fit its text encoders",
            f"it takes {takes[0]} values of a token and {takes[1]} of a picture, they make {says[0]} and {says[1]}",
            "use a base of SDXL that draws from text alone, and no refiner",
        )


def _check_joint(
    transformer: Mapping[str, Any], texts: Sequence[Mapping[str, Any]], kind: BaseKind, model: str
) -> None:
    """Likewise of SD3's: CLIPs side by side, filled up to T5's width, and what both pool."""
    clips, others = texts[:2], texts[2:]
    needed: list[tuple[str, Mapping[str, Any], Sequence[str]]] = [
        (kind.denoiser, transformer, _OF_TRANSFORMER)
    ]
    needed += [
        (part, text, ("d_model",) if named == T5 else ("hidden_size", "projection_dim"))
        for (part, named), text in zip(kind.encoders, texts, strict=True)
    ]
    for part, config, names in needed:
        if lacking := [name for name in names if not isinstance(config.get(name), int)]:
            raise UserError(
                f"the {part} of the base {model} does not say all that is needed of it",
                f"{part}/config.json has no number {' and no '.join(lacking)}",
                "use a base of SD3 as it was published",
            )
    width, pooled = int(transformer["joint_attention_dim"]), int(transformer["pooled_projection_dim"])
    beside = sum(int(text["hidden_size"]) for text in clips)
    projected = sum(int(text["projection_dim"]) for text in clips)
    if beside > width or projected != pooled or any(int(text["d_model"]) != width for text in others):
        wide = "".join(f" and {text['d_model']}" for text in others)
        raise UserError(
            f"the transformer of the base {model} does not fit its text encoders",
            f"it takes {width} values of a token and {pooled} of a prompt, they make {beside}{wide} and {projected}",
            "use a base of SD3 as it was published",
        )
