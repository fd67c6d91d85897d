"""This file is where a bank is put together: one UNet of frozen weights that K runs are trained through at once.

The rows of a batch are ordered by slot and equally many for each, whether or not it has a run: then every product has
the same shape to the end, and a slot's bits do not depend on what the others do.

K slots, R rows of a slot, L token ids of a prompt.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields

import torch
from torch import nn

from cluster.errors import UserError
from training.bank_adapters import Adapters
from training.bank_linear import BankLinear, FrozenLinear
from training.conditioning import Conditioning, encode_text, predict
from training.criterion import Criterion
from training.dataplan import Role
from training.engine import compute_type
from training.loop import ResidentBase
from training.noise import noise_process, trained_scheduler
from training.objective import PairBatch
from training.recipe import Run


@dataclass(frozen=True)
class BankLosses:
    """What a batch comes to in each slot, float32 [K]."""

    loss: torch.Tensor
    """With its gradient: `subject + prior_weight * of_class`, the weights being those of the rows."""
    subject: torch.Tensor
    of_class: torch.Tensor
    """Without the prior weight."""


class Bank(nn.Module):
    """K runs of one base whose recipes have the same `bank_key`.

    Args:
        base: The pristine base; its frozen parameters are used and left as they are.
        run: Any of the runs, for what they have in common.
        slots: K.
    """

    def __init__(self, base: ResidentBase, run: Run, slots: int) -> None:
        super().__init__()
        lora, device = run.train.lora, base.device
        self._text_encoder, self._slots = base.text_encoder, slots
        self._autocast = compute_type(run.engine, device)
        objective = run.train.objective
        self._schedule = noise_process(trained_scheduler(base.info.scheduler, objective))
        self._criterion = Criterion(objective, self._schedule)
        self.unet, _ = base.fresh(share=True)
        linear = {name: part for name, part in self.unet.named_modules() if isinstance(part, nn.Linear)}
        adapted = _named(self.unet, lora.targets)
        if odd := [name for name in adapted if name not in linear]:
            raise UserError(
                "a bank adapts linear layers alone", f"{odd[0]} is none", "set schedule.bank to 1"
            )
        sizes = {name: (linear[name].in_features, linear[name].out_features) for name in adapted}
        self.adapters = Adapters(sizes, lora.rank, slots, device, base.info.kind.denoiser)
        self._scales = torch.zeros(slots, 1, 1, device=device)
        self._replace(linear)
        if device.type == "cpu":
            _keep_channels_last(self.unet)
        if run.engine.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()  # type: ignore[operator]
        self.train()
        self._told: Conditioning | None = None  # columns [K, prompts of a slot, ...]
        self._prompts = torch.zeros(0, dtype=torch.int64)
        self._prior_weights = torch.ones(slots, device=device)

    def take(self, slot: int, run: Run, prompts: Sequence[Sequence[int]]) -> None:
        """Have a slot train a run, whose prompts [K, L] are encoded once; its adapters are not touched."""
        ids = torch.tensor(prompts, device=self._scales.device)
        with torch.no_grad():
            encoded = encode_text(self._text_encoder, ids)
        if self._told is None:
            self._told = encoded.map(lambda one: one.new_zeros(self._slots, 0, *one.shape[1:]))
            self._prompts = ids.new_full((self._slots, 0, ids.shape[1]), -1)
        if (
            more := len(ids) - self._prompts.shape[1]
        ) > 0:  # runs may have captions of their own, as many as photos
            room = encoded.map(lambda one: one.new_zeros(self._slots, more, *one.shape[1:]))
            self._told = Conditioning.cat([self._told, room], dim=1)
            nothing = ids.new_full((self._slots, more, ids.shape[1]), -1)
            self._prompts = torch.cat([self._prompts, nothing], 1)
        self._told[slot, : len(encoded)].copy_(encoded)
        self._prompts[slot, : len(ids)] = ids
        self._prior_weights[slot] = run.prior.weight or 1.0
        self._scales[slot] = run.train.lora.alpha / run.train.lora.rank

    def forward(self, batch: PairBatch) -> BankLosses:
        """The losses of K * R rows; backward from the sum of `loss` writes `adapters.gradients`."""
        assert self._told is not None  # some slot has a run
        shown = batch.noise if batch.shown_noise is None else batch.shown_noise
        noisy = self._schedule.add_noise(batch.latents, shown, batch.timesteps)
        if noisy.device.type == "cpu":
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        slot = torch.arange(len(noisy), device=noisy.device) // (len(noisy) // self._slots)
        prompt = (batch.token_ids[:, None] == self._prompts[slot]).all(dim=2).int().argmax(dim=1)
        kind = noisy.device.type
        with nullcontext() if self._autocast is None else torch.autocast(kind, self._autocast):
            told = self._told[slot, prompt].of_sizes(batch.sizes)
            prediction = predict(self.unet, noisy, self._schedule.asked(batch.timesteps), told)
        target = self._schedule.target(batch.latents, batch.noise, batch.timesteps)
        weighted = (self._criterion.row_losses(prediction, target, batch.timesteps) * batch.weight).view(
            self._slots, -1
        )
        parts, is_class = weighted.detach(), batch.role.view(self._slots, -1) == Role.CLASS
        # not by products with 0, which keep what is no number
        subject, of_class = (parts.masked_fill(mask, 0.0).sum(dim=1) for mask in (is_class, ~is_class))
        return BankLosses(weighted.sum(dim=1), subject, of_class / self._prior_weights)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A context in which no gradient is computed."""
        self.eval()
        with torch.no_grad():
            yield
        self.train()

    def _replace(self, linear: Mapping[str, nn.Linear]) -> None:
        """Put our linear layers in place of the UNet's, around the same parameters."""
        own: dict[str, nn.Module] = {name: FrozenLinear(layer) for name, layer in linear.items()}
        for place in self.adapters.layers:
            # leaves that share the memory of the rows
            a, b = (part.detach().requires_grad_() for part in place.parts(self.adapters.values))
            gradients = place.parts(self.adapters.gradients)
            own[place.name] = BankLinear(linear[place.name], a, b, gradients, self._scales)
        for name, layer in own.items():
            parent, _, child = name.rpartition(".")
            setattr(self.unet.get_submodule(parent), child, layer)


