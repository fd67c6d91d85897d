"""This file is where one slot of a bank is a run: its batches, figures and checkpoints, as if it were trained alone."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from cluster.storage import Storage
from training import checkpoint
from training.bank import Bank
from training.batches import Batches
from training.checkpoint import ROWS, State
from training.engine import StepReport
from training.figures import Figures, Report, rows_kept
from training.lease import Lease
from training.loop import ResidentBase, image_names
from training.lora import write_adapters
from training.rates import learning_rate
from training.recipe import Run
from training.services import Services
from training.validation import ValidationLoss

Validate = Callable[[int], ValidationLoss]


@dataclass(frozen=True)
class SlotEngine:
    """A slot as services see it: an engine that holds one run."""

    module: Bank
    slot: int

    def state(self, step: int) -> State:
        """Adapters and moments after `step` steps."""
        return self.module.adapters.state(self.slot, step)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Nothing is to be prepared: what is trained is what is published."""
        yield

    def gathered(self) -> AbstractContextManager[None]:
        """A bank is on one worker, where everything is whole."""
        return nullcontext()


@dataclass
class SlotServices(Services):
    """Services of a slot; its validation losses are computed with those of the other slots."""

    engine: SlotEngine  # type: ignore[assignment]  # the few methods of it that are used here
    validate: Validate = field(kw_only=True)
    """The loss of a slot as it is now."""

    def _validate(self, step: int) -> ValidationLoss:
        loss = self.validate(self.engine.slot)
        self.report("validation", {"step": step, **loss.as_json()})
        return loss

    def _write_weights(self, folder: Path) -> None:
        adapters = self.engine.module.adapters
        weights = {adapters.part: adapters.weights(self.engine.slot)}
        write_adapters(weights, folder, self.run.train.lora)


@dataclass
class Slot:
    """A run that is under way in a slot."""

    number: int
    run: Run
    batches: Batches
    """On the CPU: all slots' rows go to the device together."""
    figures: Figures
    services: SlotServices
    step: int
    """Steps done."""

    @classmethod
    def open(
        cls, number: int, lease: Lease, bank: Bank, base: ResidentBase, report: Report, validate: Validate
    ) -> "Slot":
        """Start a run in a slot, or go on with it from its last checkpoint.

        Raises:
            UserError: It cannot be trained as asked.
            SystemFailure: The lease has no latents.
        """
        run, storage = lease.recipe, Storage(lease.storage_uri)

        def note(text: str) -> None:
            report("note", {"text": text})

        state = checkpoint.latest(storage, lease.run_path, lease.fingerprint, note)
        batches = Batches.of(lease, base.info, torch.device("cpu"), rank=0, world=1)
        if state:
            bank.adapters.load(number, state)
        else:
            bank.adapters.start(number, run.train.seed)
        bank.take(number, run, lease.prompts)
        start = state.step if state else 0
        figures = Figures(report, 1, partial(image_names, lease, batches), base.device)
        figures.go_on(rows_kept(storage, f"{lease.run_path}/{ROWS}", start))
        services = SlotServices(
            replace(lease, sample_ids=()),  # a run with samples on the way is in no bank
            storage,
            base.info,
            base.text_encoder,
            SlotEngine(bank, number),
            batches,
            figures,
            0,
            report,
            validate=validate,
        )
        report("started", {"from_step": start, "pid": os.getpid(), "workers": 1, "zero_stage": 0})
        return cls(number, run, batches, figures, services, start)

    def take(self, figures: torch.Tensor) -> None:
        """Take the figures of a step: losses of subject and class, norm of the gradient, float32 [3].

        Raises:
            UserError: The run diverged some steps ago.
        """
        lr = learning_rate(self.run.train.lr, self.step, self.run.train)
        self.step += 1
        self.figures.take(StepReport(self.step, figures, lr, None))

    @property
    def ended(self) -> bool:
        """Whether every step is done."""
        return self.step >= self.run.train.steps
