"""How well a direction serves the reward that it serves worst."""

from __future__ import annotations

import torch
from torch import Tensor

from marble.balance import min_norm_weights
from marble.balance.method import Direction

DIRECTIONS = ("weighted_sum", "fresh", "applied")


def worst_cosines(rows: Tensor, applied: Direction, signal: Tensor) -> dict[str, float]:
    """Smallest cosine, over the rewards, of three directions with each reward's own gradient.

    All gradients are raw, before the optimiser, of one batch. Each is looked at whole, and without the part
    of the loss that no advantage enters (a pull to the old policy, common to all rewards).

    Args:
        rows: `[K + 2, P]`: every reward's gradient, the advantage-free one, the raw weighted sum's.
        applied: the direction in use.
        signal: `[K]` bool; rewards without a signal have no direction of their own and are left out.

    Returns:
        `cosine/D` and `cosine_advantage/D` (without the advantage-free part) for D of `weighted_sum`,
        `fresh` (the min-norm direction solved on this very batch) and `applied`. Empty if no reward has a signal.
    """
    rows, used = rows.double(), applied.vector.double()
    free = torch.zeros_like(used) if applied.free is None else applied.free.double()
    own, const, total = rows[:-2][signal], rows[-2], rows[-1]
    if not len(own):
        return {}
    out = {}
    for kind, minus in (("cosine", 0.0), ("cosine_advantage", 1.0)):
        gradients = own - minus * const
        norms = gradients.norm(dim=1).clamp_min(1e-300)
        unit = gradients / norms[:, None]
        fresh = min_norm_weights(unit @ unit.T) @ unit
        directions = (total - minus * const, fresh, used - minus * free)
        for name, direction in zip(DIRECTIONS, directions, strict=True):
            length = direction.norm()
            out[f"{kind}/{name}"] = (unit @ direction / length).min().item() if length > 0 else 0.0
    return out


def reward_cosines(rows: Tensor) -> Tensor:
    """`[K, K]` cosines between the rewards' own gradients, their advantage-free part taken out; rows as above."""
    own = rows[:-2].double() - rows[-2].double()
    unit = own / own.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return unit @ unit.T
