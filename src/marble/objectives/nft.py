"""DiffusionNFT's loss on clean predictions (arXiv 2509.16117; the form is that of its authors' code, 24af555).

| code | here |
|---|---|
| `r = clip(A, −Amax, Amax) / (2 Amax) + 1/2` | in `effective`: A clipped |
| `positive_loss`, `negative_loss` | `l_plus`, `l_minus` |
| `loss = Amax · (r L+ + (1−r) L−) / beta` | `const + A · slope` |
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from marble.objectives.affine import AffineLoss

_LEAST_WEIGHT = 1e-5


@dataclass(frozen=True)
class _NFTLoss(AffineLoss):
    amax: float

    def effective(self, advantages: Tensor) -> Tensor:
        return advantages.clamp(-self.amax, self.amax)


def nft_loss(x0: Tensor, x0_theta: Tensor, x0_old: Tensor, *, beta: float, amax: float) -> AffineLoss:
    """Pull good images' predictions towards them and push bad ones' away, both relative to the old policy.

    Args:
        x0: `[N, …]` clean latents of the rollout.
        x0_theta: `[N, …]` clean latents as the trained policy predicts them, with gradients.
        x0_old: `[N, …]` the same by the old policy.
        beta: how far the implicit positive and negative policies stand from the old one; > 0.
        amax: advantages are clipped to ±amax; > 0.

    Returns:
        `const = amax (L+ + L−) / (2 beta)`, `slope = (L+ − L−) / (2 beta)`, `[N]` each, with
        `L± = mean((x± − x0)² / w±)`, `x+ = beta x0_theta + (1−beta) x0_old`,
        `x− = (1+beta) x0_old − beta x0_theta`, and `w± = mean|x± − x0|` detached, at least 1e-5.

    Raises:
        ValueError: shapes differ, or `beta` or `amax` is not positive.
    """
    if not beta > 0 or not amax > 0:
        raise ValueError(f"beta and amax must be > 0, got beta={beta}, amax={amax}")
    if not x0.shape == x0_theta.shape == x0_old.shape:
        raise ValueError(
            "x0, x0_theta and x0_old must have one shape, got "
            f"{tuple(x0.shape)}, {tuple(x0_theta.shape)}, {tuple(x0_old.shape)}"
        )
    x0_old = x0_old.detach()
    l_plus = _scaled_error(beta * x0_theta + (1 - beta) * x0_old - x0)
    l_minus = _scaled_error((1 + beta) * x0_old - beta * x0_theta - x0)
    return _NFTLoss(amax * (l_plus + l_minus) / (2 * beta), (l_plus - l_minus) / (2 * beta), amax)


def _scaled_error(error: Tensor) -> Tensor:
    error = error.flatten(1)
    weight = error.detach().abs().mean(dim=1, keepdim=True).clamp_min(_LEAST_WEIGHT)
    return (error.square() / weight).mean(dim=1)
