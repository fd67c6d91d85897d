"""This file is where a lease is defined: a run as it is handed to a gang, with references to its latents.

N rows, C latent channels, h w latent size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.mailbox import fetch
from training.buckets import Rows
from training.recipe import Run
from training.request import DrawRequest


@dataclass(frozen=True)
class LatentTable:
    """The VAE posterior of every image of a subject or a class, unscaled."""

    mean: Rows
    """[N, C, h, w]."""
    std: Rows
    """[N, C, h, w]."""

    def __len__(self) -> int:
        return len(self.mean)


@dataclass(frozen=True)
class Lease:
    """One run, everything a gang needs to train it, and nothing that it would have to ask for."""

    run: Mapping[str, Any]
    """The `Run`, by alias."""
    name: str
    version: str
    base_model: str
    base_revision: str
    storage_uri: str
    subject_latents: Sequence[Any]
    """References to `{"mean", "std"}`, float32 [n, C, h, w] each; the table is their concatenation."""
    class_latents: Sequence[Any]
    """The same of the class images; empty without prior preservation."""
    subject_ids: Sequence[int]
    """Token ids of the subject's prompt."""
    class_ids: Sequence[int]
    """Token ids of the class prompt."""
    identity: Mapping[str, Any]
    """Identifier, class noun, template, token ids: travels in the artifact."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Further keys: `fingerprint` and `prior_key` of the artifact's manifest, `subject_names` of the photos."""
    caption_ids: Sequence[Sequence[int]] = ()
    """Token ids of the photos' own prompts, in order, or of `train.templates`; empty where all share one."""
    empty_ids: Sequence[int] = ()
    """Token ids of the empty prompt, where captions are dropped."""
    masks: Rows | None = None
    """[N, h, w], 0 to 1: where each row of the subject's latents counts, sizes as theirs; `None` is everywhere."""
    sizes: NDArray[np.float32] | None = None
    """[N, 6], of each row of the subject's latents: `Conditioning.sizes`. `None` is pictures of the base's own size."""
    sample_ids: Sequence[Sequence[int]] = ()
    """Token ids of the empty prompt and of each of the sample grid; empty where no grid is drawn."""
    look_ids: Sequence[Sequence[int]] = ()
    """Token ids of the empty prompt, of those of `train.stop` and of that of the class; empty without it."""
    until: int | None = None
    """The step after which the run is left, with a checkpoint and a sample grid and without an artifact; another lease
    goes on with it. `None` trains it to its end."""

    @property
    def first(self) -> "Lease":
        """Itself, as of a bank of one."""
        return self

    @property
    def recipe(self) -> Run:
        """The run, validated."""
        return Run.model_validate(self.run)

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids of the prompts that rows carry: by role, captions or templates, last the empty one."""
        every = (self.subject_ids, self.class_ids, *self.caption_ids, self.empty_ids)
        return [list(ids) for ids in every if ids]

    def image_name(self, row: int) -> str:
        """The photo that a row of the subject's latent table was made of, by name, else by number."""
        names, photo = self.meta.get("subject_names", ()), row // self.recipe.data.images_per_photo
        return str(names[photo]) if photo < len(names) else f"photo {photo}"

    @property
    def run_path(self) -> str:
        """Where the run keeps its checkpoints."""
        return f"runs/{self.name}/{self.version}"

    @property
    def fingerprint(self) -> str:
        """Of what decides the weights; a checkpoint with another one is not gone on from."""
        return str(self.meta.get("fingerprint", ""))


@dataclass(frozen=True)
class Bank:
    """Runs that are trained together, in slots. A slot without a run keeps the bank's width, which decides bits."""

    slots: tuple[Lease | None, ...]

    @property
    def first(self) -> Lease:
        """Any of them, for what they have in common."""
        return next(lease for lease in self.slots if lease)


@dataclass(frozen=True)
class Calibrate:
    """A question to a gang: how many runs such as this one are trained together best?"""

    first: Lease
    room: int | None
    """Bytes that the worker may take; `None` is unknown."""


@dataclass(frozen=True)
class Draw:
    """Images of an artifact that was published, by the worker that trained it: it has in memory what it takes."""

    first: Lease
    """The run, as it was trained."""
    requests: tuple[DrawRequest, ...]
    columns: int
    """Of the grid that they make."""
    path: str
    """Where under the root the grid goes."""


def latent_table(references: Sequence[Any]) -> LatentTable | None:
    """The concatenated table behind references; `None` when there are none."""
    blocks = fetch(references)
    if not blocks:
        return None
    if len(blocks) == 1:  # the arrays stay where they are, in shared memory
        return LatentTable(blocks[0]["mean"], blocks[0]["std"])
    parts = [[block[key] for block in blocks] for key in ("mean", "std")]
    if all(isinstance(part, np.ndarray) and part.shape[1:] == parts[0][0].shape[1:] for part in parts[0]):
        return LatentTable(*(np.concatenate(part) for part in parts))
    return LatentTable(*([row for rows in part for row in rows] for part in parts))
