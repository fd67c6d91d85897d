"""This file is where a run does what is not a step: it validates, draws samples, saves checkpoints and publishes."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from cluster.errors import SystemFailure
from cluster.objects import StorageError
from cluster.storage import Storage
from training import checkpoint
from training.artifact import Identity, artifact_meta, artifact_path, write_weights
from training.batches import Batches
from training.checkpoint import ROWS, Tensors
from training.engine import TrainingEngine
from training.figures import Figures, Report
from training.jury import Jury
from training.lease import Lease
from training.patience import Patience
from training.pipeline import BaseInfo
from training.recipe import Run
from training.samples import Decoder, Samples
from training.validation import ValidationLoss, validation_loss
from training.wish import Wish

_WHY = {Wish.NONE: "schedule", Wish.CHECKPOINT: "asked", Wish.LEAVE: "leaving"}


@dataclass
class Services:
    """The services of one run. All ranks call every method together, rank 0 writes."""

    lease: Lease
    storage: Storage
    base: BaseInfo
    text_encoder: nn.Module
    """The base's."""
    engine: TrainingEngine
    batches: Batches
    figures: Figures
    zero_stage: int
    report: Report
    jury: Jury | None = None
    """Looks at what the run draws, where it ends when that gains no more."""
    patience: Patience | None = None
    """What the jury found so far."""
    run: Run = field(init=False)
    samples: Samples | None = field(init=False)

    def __post_init__(self) -> None:
        self.run = self.lease.recipe
        drawn = self.run.validate_.every and self.lease.sample_ids
        decoder = self.jury.decoder if self.jury else Decoder(self.base, self.batches.device)
        self.samples = None
        if drawn:
            self.samples = Samples(self.lease, self.base, self.text_encoder, self.batches, decoder)

    def after(self, step: int, asked: Wish) -> Wish:
        """What is due after `step` steps, or asked for by a rank; returns what is asked for, heard meanwhile too."""
        every = self.run.validate_.every
        scheduled, sampled = step % self.run.checkpoint.every == 0, every > 0 and step % every == 0
        looked = self._is_look(step)
        if not (scheduled or sampled or looked or asked):
            return asked
        asked = max(asked, self.figures.settle())
        if asked is Wish.DROP:
            return asked
        loss = self._validate(step) if every and (scheduled or sampled or looked) else None
        if looked and asked is not Wish.LEAVE:  # who leaves has little time: `catch_up` looks after it
            self._look(step, loss)
        if scheduled or looked or asked:
            # one that was only asked for is no candidate for the best: which one is must not depend on who asked
            self._save(step, _WHY[asked], loss.loss if loss and scheduled else None)
        if sampled and asked is not Wish.LEAVE:
            self._sample(step)
        self.figures.rest()
        return asked

    def catch_up(self, step: int) -> None:
        """Look at the drawings of `step` if that was due when the run was left there."""
        if self.patience and step and self._is_look(step) and not self.patience.has(step):
            self._look(step, self._validate(step) if self.run.validate_.every else None)

    @property
    def over(self) -> bool:
        """Whether the run is to end although it has steps left; every rank says the same."""
        return self.patience is not None and self.patience.over

    def finish(self, step: int) -> dict[str, float]:
        """Publish the run after `step` steps; returns the metrics of its artifact."""
        self.figures.settle()
        metrics, state = self.figures.final(), None
        loss = self._validate(step) if self.run.validate_.every else None
        if loss:
            metrics["validation_loss"] = loss.loss
        if self.patience:
            if not self.patience.has(step):
                self._look(step, loss)
            state = self._most_gained(step, metrics) if self._leads else None
        elif loss and self.run.train.load_best_at_end and self._leads:
            best = self._best(loss.loss)
            if best is not None:
                metrics |= {"validation_loss": best[0], "best_step": best[1].step}
                state = best[1]
        self._publish(metrics, state.weights if state else None)
        return metrics

    def pause(self, step: int, trained: bool) -> dict[str, float]:
        """Leave the run after `step` steps with a grid, and with a checkpoint if it has trained; returns its losses."""
        self.figures.settle()
        metrics = self.figures.final()
        if self.run.validate_.every:
            metrics["validation_loss"] = self._validate(step).loss
            self._sample(step)
        if trained:  # else it has come from that checkpoint
            self._save(step, "paused", None)
        return metrics

    @property
    def _leads(self) -> bool:
        return self.batches.rank == 0

    def _validate(self, step: int) -> ValidationLoss:
        loss = validation_loss(self.engine, self.batches, self.run.validate_.samples)
        self.report("validation", {"step": step, **loss.as_json()})
        return loss

    def _is_look(self, step: int) -> bool:
        stop = self.run.train.stop
        return self.jury is not None and stop is not None and step % stop.every == 0

    def _look(self, step: int, loss: ValidationLoss | None) -> None:
        assert self.jury is not None and self.patience is not None
        look = self.jury.look(self.engine, step, loss.loss if loss else None)
        self.patience.add(look)
        self.report("score", {key: value for key, value in look.as_json().items() if key != "loss"})

    def _most_gained(self, step: int, metrics: dict[str, float]) -> checkpoint.State | None:
        """The state to publish, `None` for the last one, and in the metrics what was found of it."""
        assert self.patience is not None and self.patience.best is not None
        best, saved = self.patience.best, self.run.train.steps - step
        state = None
        if best.step != step:
            try:
                state = checkpoint.load(self.storage, self.lease.run_path, best.step, self.lease.fingerprint)
            except (OSError, SystemFailure) as error:  # the last state is nearly as good
                self.report("note", {"text": f"the weights of step {best.step} are not to be had: {error}"})
                best = self.patience.looks[-1]
        metrics |= {"score": best.score, "best_step": best.step, "steps_saved": saved}
        if best.loss is not None:
            metrics["validation_loss"] = best.loss
        if saved:
            told = f"its drawings gain no more: ended after step {step}, with the weights of step {best.step}"
            self.report("note", {"text": f"{told}; {saved} of {self.run.train.steps} steps are saved"})
        return state

    def _sample(self, step: int) -> None:
        picture = self.samples.draw(self.engine) if self.samples else None
        if picture is not None:
            path = f"{self.lease.run_path}/samples/step_{step:06d}.png"
            if self._written(lambda: self.storage.write(path, picture)):
                self.report("sample", {"step": step, "path": path})

    def _save(self, step: int, why: str, loss: float | None) -> None:
        began = time.monotonic()
        state = self.engine.state(step)  # all ranks: it gathers

        def write() -> None:
            self._keep_rows()
            kept = self.run.checkpoint
            facts: dict[str, Any] = {"validation_loss": loss, "world": self.batches.world}
            facts["zero_stage"] = self.zero_stage
            spare = None
            if self.patience:
                facts["looks"] = [look.as_json() for look in self.patience.looks]
                spare = self.patience.best.step if self.patience.best else None
            path, fingerprint = self.lease.run_path, self.lease.fingerprint
            checkpoint.save(self.storage, path, state, fingerprint, kept.keep, kept.keep_best, facts, spare)

        if self._leads and self._written(write):
            seconds = round(time.monotonic() - began, 3)
            self.report("checkpoint", {"step": step, "why": why, "seconds": seconds})

    def _written(self, write: Callable[[], None]) -> bool:
        """Whether something was written that the run can go on without; a note says so when it was not."""
        try:
            write()
        except (OSError, SystemFailure) as error:
            self.report("note", {"text": f"not written, the run goes on: {error}"})
            return False
        return True

    def _keep_rows(self) -> None:
        self.figures.keep(self.storage, f"{self.lease.run_path}/{ROWS}")

    def _best(self, below: float) -> tuple[float, checkpoint.State] | None:
        def note(text: str) -> None:
            self.report("note", {"text": text})

        return checkpoint.best(self.storage, self.lease.run_path, self.lease.fingerprint, below, note)

    def _publish(self, metrics: dict[str, float], weights: Tensors | None) -> None:
        """Write the artifact (rank 0) while every rank holds the weights whole; `weights` take their place."""
        with self.engine.evaluating(), self.engine.gathered():
            if not self._leads:
                return
            if weights is not None:
                self.engine.load(weights)
            path = artifact_path(self.lease.name, self.lease.version)
            try:
                self._keep_rows()
                self._write_artifact(path, metrics)
            except StorageError as error:
                raise error.failure() from error
            except (OSError, SafetensorError) as error:
                size_mb = sum(p.numel() * p.element_size() for p in self.engine.module.parameters()) / 1e6
                raise SystemFailure(
                    f"the artifact {self.storage.full(path)} could not be written",
                    str(error),
                    f"it takes {size_mb:.0f} MB in {tempfile.gettempdir()} first: make room there and run the same "
                    "command again to go on",
                ) from error

    def _write_artifact(self, path: str, metrics: dict[str, float]) -> None:
        lease = self.lease
        identity, prior_key = Identity.from_json(lease.identity), lease.meta.get("prior_key")
        meta = artifact_meta(self.base, self.run, identity, lease.fingerprint, prior_key, metrics)
        with tempfile.TemporaryDirectory(prefix="raybooth-") as folder:
            self._write_weights(Path(folder))
            self.storage.publish(Path(folder), path, meta)

    def _write_weights(self, folder: Path) -> None:
        module = self.engine.module
        text_encoder = self.text_encoder if module.text_encoder is None else module.text_encoder
        write_weights(self.base, self.run, module.unet, text_encoder, folder)
