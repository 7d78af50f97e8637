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

    def effective(self, advantages: Tensor) -> Tensor:
        """The advantages `[N, K]` as they enter the loss. Objectives that clip or mask do it here."""
        return advantages

    def at(self, advantage: Tensor) -> Tensor:
        """The loss `[N]` of every image at its advantage `[N]`."""
        return self.const + self.effective(advantage[:, None])[:, 0] * self.slope
