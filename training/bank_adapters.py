"""This file is where the adapters of a bank's slots are kept: a row of numbers for each slot.

A row holds, layer by layer, A and then B transposed. Rows rather than tensors, so that an optimizer's step and a norm
are a few calls however many layers there are.

K slots, N numbers of a row, r rank, d_in and d_out of a layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from training.checkpoint import State
from training.lora import fresh_a, parameter_name

CHUNK = (
    1024  # numbers summed at once in a norm: sums of sums lose no digits; rows are filled up to whole chunks
)
_UNET = "unet."  # before the names of parameters, as in the module that trains a run alone


@dataclass(frozen=True)
class Layer:
    """Where the adapter of a layer is in a row."""

    name: str
    """Of the layer in the UNet."""
    start: int
    rank: int
    d_in: int
    d_out: int

    @property
    def end(self) -> int:
        """Where the next one is."""
        return self.start + self.rank * (self.d_in + self.d_out)

    def parts(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A [..., r, d_in] and B transposed [..., r, d_out] of rows [..., N], as views."""
        middle = self.start + self.rank * self.d_in
        a, b = rows[..., self.start : middle], rows[..., middle : self.end]
        shape = (*rows.shape[:-1], self.rank, -1)
        return a.view(shape), b.view(shape)


class Adapters:
    """The adapters of K slots with their gradients and Adam moments, float32 [K, N] each. They start as zeros.

    Args:
        sizes: `(d_in, d_out)` of each adapted layer, by its name.
        rank: Of all.
        slots: K.
        device: Where they are.
        part: Of the base, that the layers are in.
    """

    def __init__(
        self,
        sizes: Mapping[str, tuple[int, int]],
        rank: int,
        slots: int,
        device: torch.device,
        part: str = "unet",
    ) -> None:
        self.part = part
        self.layers: list[Layer] = []
        end = 0
        for name, (d_in, d_out) in sizes.items():
            self.layers.append(Layer(name, end, rank, d_in, d_out))
            end = self.layers[-1].end
        length = -(-end // CHUNK) * CHUNK
        self.values, self.gradients, self.first_moments, self.second_moments = (
            torch.zeros(slots, length, device=device) for _ in range(4)
        )

    def start(self, slot: int, seed: int) -> None:
        """Put into a slot what a run with this seed starts from: A is random, B and the moments are zero."""
        self.clear(slot)
        for layer in self.layers:
            a, _ = layer.parts(self.values[slot])
            a.copy_(fresh_a(seed, f"{self.part}.{layer.name}", a.shape))

    def clear(self, slot: int) -> None:
        """Make a slot's adapters, gradients and moments zeros."""
        for rows in self.rows:
            rows[slot].zero_()

    def load(self, slot: int, state: State) -> None:
        """Put a saved state into a slot."""
        self.clear(slot)
        saved = (state.parameters, state.first_moments, state.second_moments)
        for rows, tensors in zip(self._saved, saved, strict=True):
            unknown = set(tensors)
            for layer in self.layers:
                for part, factor in zip(layer.parts(rows[slot]), "AB", strict=True):
                    name = parameter_name(_UNET + layer.name, factor)
                    part.copy_(tensors[name].T if factor == "B" else tensors[name])
                    unknown.remove(name)
            if unknown:
                raise AssertionError(f"a checkpoint of this run holds other parameters: {unknown}")

    def state(self, slot: int, step: int) -> State:
        """A copy of a slot's state after `step` steps, named and shaped as that of a run trained alone."""
        parameters, first, second = (
            {
                parameter_name(_UNET + name, factor): tensor.clone(memory_format=torch.contiguous_format)
                for name, factors in self._factors(rows[slot])
                for factor, tensor in factors.items()
            }
            for rows in self._saved
        )
        return State(step, parameters, first, second)

    def weights(self, slot: int) -> dict[str, dict[str, torch.Tensor]]:
        """A slot's factors `A` [r, d_in] and `B` [d_out, r] of each layer."""
        return dict(self._factors(self.values[slot]))

    def norms(self) -> torch.Tensor:
        """The norm of each slot's gradient, float32 [K]."""
        chunks = torch.linalg.vector_norm(self.gradients.view(len(self.gradients), -1, CHUNK), dim=2)
        norms: torch.Tensor = torch.linalg.vector_norm(chunks, dim=1)
        return norms

    @property
    def _saved(self) -> Sequence[torch.Tensor]:
        return self.values, self.first_moments, self.second_moments

    @property
    def rows(self) -> Sequence[torch.Tensor]:
        """All of them: values, moments, gradients."""
        return *self._saved, self.gradients

    def _factors(self, row: torch.Tensor) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        for layer in self.layers:
            a, b = layer.parts(row)
            yield layer.name, {"A": a, "B": b.T}
