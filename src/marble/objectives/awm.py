"""Advantage-weighted matching on clean predictions (arXiv 2509.25050; scxue/advantage_weighted_matching, 12b1397).

| code | here |
|---|---|
| `log_prob = −mean (v_theta − v)²`, its weighting "Uniform" | `−error`, at `weight = 1 / sigma²` |
| `ratio = exp(log_prob − old_log_prob)`, `clip_range` 1 | `−slope`, `clip` |
| `ema_beta · mean (v_theta − v_ema)²`, `ema_beta` 1 | `const`, `pull` |
| A clipped to ±5, then divided by 5 | A clipped to ±amax; `pull = amax` has the code's proportions |

The code's ratio is to the policy at the epoch's start and only its penalty to a lagged one; here both are to `old`.
Left out: the weighting "ghuber" of all its configurations (`4 t error^¼` in place of the error) and its second
penalty, the distance to the reference.

The plain form, `A · error`, falls without bound as a bad image's error grows. The ratio has the same gradient where
the policies agree, and is bounded both ways: for `A < 0` the loss `−A · ratio` is at least 0, and for `A > 0` PPO's
clipping ends the gain once the ratio is over `1 + clip`.
"""

from __future__ import annotations

from torch import Tensor

from marble.objectives.affine import AffineLoss
from marble.objectives.ppo import clipped_loss


def awm_loss(
    x0: Tensor,
    x0_theta: Tensor,
    x0_old: Tensor,
    *,
    clip: float = 1.0,
    pull: float = 5.0,
    amax: float = 5.0,
    weight: Tensor | None = None,
) -> AffineLoss:
    """Lower the denoising error on good images and raise it on bad ones, held near the old policy.

    Args:
        x0: `[N, …]` clean latents of the rollout.
        x0_theta: `[N, …]` clean latents as the trained policy predicts them, with gradients; float32 or float64.
        x0_old: `[N, …]` the same by the old policy.
        clip: how far over 1 the ratio may go; > 0. Below 1, it also ends the push away from bad images.
        pull: weight of the squared distance to the old policy's prediction; ≥ 0.
        amax: advantages are clipped to ±amax; > 0.
        weight: `[N]` of each image's errors, finite and ≥ 0; None for 1. `1 / sigma²` makes a flow model's
            errors those of its velocity.

    Returns:
        `const = pull · weight · mean (x0_theta − x0_old)²` and `slope = −exp(error_old − error_theta)`, `[N]` each,
        with `error = weight · mean (x0_… − x0)²`, means over all but the batch. The exponent is capped at 20 (a
        ratio of 5e8), so that it cannot overflow: an image beyond it is no longer pushed away.

    Raises:
        ValueError: shapes differ, predictions are in half precision, `weight` is not `[N]`, finite and ≥ 0,
            `clip` or `amax` is not positive, or `pull` is negative.
    """
    if not pull >= 0:
        raise ValueError(f"pull must be >= 0, got {pull}")
    if not x0.shape == x0_theta.shape == x0_old.shape:
        raise ValueError(
            "x0, x0_theta and x0_old must have one shape, got "
            f"{tuple(x0.shape)}, {tuple(x0_theta.shape)}, {tuple(x0_old.shape)}"
        )
    if weight is not None and weight.shape != x0.shape[:1]:
        raise ValueError(f"weight must be [N={len(x0)}], got {tuple(weight.shape)}")
    if weight is not None and not (weight.isfinite() & (weight >= 0)).all():
        raise ValueError(f"weight must be finite and >= 0, got {weight.tolist()}")
    x0_old = x0_old.detach()
    log_ratio = _error(x0_old, x0, weight) - _error(x0_theta, x0, weight)
    return clipped_loss(log_ratio, pull * _error(x0_theta, x0_old, weight), clip=clip, amax=amax)


def _error(prediction: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    error = (prediction - target).square().flatten(1).mean(dim=1)
    return error if weight is None else weight * error
