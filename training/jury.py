"""This file is where a run's drawings are looked at on its way, by all ranks in step; rank 0 scores them.

The photos it compares with are those that the autoencoder gives back of the run's own latents: drawings come out of it
too. What the pristine base draws of the class, for the same prompt and seeds, is where drift is counted from.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cluster.errors import RayboothError, failure_of
from training.batches import Batches
from training.critic import Critic, Picture, parted, worth
from training.embedders import embedders_of, open_embedder
from training.engine import TrainingEngine
from training.lease import Lease, latent_table
from training.patience import Look
from training.pipeline import BaseInfo
from training.png import Pixels
from training.prompt import CLASS_PROMPT
from training.recipe import Validate
from training.samples import Decoder, Samples
from training.stop_settings import Stop


class Jury:
    """Scores what a run draws.

    Args:
        lease: The run; its `look_ids` are the prompts of a look, the empty one first and that of the class last.
        stop: Of its recipe.
        base: What it is trained from.
        unet: The pristine base's.
        text_encoder: Likewise.
        batches: Tell the rank, the world and the device.
    """

    def __init__(
        self,
        lease: Lease,
        stop: Stop,
        base: BaseInfo,
        unet: nn.Module,
        text_encoder: nn.Module,
        batches: Batches,
    ) -> None:
        self._lease, self._stop, self._base, self._batches = lease, stop, base, batches
        own = Validate(
            prompts=(*stop.prompts, CLASS_PROMPT),
            num_images=stop.num_images,
            steps=stop.steps,
            guidance=lease.recipe.validate_.guidance,
            unguided=False,
        )
        self.decoder = Decoder(base, batches.device)
        made = partial(Samples, lease, base, text_encoder, batches, self.decoder)
        self._samples = made(own, lease.look_ids)
        of_class, ids = own.model_copy(update={"prompts": (CLASS_PROMPT,)}), lease.look_ids
        self._pristine = made(of_class, [ids[0], ids[-1]])
        self._unet = unet
        self._critic: Critic | None = None
        self._of_base: list[Picture] | None = None  # of the class; drawn at the first look

    def look(self, engine: TrainingEngine, step: int, loss: float | None) -> Look:
        """Draw with the weights that would be published and score it; every rank gets the same.

        Args:
            engine: Of the run.
            step: Steps that it has trained.
            loss: The validation loss now, if it is known.

        Raises:
            UserError: An embedder cannot be used where rank 0 is.
        """
        if self._of_base is None:
            images = self._pristine.of_base(self._unet, engine)  # none on ranks that do not decode them
            self._of_base = parted((), self._stop.num_images, images)[1] if images else []
        drawn = self._samples.images(engine)
        found: list[Any] = [None]
        if drawn:
            try:
                own, of_class = parted(self._stop.prompts, self._stop.num_images, drawn)
                self._critic = self._critic or self._new_critic()
                scores = self._critic.score(own, of_class, self._of_base)
            except RayboothError as error:  # all ranks fail with it, or the others would wait for this one
                found = [{**error.as_json(), "exit_code": error.exit_code}]
            else:
                dino, clip_t = (scores.metrics[key].value for key in ("dino", "clip_t"))
                drift = scores.drift.value if scores.drift else 0.0
                found = [Look(step, worth(scores), dino, clip_t, drift, loss)]
        if self._batches.world > 1:
            dist.broadcast_object_list(found, src=0)
        if isinstance(found[0], Look):
            return found[0]
        raise failure_of(found[0])

    def _new_critic(self) -> Critic:
        """Its embedders on the CPU: a few pictures are seen in a moment there, and the device's memory is the run's."""
        dino, clip = embedders_of(self._base.model, self._stop)
        noun = str(self._lease.identity["class_noun"])
        return Critic(self._photos(), noun, open_embedder(dino), open_embedder(clip))

    def _photos(self) -> list[Pixels]:
        """The photos that are trained, the first variant of each."""
        table, data = latent_table(self._lease.subject_latents), self._lease.recipe.data
        assert table is not None
        firsts = range(0, len(table) - data.holdout * data.images_per_photo, data.images_per_photo)
        device = self._batches.device
        with torch.no_grad():
            return [
                self.decoder.pixels(self._base.scaled(torch.from_numpy(table.mean[row]).to(device)))
                for row in firsts
            ]