def _named(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """The modules whose names end in a target, as PEFT finds them."""
    ends = tuple(f".{target}" for target in targets)
    return [name for name, _ in model.named_modules() if f".{name}".endswith(ends)]


def stack(parts: Sequence[PairBatch | None], rows: int) -> PairBatch:
    """The rows of all slots, in order: `rows` of each, zeros of weight 0 where a slot has fewer or none."""
    like = next(part for part in parts if part is not None)
    columns = [column.name for column in fields(PairBatch) if getattr(like, column.name) is not None]
    return PairBatch(
        **{
            column: torch.cat(
                [
                    _filled(getattr(like, column)[:0] if part is None else getattr(part, column), rows)
                    for part in parts
                ]
            )
            for column in columns
        }
    )


def _filled(column: torch.Tensor, rows: int) -> torch.Tensor:
    """A column with zeros after it."""
    missing = rows - len(column)
    return torch.cat([column, column.new_zeros(missing, *column.shape[1:])]) if missing else column


def _keep_channels_last(unet: nn.Module) -> None:
    """Have convolutions see their input channel by channel within a pixel.

    Source:
        oneDNN then takes four fifths of the time, and tokens become pixels without a copy: at 16 rows of 128 x 16 x 16
        a 3 x 3 convolution to as many channels takes 6.0 instead of 7.5 ms on one EPYC core.
    """

    def order(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(arg.contiguous(memory_format=torch.channels_last) for arg in args)

    for part in unet.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_pre_hook(order)
