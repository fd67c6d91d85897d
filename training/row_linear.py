"""This file is where rows of one forward pass wear different adapters: each row's own A and B, in two products.

A place of the batch holds the factors of the row that stands there, so nothing is gathered in a step; they are copied
when a row takes its place. Ranks are cut into chunks of a fixed size, because the bits of a product depend on its
shape: a row's bits then depend on its own rank alone, and chunks that no row needs are left out.

W rows of a forward, T places of a row's sequence, r = CHUNK, d_in and d_out of a layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn import functional

CHUNK = 16  # rank of one product; smaller ones are filled up with zeros


@dataclass(frozen=True)
class Factors:
    """The adapter of one layer, cut into chunks of ranks."""

    a: torch.Tensor
    """[chunks, r, d_in]."""
    b: torch.Tensor
    """[chunks, r, d_out]: B transposed and scaled."""

    @classmethod
    def of(cls, a: torch.Tensor, b: torch.Tensor, scale: float) -> "Factors":
        """Of A [rank, d_in] and B [d_out, rank]; `scale` is alpha / rank."""
        return cls(_chunks(a.float()), _chunks(b.float().T * scale))

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.a.nbytes + self.b.nbytes


Adapter = Mapping[str, Factors]
"""Factors by the name of the layer; a layer that is not named is left as it is."""


class RowLinear(nn.Module):
    """A linear layer that adds to each row what the row wears. It shares the parameters of the layer it stands for."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._rows, self._a, self._b = rows, torch.zeros(0), torch.zeros(0)
        self._worn = [0] * rows  # chunks of each row

    def wear(self, row: int, factors: Factors | None) -> None:
        """Have a row wear these factors from now on; `None` is nothing."""
        chunks = len(factors.a) if factors else 0
        if chunks > len(self._a):
            self._grow(chunks)
        if factors:
            self._a[:chunks, row].copy_(factors.a)
            self._b[:chunks, row].copy_(factors.b)
        if chunks < self._worn[row]:
            self._a[chunks : self._worn[row], row].zero_()
            self._b[chunks : self._worn[row], row].zero_()
        self._worn[row] = chunks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, T, d_out] of x [n, T, d_in] for the first n rows; also [n, d_out] of [n, d_in]."""
        out, n = functional.linear(x, self.weight, self.bias), len(x)
        chunks = max(self._worn[:n])
        if not chunks:
            return out
        rows, sums = x.reshape(n, -1, x.shape[-1]), out.view(n, -1, out.shape[-1])
        for a, b in zip(self._a[:chunks, :n], self._b[:chunks, :n], strict=True):
            sums.baddbmm_(torch.bmm(rows, a.to(x.dtype).mT), b.to(x.dtype))
        return out

    def _grow(self, chunks: int) -> None:
        def grown(old: torch.Tensor, width: int) -> torch.Tensor:
            new = torch.zeros(chunks, self._rows, CHUNK, width, device=self.weight.device)
            if len(old):
                new[: len(old)] = old
            return new

        self._a = grown(self._a, self.weight.shape[1])
        self._b = grown(self._b, self.weight.shape[0])


class RowAdapters:
    """What the rows of a model's forward pass wear. Layers are replaced when the first row adapts them.

    Args:
        model: Whose linear layers are adapted, in place.
        rows: W, of a forward pass from now on at most.
    """

    def __init__(self, model: nn.Module, rows: int) -> None:
        self._model, self._rows = model, rows
        self._layers: dict[str, RowLinear] = {}
        self._worn: list[Adapter] = [{}] * rows

    def wear(self, adapters: Sequence[Adapter]) -> None:
        """Have row i wear `adapters[i]`; what a row wears already is not copied again.

        Args:
            adapters: Of the first rows; the others keep theirs.
        """
        for row, (adapter, worn) in enumerate(zip(adapters, self._worn, strict=False)):
            if adapter is worn:
                continue
            for name in adapter.keys() | worn.keys():
                self._layer(name).wear(row, adapter.get(name))
            self._worn[row] = adapter

    def _layer(self, name: str) -> RowLinear:
        if name not in self._layers:
            parent, _, child = name.rpartition(".")
            linear = cast(nn.Linear, self._model.get_submodule(name))
            self._layers[name] = RowLinear(linear, self._rows)
            setattr(self._model.get_submodule(parent), child, self._layers[name])
        return self._layers[name]


def _chunks(factor: torch.Tensor) -> torch.Tensor:
    """[chunks, CHUNK, d] of a factor [rank, d], the last chunk filled up with zeros."""
    rank, d = factor.shape
    full = torch.zeros(-(-rank // CHUNK) * CHUNK, d)
    full[:rank] = factor
    return full.view(-1, CHUNK, d)
