"""How well a direction serves each reward, and the one that it serves worst."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from marble.balance import min_norm_weights


def worst_cosines(
    gram: Tensor, parts: Tensor, signal: Tensor, directions: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """Smallest cosine, over the rewards, of some directions with each reward's own gradient.

    Args:
        gram: as for `direction_cosines`, and so are the others.
        parts: `[K + 1, R]`.
        signal: `[K]` bool.
        directions: by name.

    Returns:
        By the keys of `direction_cosines`; empty if no reward has a signal.
    """
    found = direction_cosines(gram, parts, signal, directions)
    return {key: cosines[~cosines.isnan()].min().item() for key, cosines in found.items()}


def direction_cosines(
    gram: Tensor, parts: Tensor, signal: Tensor, directions: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Cosines of some directions with each reward's own gradient.

    All gradients are raw, before the optimiser, of one batch. Each is looked at whole, and without the part
    of the loss that no advantage enters (a pull to the old policy, common to all rewards).

    Args:
        gram: `[R, R]` inner products of R vectors.
        parts: `[K + 1, R]`: the rewards' own parts and the advantage-free one, as mixtures of the vectors.
        signal: `[K]` bool; rewards without a signal have no direction of their own and are left out.
        directions: by name, each as a mixture `[R]`, whole and without its advantage-free part.

    Returns:
        `cosine/D` and `cosine_advantage/D` (without the advantage-free part) for every direction and for `fresh`, the
        min-norm direction solved on this very batch: `[K]` float64 each, NaN for a reward that is left out, 0 for a
        direction that is zero. Empty if no reward has a signal.
    """
    gram, out = gram.double(), {}
    fine = gram.diagonal().isfinite()
    gram = torch.where(fine[:, None] & fine, gram, 0.0)
    used = signal & ~(parts[:-1, ~fine] != 0).any(dim=1)
    own = parts[:-1][used]
    if not len(own):
        return {}
    for place, (kind, rewards) in enumerate((("cosine", own + parts[-1]), ("cosine_advantage", own))):
        products = rewards @ gram
        norms = _norms(rewards, gram)
        mixtures = {name: pair[place].double() for name, pair in directions.items()}
        mixtures["fresh"] = fresh_mixture(rewards, gram)
        for name, mixture in mixtures.items():
            length = (mixture @ gram @ mixture).clamp_min(0).sqrt()
            cosines = torch.full((len(signal),), torch.nan, dtype=torch.float64)
            cosines[used] = products @ mixture / norms / length if length > 0 else 0.0
            out[f"{kind}/{name}"] = cosines
    return out


def fresh_mixture(rewards: Tensor, gram: Tensor) -> Tensor:
    """`[R]`: the min-norm direction of gradients brought to unit length, as a mixture of the vectors.

    Args:
        rewards: `[k, R]` float64, the gradients as mixtures of R vectors; k ≥ 1.
        gram: `[R, R]` float64, finite inner products of the vectors.
    """
    norms = _norms(rewards, gram)
    return min_norm_weights(rewards @ gram @ rewards.T / (norms[:, None] * norms)) / norms @ rewards


def _norms(rewards: Tensor, gram: Tensor) -> Tensor:
    return (rewards @ gram * rewards).sum(dim=1).clamp_min(1e-300).sqrt()


def reward_cosines(gram: Tensor) -> Tensor:
    """`[K, K]` cosines between vectors, from their Gram; 0 for one that is zero or not finite."""
    norms = gram.double().diagonal().sqrt()
    fine = norms.isfinite() & (norms > 0)
    cosines = gram.double() / torch.where(fine, norms, 1.0)[:, None] / torch.where(fine, norms, 1.0)
    return torch.where(fine[:, None] & fine, cosines, 0.0)
