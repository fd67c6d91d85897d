"""This file is where linear layers of a bank compute: the frozen weight once for all slots, the adapter of each.

K slots, T rows of all images of a slot together, d_in and d_out of the layer, r rank.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional


class FrozenLinear(nn.Module):
    """A linear layer around a frozen weight that it does not own.

    Args:
        linear: Gives its parameters.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output [..., d_out] for x [..., d_in]."""
        return _linear(x, self.weight, self.bias)


class BankLinear(FrozenLinear):
    """A frozen linear layer with an adapter for each slot; the rows of its input are ordered by slot.

    Gradients of adapters are written where the optimizer wants them, once per backward pass, and not added up.

    Args:
        linear: Gives the frozen parameters.
        a: Of all slots [K, r, d_in]; requires a gradient, so that autograd comes here.
        b: Of all slots, transposed [K, r, d_out]: both products with it are then as fast as those with A.
        gradients: Where those of `a` and of `b` are written, of the same shapes.
        scales: What B A of each slot is multiplied with [K, 1, 1].
    """

    def __init__(
        self,
        linear: nn.Linear,
        a: torch.Tensor,
        b: torch.Tensor,
        gradients: tuple[torch.Tensor, torch.Tensor],
        scales: torch.Tensor,
    ) -> None:
        super().__init__(linear)
        self._a, self._b, self._gradients, self._scales = a, b, gradients, scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output [..., d_out] for x [..., d_in], whose first dimension is divided evenly among the slots."""
        out: torch.Tensor = _Adapted.apply(  # type: ignore[no-untyped-call]
            x, self._a, self._b, self.weight, self.bias, self._gradients, self._scales
        )
        return out


class _Adapted(torch.autograd.Function):
    """x W^T + bias + scales * (x A^T) B^T, every product one call for all slots."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        gradients: tuple[torch.Tensor, torch.Tensor],
        scales: torch.Tensor,
    ) -> torch.Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        x = x.to(dtype)
        slots = x.reshape(len(a), -1, x.shape[-1])
        out = _linear(slots, weight.to(dtype), None if bias is None else bias.to(dtype))
        low = torch.bmm(slots, a.to(dtype).mT).mul_(scales)
        ctx.save_for_backward(slots, low, a, b, weight)
        ctx.gradients, ctx.scales = gradients, scales
        return out.baddbmm_(low, b.to(dtype)).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        [grad] = grads
        x, low, a, b, weight = ctx.saved_tensors
        of_a, of_b = ctx.gradients
        slots = grad.reshape(len(a), -1, grad.shape[-1])
        grad_low = torch.bmm(slots, b.to(grad.dtype).mT).mul_(ctx.scales)
        _write(of_b, low.mT, slots)
        _write(of_a, grad_low.mT, x)
        if not ctx.needs_input_grad[0]:
            return (None,) * 7
        back = _linear_back(slots, weight.to(grad.dtype), x).baddbmm_(grad_low, a.to(grad.dtype))
        return back.view(*grad.shape[:-1], -1), *(None,) * 6


def _write(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """The products of a batch of matrices into `out`, whatever its type."""
    if out.dtype == left.dtype:
        torch.bmm(left, right, out=out)
    else:
        out.copy_(torch.bmm(left, right))


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + bias, contiguous. On a CPU as a convolution of one pixel.

    Source:
        Torch gives fp32 products to MKL, which takes half the speed of an AMD processor, and convolutions to oneDNN:
        4096 x 128 by 128 x 1024 in 16.2 and in 5.1 ms on one EPYC core, the way back in 13.2 and in 5.4 ms.
    """
    if not _as_pixels(x):
        return functional.linear(x, weight, bias)
    return _rows(functional.conv2d(_pixels(x), weight[:, :, None, None], bias), x)


def _linear_back(grad: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """grad W, contiguous: the gradient of the input of `_linear`, which was `x`."""
    if not _as_pixels(grad):
        return grad @ weight
    back, _, _ = torch.ops.aten.convolution_backward(
        *(_pixels(grad), _pixels(x), weight[:, :, None, None], None),
        *((1, 1), (0, 0), (1, 1), False, (0, 0), 1, (True, False, False)),
    )
    return _rows(back, x)


def _as_pixels(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """Rows [..., d] as images, channels last: 16 of them, below which torch leaves one thread to MKL after all."""
    rows = x.reshape(-1, x.shape[-1])
    images = 16 if len(rows) % 16 == 0 else len(rows)
    return rows.reshape(images, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


def _rows(image: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The image of `_pixels` as rows again."""
    return image.permute(0, 2, 3, 1).reshape(*like.shape[:-1], image.shape[1]).contiguous()
