"""Whether some rewards truly oppose each other, as far as the solves so far have shown."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from marble.balance.dual_cone import split_norms

_DECAY = 0.9
_OPPOSED = -0.5
_SOLVES = 2
"""One batch's cosines are mostly noise: a pair counts as opposed from its second solve on, if the moving average of its
cosines is below −0.5. Of 98 runs on the two frozen worlds that would have been none, of 20 with a dial of true conflict
at 0.5 and more, all (docs/benchmarks.md)."""


class Opposition:
    """Watches the cosines of the rewards' own gradients (the parts that advantages enter) over solves.

    Whole gradients would hide it: they share the pull to the old policy, which makes even opposed rewards look alike.
    """

    def __init__(self, num_rewards: int) -> None:
        """Set up for K = `num_rewards`."""
        self.cosines = torch.zeros(num_rewards, num_rewards, dtype=torch.float64)
        self.mass = torch.zeros_like(self.cosines)
        self.solves = torch.zeros(num_rewards, num_rewards, dtype=torch.int64)

    def observe(self, gram: Tensor, signal: Tensor) -> None:
        """Take in a solve.

        Args:
            gram: `[K, K]` inner products of the rewards' own gradients.
            signal: `[K]` bool; pairs of which one has no signal, or a gradient that is zero or not finite, are not
                counted.
        """
        squares = gram.diagonal()
        fine = signal & squares.isfinite() & (squares > 0)
        pairs = fine[:, None] & fine
        _, cosines = split_norms(torch.where(pairs, gram.double(), 0.0).numpy())
        self.cosines = torch.where(
            pairs, _DECAY * self.cosines + (1 - _DECAY) * torch.from_numpy(cosines), self.cosines
        )
        self.mass = torch.where(pairs, _DECAY * self.mass + 1 - _DECAY, self.mass)
        self.solves += pairs

    def pairs(self) -> list[tuple[int, int]]:
        """The pairs of rewards that oppose each other, lower index first."""
        opposed = (self.solves >= _SOLVES) & (self.cosines < _OPPOSED * self.mass)
        return [(int(a), int(b)) for a, b in np.argwhere(opposed.triu(1).numpy())]

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that `observe` changes."""
        return {"cosines": self.cosines, "mass": self.mass, "solves": self.solves}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state_dict`."""
        self.cosines, self.mass, self.solves = (state[name].clone() for name in ("cosines", "mass", "solves"))
