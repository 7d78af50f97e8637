"""A linear layer whose backward pass can hand each sample's own weight gradient to whoever asks.

The weight gradient of sample n is `sum_s delta[n, s] ⊗ x[n, s]` over its tokens s, with `x` what went into the
layer and `delta` the loss's gradient at what came out. For weights `W [N, J]` on the samples, the J sums
`sum_n W[n, j] · gradient_n` cost one pass over the tokens and a small product, hardly more than the plain gradient.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

WORK_BUFFER = 2**22
"""Numbers (16 MB in single precision) that a contraction may hold beside its result; wide layers go in pieces."""


class Listener(Protocol):
    """Where a tapped layer reports."""

    def hear(self, site: int, x: Tensor | None, delta: Tensor) -> bool:
        """Called in every backward pass through a tapped layer, with `x [N · S, in]` and `delta [N · S, out]`.

        Returns:
            Whether this pass wants the gradients of the layer's own parameters. (Autograd does not tell a Python
            function so: its `needs_input_grad` is that of the forward pass.)
        """


class TappedLinear(torch.autograd.Function):
    """`x @ weight.T + bias` for `x [N · S, in]`; its backward pass reports to a listener.

    `x` is kept for it only if the weight is trained. `probe` is a leaf that nothing else depends on; asking for
    its gradient runs backward through every tapped layer and computes no weight's gradient on the way.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        probe: Tensor,
        listener: Listener,
        site: int,
    ) -> Tensor:
        """See the class."""
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.listener, ctx.site = listener, site
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        """See the class."""
        x, weight = ctx.saved_tensors
        plain = ctx.listener.hear(ctx.site, x, delta)
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_x = delta @ weight if wants_x else None
        grad_weight = delta.T @ x if plain and wants_weight else None
        grad_bias = delta.sum(0) if plain and wants_bias else None
        return grad_x, grad_weight, grad_bias, None, None, None


def contract_weight(x: Tensor, delta: Tensor, weights: Tensor | None, rows: Tensor) -> None:
    """Add `sum_n weights[n, j] sum_s delta[n, s] ⊗ x[n, s]` to every row j.

    Args:
        x: `[N · S, in]`, sample after sample.
        delta: `[N · S, out]`.
        weights: `[N, J]`; None for one row of the plain sum.
        rows: `[J, out · in]`, written in place; may be a slice of a wider matrix.
    """
    wide, out = x.shape[1], delta.shape[1]
    x, delta = _matching(x, delta)
    if weights is None:
        target = rows.view(out, wide)
        target.addmm_(delta.T, x) if x.dtype == rows.dtype else target.add_(delta.T @ x)
        return
    count = len(weights)
    x, delta = x.view(count, -1, wide), delta.view(count, -1, out)
    piece = max(1, WORK_BUFFER // (count * wide))
    for start in range(0, out, piece):
        part = delta[:, :, start : start + piece]
        each = torch.bmm(part.transpose(1, 2), x).flatten(1)  # [N, piece · in]
        _add_product(rows[:, start * wide : start * wide + each.shape[1]], weights, each)


def contract_bias(delta: Tensor, weights: Tensor | None, rows: Tensor) -> None:
    """Add `sum_n weights[n, j] sum_s delta[n, s]` to every row j; shapes as in `contract_weight`."""
    dtype = torch.promote_types(delta.dtype, torch.float32)
    if weights is None:
        rows.add_(delta.sum(dim=0, dtype=dtype))
    else:
        _add_product(rows, weights, delta.view(len(weights), -1, delta.shape[1]).sum(dim=1, dtype=dtype))


def _add_product(rows: Tensor, weights: Tensor, each: Tensor) -> None:
    """`rows += weights.T @ each`, in the widest of the three dtypes."""
    if rows.dtype == weights.dtype == each.dtype:
        rows.addmm_(weights.T, each)
    else:
        dtype = torch.promote_types(torch.promote_types(rows.dtype, weights.dtype), each.dtype)
        rows.add_(weights.to(dtype).T @ each.to(dtype))


def _matching(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype: half precision is kept where the hardware multiplies it, and widened where it does not."""
    dtype = delta.dtype
    if dtype.itemsize < 4 and not delta.is_cuda:
        dtype = torch.float32
    return x.to(dtype), delta.to(dtype)
