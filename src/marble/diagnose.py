"""How well a direction serves the reward that it serves worst."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from marble.balance import min_norm_weights


def worst_cosines(
    gram: Tensor, parts: Tensor, signal: Tensor, directions: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """Smallest cosine, over the rewards, of some directions with each reward's own gradient.

    All gradients are raw, before the optimiser, of one batch. Each is looked at whole, and without the part
    of the loss that no advantage enters (a pull to the old policy, common to all rewards).

    Args:
        gram: `[R, R]` inner products of R vectors.
        parts: `[K + 1, R]`: the rewards' own parts and the advantage-free one, as mixtures of the vectors.
        signal: `[K]` bool; rewards without a signal have no direction of their own and are left out.
        directions: by name, each as a mixture `[R]`, whole and without its advantage-free part.

    Returns:
        `cosine/D` and `cosine_advantage/D` (without the advantage-free part) for every direction and for `fresh`, the
        min-norm direction solved on this very batch. Empty if no reward has a signal.
    """
    gram, out = gram.double(), {}
    fine = gram.diagonal().isfinite()
    gram = torch.where(fine[:, None] & fine, gram, 0.0)
    own = parts[:-1][signal & ~(parts[:-1, ~fine] != 0).any(dim=1)]
    if not len(own):
        return {}
    for place, (kind, rewards) in enumerate((("cosine", own + parts[-1]), ("cosine_advantage", own))):
        products = rewards @ gram
        norms = (products * rewards).sum(dim=1).clamp_min(1e-300).sqrt()
        fresh = min_norm_weights((products @ rewards.T) / (norms[:, None] * norms)) / norms @ rewards
        mixtures = {name: pair[place].double() for name, pair in directions.items()} | {"fresh": fresh}
        for name, mixture in mixtures.items():
            length = (mixture @ gram @ mixture).clamp_min(0).sqrt()
            out[f"{kind}/{name}"] = ((products @ mixture / norms).min() / length).item() if length > 0 else 0.0
    return out


def reward_cosines(gram: Tensor) -> Tensor:
    """`[K, K]` cosines between vectors, from their Gram; 0 for one that is zero or not finite."""
    norms = gram.double().diagonal().sqrt()
    fine = norms.isfinite() & (norms > 0)
    cosines = gram.double() / torch.where(fine, norms, 1.0)[:, None] / torch.where(fine, norms, 1.0)
    return torch.where(fine[:, None] & fine, cosines, 0.0)
