"""One gradient per reward, by one plain backward pass each: the slow obvious way, kept as the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from marble.objectives import AffineLoss


def reference_gradients(
    loss: AffineLoss, advantages: Tensor, parameters: Sequence[Tensor], applies: Tensor | None = None
) -> Tensor:
    """`g_k = grad mean_n loss.at(A[:, k])` for every column k.

    Args:
        loss: N per-image losses with a graph behind them; the graph is kept.
        advantages: `[N, K]`.
        parameters: what to differentiate by, P numbers in all; one that the loss does not depend on gets 0.
        applies: `[N, K]` bool; if given, column k is averaged over the images where it is true (all-false
            columns get a zero gradient), as the authors' code does, instead of over all N.

    Returns:
        `[K, P]` in the parameters' dtype.

    Raises:
        ValueError: `advantages` is not `[N, K]` or not finite, or a parameter is frozen.
    """
    check_advantages(loss, advantages)
    check_trainable(parameters)
    rows = []
    for k in range(advantages.shape[1]):
        each = loss.at(advantages[:, k].to(loss.const))
        if applies is None:
            mean = each.mean()
        else:
            judged = applies[:, k].to(each)
            mean = (each * judged).sum() / judged.sum().clamp_min(1)
        parts = torch.autograd.grad(mean, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def check_advantages(loss: AffineLoss, advantages: Tensor, name: str = "advantages") -> None:
    """Raise a ValueError unless `advantages` is `[N, K]` with the loss's N and K ≥ 1, and finite."""
    count = len(loss.const)
    if advantages.ndim != 2 or len(advantages) != count or not advantages.shape[1]:
        raise ValueError(f"{name} must be [N={count}, K], got {tuple(advantages.shape)}")
    if not advantages.isfinite().all():
        raise ValueError(f"{name} must be finite; give 0 where a reward does not apply")


def check_trainable(parameters: Sequence[Tensor]) -> None:
    """Raise a ValueError if one of `parameters` is frozen."""
    if frozen := [i for i, p in enumerate(parameters) if not p.requires_grad]:
        raise ValueError(f"parameters {frozen} are frozen (requires_grad is False)")
