"""This file is where one run is described: every setting, its default, its range. It imports no torch.

Precedence is defaults < file < flags. The defaults below are those of a Stable Diffusion 1.x/2.x base with
the `lora` method; `training/defaults.py` lists what differs for another base or method.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from training.change_settings import Change
from training.objective_settings import Objective
from training.optimizer_settings import Optimizer
from training.part_settings import Lora, NewTokens, TextEncoder
from training.section import Section
from training.stop_settings import Stop

Method = Literal["lora", "full"]
SamplerName = Literal["ddim", "ddpm", "euler", "euler-a", "plms", "dpm++2m", "unipc", "lcm"]
LrScheduler = Literal["constant", "linear", "cosine", "polynomial"]
ABOUT = "subject.yaml"  # beside a subject's photos: what a campaign is told of it


class Base(Section):
    """The pretrained pipeline that every subject starts from."""

    model: str = "pocket"
    """`pocket` (ships with raybooth), a folder in diffusers layout, or a hub id."""
    revision: str | None = None
    """Commit of a hub id; `None` takes the newest one that is cached."""


class Subject(Section):
    """The thing in the photos."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    """Name of the subject in storage and in `generate`: lower case letters, digits, `-` and `_`."""
    class_noun: str = Field(alias="class", min_length=1, max_length=64)
    """The subject's class noun, such as `dog`; YAML key `class`."""
    images: Annotated[
        tuple[str, ...],
        BeforeValidator(
            lambda v: (v,) if isinstance(v, str) else v, json_schema_input_type=str | tuple[str, ...]
        ),
    ] = Field(min_length=1)
    """Photos: a folder, or a list of files."""
    identifier: str = Field(default="auto", min_length=1, max_length=64)
    """The rare word that names the subject; `auto` picks a rare single token of the base's tokenizer."""

    @field_validator("name")
    @classmethod
    def _is_free(cls, name: str) -> str:
        if name == "base":
            raise ValueError("`base` is what `generate` calls the pristine base; give another name")
        return name

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_by_alias=True,
        validate_by_name=True,
    )


class Prior(Section):
    """Prior preservation: images the pristine base draws of the class keep the class what it was."""

    weight: float = Field(default=1.0, ge=0.0, le=100.0)
    """Weight of the class term in the loss; 0 turns prior preservation off."""
    target: Literal["images", "base"] = "images"
    """What the class term holds on to: `images` that the base drew of the class, or what the `base` itself predicts
    with the class prompt on the subject's noisy photos, so that none are drawn."""
    num_images: int = Field(default=200, ge=1, le=100_000)
    """Class images to draw; a larger number later draws only what is missing."""
    prompt: str = "a photo of a {class}"
    """Prompt of the class images; `{class}` is the class noun."""
    negative_prompt: str = ""
    """What the class images should not show."""
    sampler: SamplerName = "ddim"
    """Sampler of the class images."""
    steps: int = Field(default=50, ge=1, le=1000)
    """Denoising steps per class image."""
    guidance: float = Field(default=7.5, ge=1.0, le=50.0)
    """Classifier-free guidance scale; 1 is without guidance."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """First seed; image i is drawn from a seed of its own made of this and i."""

    sizes: tuple[tuple[int, int], ...] = ()
    """Width and height of the class images, taking turns; empty is the base's square. `data.buckets` sets it."""

    @property
    def draws(self) -> bool:
        """Whether class images are drawn for it."""
        return self.weight > 0 and self.target == "images"


class Data(Section):
    """How photos become training images. Variants are enumerated, not random, so that latents are cached."""

    variants: int = Field(default=1, ge=1, le=16)
    """Crops per photo along its longer side; 1 is the one `crop` names."""
    flip: bool = False
    """Also train on mirrored images. Off: text, logos and faces are not symmetric."""
    crop: Literal["center", "start", "end", "face", "saliency"] = "center"
    """Which part of a photo that does not fit is used when `variants` is 1: `face` has the largest face in its middle,
    `saliency` as much as can be of what stands out."""
    color: float = Field(default=0.0, ge=0, le=0.5)
    """How much brightness, contrast and saturation of the variants differ; the first stays as it is. Off: a subject's
    colours are its own."""
    rotate: float = Field(default=0.0, ge=0, le=45)
    """How many degrees variants are turned at most, enlarged so that no corner is empty; the first stays as it is."""
    buckets: bool = False
    """Train photos in about their own shape, in sizes of about the base's area, and class images of these sizes. Off:
    squares."""
    holdout: int = Field(default=0, ge=0, le=1000)
    """Photos kept from training, the last ones in order: the validation loss is theirs. 0 takes it on the photos that
    are trained, with noise that is not."""

    @model_validator(mode="after")
    def _takes_effect(self) -> "Data":
        if self.crop in ("face", "saliency") and self.variants > 1:
            raise ValueError(
                f"`crop: {self.crop}` takes no effect with variants: {self.variants}; leave one out"
            )
        for name in ("color", "rotate"):
            if getattr(self, name) and self.variants == 1:
                raise ValueError(f"`{name}` takes no effect with variants: 1; set variants, or leave it out")
        return self

    @property
    def images_per_photo(self) -> int:
        """Training images made of each photo."""
        return self.variants * (2 if self.flip else 1)


