"""From a Gram to the weights of a direction, by name, with priorities."""

from __future__ import annotations

import torch
from torch import Tensor

from marble.balance.min_norm import min_norm_weights
from marble.balance.torchjd import TORCHJD, torchjd_weights

SOLVERS = ("min-norm", "uniform", *TORCHJD)


def solve(name: str, gram: Tensor, priorities: Tensor, seed: int = 0) -> Tensor:
    """Weights of K gradients, summing to 1.

    Min-norm takes a priority as a demand: it solves for the gradients divided by their priorities, so that every
    reward in the balance gains in proportion to its priority. For the other solvers a priority multiplies the weight.

    Args:
        name: one of `SOLVERS`.
        gram: `[K, K]` inner products, of normalised gradients unless scale should count.
        priorities: `[K]`, > 0.
        seed: for solvers that draw an order.

    Returns:
        `[K]` float64.

    Raises:
        ValueError: no such solver.
    """
    if name not in SOLVERS:
        raise ValueError(f"solver must be one of {SOLVERS}, got {name!r}")
    wanted = priorities.double()
    if name == "min-norm":
        weights = min_norm_weights(gram.double() / (wanted[:, None] * wanted)) / wanted
    elif name == "uniform":
        weights = wanted
    else:
        weights = torchjd_weights(name, gram, seed) * wanted
    total = weights.sum()
    return weights / total if total > 0 else torch.full_like(weights, 1 / len(weights))
