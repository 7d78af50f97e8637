"""A toy epoch for tests of methods: scores, a network off-policy, and the rows that a method asks for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from marble import AffineLoss, nft_loss
from marble.balance.method import Method
from marble.balance.signals import Signals, signals_of
from marble.config import Config, make_config
from marble.gradients import gram_of
from marble.rewards import RewardTable

GROUPS, SIZE = 6, 4
IMAGES = GROUPS * SIZE


def config(*rewards: dict, objective: dict | None = None, updates: int = 10, **balance: object) -> Config:
    """Three rewards, or those given (each by what it has besides a name); a solve every second update."""
    if balance.get("estimate") == "halves":
        balance.setdefault("smooth", "gram")
    terms = [{"reward": f"r{k}", **term} for k, term in enumerate(rewards or ({}, {}, {}))]
    return make_config(
        {
            "prompts": [{"source": "x"}],
            "rewards": terms,
            "objective": {"kl": 0.0, **(objective or {})},
            "balance": {"refresh": 2, **balance},
            "budget": {"updates": updates},
        }
    )


def table_of(seed: int = 0) -> RewardTable:
    """Three rewards on scales of their own, the last a specialist that judges the last half of the prompts."""
    scores = torch.randn(IMAGES, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    scores = scores * torch.tensor([0.02, 0.3, 1.0])
    scores[: IMAGES // 2, 2] = torch.nan
    return RewardTable(["a", "b", "c"], scores, ~scores.isnan())


def signals_for(table: RewardTable, weights: Tensor | None = None, size: int = SIZE) -> Signals:
    groups = torch.arange(len(table.scores)) // size
    weights = torch.tensor([1.0, 2.0, 0.5]) if weights is None else weights
    return signals_of(table, groups, weights, std="group")


def made_up(
    per_reward: Tensor, *, signal: Tensor | None = None, half: Tensor | None = None, weighted_sum: Tensor | None = None
) -> Signals:
    """Signals given outright; every reward applies everywhere."""
    count, rewards = per_reward.shape
    return Signals(
        per_reward,
        per_reward.sum(dim=1) if weighted_sum is None else weighted_sum,
        torch.ones(count, rewards, dtype=torch.bool),
        torch.ones(rewards, dtype=torch.bool) if signal is None else signal,
        torch.arange(count) % 2 if half is None else half,
    )


@dataclass(frozen=True)
class World:
    """A small network off-policy, in double precision, and its loss on the epoch's images."""

    loss: AffineLoss
    parameters: list[Tensor]

    def gradient(self, losses: Tensor) -> Tensor:
        """`[P]` of the mean."""
        parts = torch.autograd.grad(losses.mean(), self.parameters, retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    def at(self, advantage: Tensor) -> Tensor:
        """`[P]` of the loss at one advantage an image, by one backward pass."""
        return self.gradient(self.loss.at(advantage.double()))

    def rows(self, method: Method, signals: Signals) -> Tensor:
        """What an exact update gathers for the method."""
        for_slope, for_const = (part.double() for part in method.columns(signals))
        each = [self.loss.effective(for_slope)[:, j] * self.loss.slope for j in range(for_slope.shape[1])]
        each += [for_const[:, i] * self.loss.const for i in range(for_const.shape[1])]
        return torch.stack([self.gradient(losses) for losses in each])

    def exact(self, method: Method, signals: Signals) -> Tensor:
        """`[P]`: the direction of an exact update."""
        rows = self.rows(method, signals)
        return method.solve(gram_of(rows), signals) @ rows


def world_of(seed: int = 1, amax: float = 5.0) -> World:
    generator = torch.Generator().manual_seed(seed)
    x0, x, old = torch.randn(3, IMAGES, 5, dtype=torch.float64, generator=generator)
    weight = torch.randn(5, 5, dtype=torch.float64, generator=generator).mul_(0.4).requires_grad_()
    bias = torch.randn(5, dtype=torch.float64, generator=generator).requires_grad_()
    return World(nft_loss(x0, x @ weight.T + bias, old, beta=0.5, amax=amax), [weight, bias])


def vectors(method: Method, own: list[list[float]], const: list[float], signals: Signals) -> Tensor:
    """Direction of an exact update whose parts are given outright, for methods that take rewards and one const."""
    rows = torch.tensor([*own, const], dtype=torch.float64)
    return method.solve(rows @ rows.T, signals) @ rows
