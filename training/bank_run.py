"""This file is where a bank is trained: several runs at once, each from its own last checkpoint to its own artifact.

What one run does never shows in the bits of another. Its own depend on its recipe and on the width of the bank.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from typing import Any

import torch

from cluster.errors import RayboothError, SystemFailure
from cluster.mailbox import failure
from cluster.storage import Storage
from training.bank import Bank, stack
from training.bank_adam import BankAdam
from training.bank_key import bank_key
from training.bank_slot import Slot
from training.heap import keep_freed_memory
from training.lease import Lease
from training.loop import ResidentBase, published_before
from training.objective import PairBatch
from training.validation import ValidationLoss
from training.wish import Wish, Wishes, no_wish

BankReport = Callable[[int, str, Any], None]
"""Takes slot, kind and payload of an event."""


def train_bank(
    slots: Sequence[Lease | None],
    base: ResidentBase,
    report: BankReport,
    wish: Wishes = no_wish,
    dropped: Callable[[], frozenset[int]] = frozenset,
) -> bool:
    """Train the runs of a bank and publish the artifact of each. A run that fails does so alone.

    Args:
        slots: Runs of the same `bank_key`, as wide as the bank was when its runs began: `None` keeps a slot empty.
        base: The pristine base they start from; left as it is.
        report: Takes slot, kind and payload of events: those of `train_run`, and at the end of each run `published
            {metrics}`, `failed {what, seen, do, exit_code, kind}`, `dropped {step}` or `left {step}`.
        wish: What is wished of all runs, polled once per step: a checkpoint, or to leave.
        dropped: The slots whose runs nobody wants any more.

    Returns:
        Whether the bank is done; `False` when it was left: each run goes on from the checkpoint that was saved.

    Raises:
        UserError: A target of the runs is no linear layer.
        SystemFailure: They do not fit together.
    """
    training = _Training(slots, base, report)
    while training.living:
        asked = wish()
        for number in dropped() & training.living.keys():
            training.end(number, "dropped", {"step": training.living[number].step})
        if training.living:
            training.step()
            # `DROP` is said of a run, and was heard above
            training.serve(Wish.NONE if asked is Wish.DROP else asked)
        if asked is Wish.LEAVE and training.living:
            for number in list(training.living):
                training.end(number, "left", {"step": training.saved[number]})
            return False
    return True


class _Training:
    """A bank and the runs that live in it.

    Args:
        slots: As of `train_bank`.
        base: The same.
        report: The same.
    """

    def __init__(self, slots: Sequence[Lease | None], base: ResidentBase, report: BankReport) -> None:
        self.living: dict[int, Slot] = {}
        self.saved: dict[int, int] = {}  # steps that the newest checkpoint of each run has behind it
        self._report, self._device, self._width = report, base.device, len(slots)
        self._validated: Mapping[int, ValidationLoss] = {}
        leases = {
            number: lease for number, lease in enumerate(slots) if lease and self._is_open(number, lease)
        }
        if not leases:
            return
        keys = {bank_key(lease.recipe, lease.base_revision) for lease in leases.values()}
        if len(keys) > 1 or None in keys:
            raise SystemFailure(
                "runs that do not fit together are in one bank",
                ", ".join(lease.name for lease in leases.values()),
            )
        keep_freed_memory()
        run = next(iter(leases.values())).recipe
        self._rows = run.train.pairs_per_step * (2 if run.prior.weight > 0 else 1)
        self._bank = Bank(base, run, self._width)
        self._adam = BankAdam(self._bank.adapters)
        for number, lease in leases.items():
            with self._failing_alone(number):
                told = partial(self._tell, number)
                slot = Slot.open(number, lease, self._bank, base, told, self._validation)
                self._adam.resume(number, slot.step)
                self.living[number], self.saved[number] = slot, slot.step

    def end(self, number: int, kind: str, payload: Mapping[str, Any]) -> None:
        """End a run, with the event that says how; its rows are zeros from now on."""
        self.living.pop(number, None)
        self._bank.adapters.clear(number)
        self._report(number, kind, payload)

    def step(self) -> None:
        """A step of every run, each its own; one that turns out to have diverged fails."""
        self._validated = {}
        living = self.living
        batch = self._stacked(
            {number: next(slot.batches.of_step(slot.step)) for number, slot in living.items()}
        )
        losses = self._bank(batch)
        losses.loss.sum().backward()
        norms = self._adam.step({number: (slot.run.train, slot.step) for number, slot in living.items()})
        figures = torch.stack((losses.subject, losses.of_class, norms), dim=1)
        for number, slot in list(living.items()):
            with self._failing_alone(number):
                slot.take(figures[number])

    def serve(self, asked: Wish) -> None:
        """What is due after a step or asked for: checkpoints, validations, and the artifacts of those that are done."""
        for number, slot in list(self.living.items()):
            with self._failing_alone(number):
                if slot.ended:
                    self.end(number, "published", {"metrics": slot.services.finish(slot.step)})
                else:
                    slot.services.after(slot.step, asked)

    def _tell(self, number: int, kind: str, payload: Any) -> None:
        if kind == "checkpoint":
            self.saved[number] = payload["step"]
        self._report(number, kind, payload)

    @contextmanager
    def _failing_alone(self, number: int) -> Iterator[None]:
        try:
            yield
        except RayboothError as error:
            self.end(number, "failed", failure(error))

    def _is_open(self, number: int, lease: Lease) -> bool:
        """Whether a run is still to be trained; one whose artifact is there says so instead."""
        metrics = published_before(lease, Storage(lease.storage_uri), partial(self._report, number))
        if metrics:
            self._report(number, "published", {"metrics": metrics})
        return not metrics

    def _stacked(self, parts: Mapping[int, PairBatch | None]) -> PairBatch:
        """The batch of all slots, on the device."""
        return stack([parts.get(number) for number in range(self._width)], self._rows).to(self._device)

    def _validation(self, number: int) -> ValidationLoss:
        """The validation loss of a run as it is now; all are computed together and kept until the next step."""
        if not self._validated:
            self._validated = self._validate()
        return self._validated[number]

    def _validate(self) -> dict[int, ValidationLoss]:
        asked = {number: slot for number, slot in self.living.items() if slot.run.validate_.every}
        batches = (slot.batches.of_validation(slot.run.validate_.samples) for slot in asked.values())
        sums = torch.zeros(3, self._width, device=self._device)
        with self._bank.evaluating():
            for parts in zip_longest(*batches):
                losses = self._bank(self._stacked(dict(zip(asked, parts, strict=True))))
                sums += torch.stack((losses.loss, losses.subject, losses.of_class))
        return {number: ValidationLoss(*sums[:, number].tolist()) for number in asked}
