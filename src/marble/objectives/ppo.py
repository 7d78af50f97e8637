"""PPO's clipped loss on log-probabilities, as DDPO (arXiv 2305.13301) and Flow-GRPO (arXiv 2505.05470) take it.

| there | here |
|---|---|
| `ratio = exp(log_prob − log_prob_old)` | `−slope` |
| `max(−A ratio, −A clip(ratio, 1−clip, 1+clip))` | `A · slope`, the clipped entries of A zeroed in `effective` |
| `+ beta · KL to the reference` | `const` |

An entry of A is clipped where `A > 0` and `ratio > 1 + clip`, or `A < 0` and `ratio < 1 − clip`: decided for
each image and each reward, since the rewards' signs differ. There PPO's loss is the constant
`−A (1 ± clip)`, and here it is 0. So the value of `at` differs from PPO's by that constant; the gradient is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from marble.objectives.affine import AffineLoss

_MOST = 20.0


@dataclass(frozen=True)
class ClippedLoss(AffineLoss):
    """`const − A · ratio`, without the entries of A that PPO clips."""

    clip: float
    amax: float

    def effective(self, advantages: Tensor) -> Tensor:
        """Clip to ±amax, and zero where the ratio has gone further than `clip` the way that A's sign wants."""
        ratio = -self.slope.detach()[:, None]
        clipped = ((advantages > 0) & (ratio > 1 + self.clip)) | ((advantages < 0) & (ratio < 1 - self.clip))
        return advantages.clamp(-self.amax, self.amax).masked_fill(clipped, 0)


def clipped_loss(log_ratio: Tensor, const: Tensor, *, clip: float, amax: float) -> ClippedLoss:
    """What every objective on a probability ratio comes down to; arguments, cap and errors as in `ppo_loss`."""
    if not clip > 0 or not amax > 0:
        raise ValueError(f"clip and amax must be > 0, got clip={clip}, amax={amax}")
    if log_ratio.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            "log-probabilities must be float32 or float64, since half precision rounds ratios near 1 by more than "
            f"usual clip ranges, got {log_ratio.dtype}"
        )
    return ClippedLoss(const, -log_ratio.clamp_max(_MOST).exp(), clip, amax)


def ppo_loss(
    log_prob: Tensor, log_prob_old: Tensor, *, clip: float, amax: float, kl: Tensor | None = None
) -> AffineLoss:
    """Make the sampled steps of good images likelier and of bad ones less likely, up to a ratio of 1 ± clip.

    DDPO and Flow-GRPO average log-probabilities over a latent's dimensions, and their clip ranges (1e-4, 1e-5)
    are made for that: between summed ones the ratio's logarithm is as many times larger as there are dimensions.

    Args:
        log_prob: `[N]` log-probability of each image's sampled step under the trained policy, with gradients;
            float32 or float64.
        log_prob_old: `[N]` the same by the policy that sampled it.
        clip: how far from 1 the ratio may go; > 0, and from 1 on only positive advantages are ever clipped.
        amax: advantages are clipped to ±amax; > 0.
        kl: `[N]` penalty on each image, already weighted, such as the KL to the reference; None for none.

    Returns:
        `const = kl` and `slope = −exp(log_prob − log_prob_old)`, `[N]` each. The exponent is capped at 20 (a ratio
        of 5e8), so that it cannot overflow: an image beyond it is no longer pushed away.

    Raises:
        ValueError: shapes are not one `[N]`, log-probabilities are in half precision, or `clip` or `amax` is not
            positive.
    """
    shapes = [tuple(each.shape) for each in (log_prob, log_prob_old, kl) if each is not None]
    if log_prob.ndim != 1 or len(set(shapes)) != 1:
        raise ValueError(f"log_prob, log_prob_old and kl must have one shape [N], got {', '.join(map(str, shapes))}")
    const = torch.zeros_like(log_prob) if kl is None else kl
    return clipped_loss(log_prob - log_prob_old.detach(), const, clip=clip, amax=amax)