class Train(Section):
    """The optimisation."""

    method: Method = "lora"
    """`lora` trains adapters, `full` the whole UNet and text encoder."""
    steps: int = Field(default=800, ge=1, le=1_000_000)
    """Optimizer steps."""
    lr: float = Field(default=1e-4, gt=0, le=1.0)
    """Learning rate of the UNet."""
    pairs_per_step: int = Field(default=1, ge=1, le=4096)
    """Pairs (one subject and one class image) per optimizer step, over all workers together."""
    accumulation: int = Field(default=1, ge=1, le=1024)
    """Micro-batches a worker splits its pairs into, to save memory; the mathematics is the same."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradients are clipped to this global norm; `null` is off."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """Decoupled weight decay."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rates rise linearly from 0."""
    lr_scheduler: LrScheduler = "constant"
    """How the learning rates go on after the warm-up: all but `constant` fall to about 0 at the last step."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of a moving average of the trained weights, which is then what is validated and published, such as
    0.999; it grows into it as min(decay, (1 + step) / (10 + step)). `null` is off."""
    load_best_at_end: bool = False
    """Publish the weights of the checkpoint with the lowest validation loss instead of the last ones, should those be
    worse."""
    stop: Stop | None = None
    """When the run ends before `steps`, because its drawings gain no more; `null` trains all steps."""
    changes: tuple[Change, ...] = Field(default=(), max_length=1000)
    """Settings that become others on the way, in the order of their steps; empty keeps them all."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the order of images, the noise and the timesteps."""
    prompt: str = "a photo of {subject}"
    """Prompt of the subject's photos; `{subject}` becomes article, identifier and class noun."""
    templates: tuple[str, ...] = Field(default=(), max_length=100)
    """Prompts that are used besides `prompt`, each sample with one of them."""
    captions: Literal["none", "files"] = "none"
    """Whether each photo has a prompt of its own: `NAME.txt` beside `NAME.jpg`. One that does not say `{subject}`
    follows `prompt`."""
    text_encoder: TextEncoder = TextEncoder()
    """The text encoder's part."""
    new_tokens: NewTokens = NewTokens()
    """Tokens of the subject's own."""
    lora: Lora = Lora()
    """Adapters of method `lora`."""
    objective: Objective = Objective()
    """The loss and the noise."""
    optimizer: Optimizer = Optimizer()
    """What makes an update of a gradient."""


class Engine(Section):
    """How a step is computed."""

    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """DeepSpeed ZeRO stage; `auto` is 0 for one worker or LoRA, else 2."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute type; masters are fp32 always. `auto` is bf16 on a GPU that has it, fp32 on a CPU."""
    gradient_checkpointing: bool = False
    """Trade compute for memory: recompute activations in the backward pass."""
    offload: bool = False
    """Optimizer state in the memory of the CPU and its update computed there: slower, but the GPU holds only weights,
    gradients and activations. Stages 1 to 3."""


class Checkpoint(Section):
    """What a restart goes on from. Deleted once the artifact is published."""

    every: int = Field(default=200, ge=1)
    """Steps between checkpoints."""
    keep: int = Field(default=2, ge=1, le=100)
    """Newest checkpoints kept."""
    keep_best: bool = True
    """Also keep the one with the lowest validation loss."""


class Cluster(Section):
    """What a run asks of the Ray cluster."""

    workers: int = Field(default=1, ge=1, le=1024)
    """Training workers of the gang."""
    min_workers: int | None = Field(default=None, ge=1, le=1024)
    """Fewest workers the run starts or goes on with when the cluster has no room for all; `null` waits for all."""
    gpus_per_worker: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    """GPUs per worker; `auto` is 1 where the cluster has any, else 0."""
    cpus_per_worker: int = Field(default=1, ge=1, le=256)
    """CPU cores per worker, also its number of threads."""


class Track(Section):
    """Where figures go besides `events.jsonl`."""

    mlflow: str | None = None
    """MLflow tracking URI; `null` is a SQLite file in the storage root (MLFLOW_TRACKING_URI is honoured)."""
    experiment: str = "raybooth"
    """MLflow experiment, and W&B project."""
    tensorboard: bool = False
    """Also write TensorBoard event files beside the run."""
    wandb: bool | Annotated[str, Field(pattern=r"^[^/\s]+(/[^/\s]+)?$")] = False
    """Also to Weights & Biases: `true`, or `PROJECT` or `ENTITY/PROJECT` in place of `experiment`. WANDB_MODE and the
    like are honoured."""


class Validate(Section):
    """The loss on fixed noise and images drawn of the trained subject, both logged."""

    every: int = Field(default=200, ge=0)
    """Steps between validations, each a loss and a sample grid; every checkpoint has the loss too. 0 is off."""
    samples: int = Field(default=16, ge=1, le=1024)
    """Pairs that the validation loss is a mean of, their timesteps spread evenly."""
    prompts: tuple[str, ...] = ("a photo of {subject}",)
    """Prompts of the sample grid, each a row with guidance and during training one without; empty draws none."""
    unguided: bool = True
    """Whether there are rows without guidance during training."""
    num_images: int = Field(default=2, ge=1, le=64)
    """Images per prompt, seeds 0, 1, ..."""
    steps: int = Field(default=25, ge=1, le=1000)
    """Denoising steps."""
    guidance: float = Field(default=7.5, ge=1.0, le=50.0)
    """Classifier-free guidance scale."""


class Recipe(Section):
    """Everything of a run but its subject."""

    base: Base = Base()
    prior: Prior = Prior()
    data: Data = Data()
    train: Train = Train()
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    cluster: Cluster = Cluster()
    track: Track = Track()
    validate_: Validate = Field(default=Validate(), alias="validate")

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_by_alias=True,
        validate_by_name=True,
    )


class Run(Recipe):
    """One subject trained once with one recipe: `run.yaml`."""

    subject: Subject


# Sections whose values change what is trained. The base does by its revision, not by where it lies; where a run
# happens and what watches it do not.
TRAINED_SECTIONS = ("prior", "data", "train", "engine")
