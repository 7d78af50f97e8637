"""What all objectives have in common, and all that the rest of the library knows of them.

The loss of image n at advantage A is `const[n] + A · slope[n]`, both differentiable in the parameters and
neither depending on A. So gradients of any mixture of rewards are mixtures of gradients, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AffineLoss:
    """A loss per image, affine in the advantage."""

    const: Tensor  # [N]
    slope: Tensor  # [N]

    def __post_init__(self) -> None:
        if self.const.ndim != 1 or self.slope.shape != self.const.shape or not len(self.const):
            raise ValueError(
                f"const and slope must both be [N] with N ≥ 1, got {tuple(self.const.shape)} and "
                f"{tuple(self.slope.shape)}"
            )

    def effective(self, advantages: Tensor) -> Tensor:
        """The advantages `[N, K]` as they enter the loss. Objectives that clip or mask do it here."""
        return advantages

    def at(self, advantage: Tensor) -> Tensor:
        """The loss `[N]` of every image at its advantage `[N]`."""
        return self.const + self.effective(advantage[:, None])[:, 0] * self.slope
