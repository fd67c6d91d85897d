"""This file is where it is set how many replicas draw, with what, and when there are more or fewer."""

from pydantic import Field, model_validator

from training.section import Section


class Replicas(Section):
    """The processes that draw. There are as many as the images that wait ask for."""

    min: int = Field(default=1, ge=0)
    """The fewest; with 0 the first image after a pause waits for a replica to start."""
    max: int = Field(default=1, ge=1)
    """The most."""
    cpus: float = Field(default=1.0, ge=0)
    """Logical CPUs of each."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of each; 0 draws on the CPU."""
    width: int | None = Field(default=None, ge=2, le=256)
    """Rows of a forward pass, of which a guided image takes two; by default 8 on a CPU and 16 on a GPU. Part of what
    the bits of an image depend on."""
    exact: bool = True
    """Whether every forward pass has that many rows. Else a pass with few images is narrower: one that is alone is
    drawn in about half of the time, and its bits depend on how many were drawn beside it, to 1/255."""
    waiting: int = Field(default=64, ge=0)
    """Images that wait at one replica beside those it draws; more are 429."""
    cache_gib: float = Field(default=2.0, gt=0)
    """Memory of each for subjects."""
    upscale_delay_s: float = Field(default=5.0, ge=0)
    """How long there must be too much to do before a replica is added."""
    downscale_delay_s: float = Field(default=300.0, ge=0)
    """How long there must be too little to do before one is taken away."""
    drain_s: float = Field(default=120.0, gt=0)
    """How long a replica that goes away has for the images that it draws; what is left is drawn elsewhere."""

    @property
    def device(self) -> str:
        """What they draw on."""
        return "cuda" if self.gpus else "cpu"

    @model_validator(mode="after")
    def _ordered(self) -> "Replicas":
        if self.min > self.max:
            raise ValueError(
                f"replicas.min is {self.min} and replicas.max {self.max}: raise max or lower min"
            )
        return self
