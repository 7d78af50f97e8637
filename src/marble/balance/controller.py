"""Closed loop: priorities that follow each reward's measured progress and lift the one that lags."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from marble.rewards import RewardTable

START = 2
"""Epochs whose mean is where progress starts from."""
KEEP = 0.8
"""Decay of the average of the epochs' means: prompts differ from epoch to epoch, and so do their scores."""


class Controller:
    """`priority_k ∝ exp(−rate · (progress_k − mean progress))`, within `[1/limit, limit]`.

    Progress is how far the mean score of an epoch's images has come from where it started, in standard deviations of
    the first epochs' scores, so that rewards of any scale compare.
    """

    def __init__(self, num_rewards: int, *, rate: float, limit: float) -> None:
        """Set up for K rewards."""
        self.rate, self.limit = rate, limit
        self.epochs = torch.zeros(num_rewards, dtype=torch.float64)  # in which each reward was scored
        self.start = torch.zeros(num_rewards, dtype=torch.float64)
        self.spread = torch.zeros(num_rewards, dtype=torch.float64)
        self.mean = torch.zeros(num_rewards, dtype=torch.float64)

    def observe(self, table: RewardTable) -> None:
        """Take in an epoch's scores."""
        scores = table.scores.double()
        judged = table.applies & ~scores.isnan()
        number = judged.sum(dim=0)
        seen = number > 0
        filled = torch.where(judged, scores, 0.0)
        mean = filled.sum(dim=0) / number.clamp_min(1)
        deviation = (torch.where(judged, filled - mean, 0.0).square().sum(dim=0) / number.clamp_min(1)).sqrt()
        early = seen & (self.epochs < START)
        for memory, new in ((self.start, mean), (self.spread, deviation)):
            memory[early] += (new[early] - memory[early]) / (self.epochs[early] + 1)
        later = seen & ~early
        self.mean = torch.where(early, self.start, self.mean)
        self.mean[later] += (1 - KEEP) * (mean[later] - self.mean[later])
        self.epochs += seen

    @property
    def progress(self) -> Tensor:
        """`[K]` in standard deviations of the first scores; 0 for a reward that was constant then."""
        return torch.where(self.spread > 0, (self.mean - self.start) / self.spread.clamp_min(1e-300), 0.0)

    @property
    def priorities(self) -> Tensor:
        """`[K]` float64."""
        ahead = self.progress - self.progress.mean()
        return torch.exp(-self.rate * ahead).clamp(1 / self.limit, self.limit)

    def state_dict(self) -> dict[str, Any]:
        """What has been observed."""
        return {name: getattr(self, name).clone() for name in ("epochs", "start", "spread", "mean")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        for name, value in state.items():
            setattr(self, name, value.clone())
