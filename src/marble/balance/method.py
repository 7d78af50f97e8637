"""How a method turns per-reward advantages and gradients into the direction of one update.

| method | advantage of an amortised update | at a refresh |
|---|---|---|
| `weighted-sum` | of the weighted sum of raw scores | never |
| `uniform` | equal weights | only to learn the norms, if they are folded |
| `marble` | smoothed min-norm weights, norms folded, spread matched | the same, from the refresh's gradients |
| `published` | smoothed min-norm weights as they are | fresh weights on normalised gradients, rescaled |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from marble.advantages import fill_missing, group_advantages, has_signal
from marble.balance.balancer import Balancer
from marble.config import Balance, Config
from marble.rewards import RewardTable


@dataclass(frozen=True)
class Signals:
    """What an epoch's scores say, in advantages."""

    per_reward: Tensor  # [N, K] float32, clipped by the objective later
    weighted_sum: Tensor  # [N] float32, of the weighted sum of raw scores
    applies: Tensor  # [N, K] bool
    signal: Tensor  # [K] bool, see `has_signal`


def signals_of(table: RewardTable, group_ids: Tensor, weights: Tensor, *, std: str) -> Signals:
    """Advantages of every reward and of their weighted sum.

    Where a reward judges none of a prompt's images it adds nothing to their sums; where it judges some, the others
    count as their mean.
    """
    total = (fill_missing(table.scores, group_ids, table.applies) * weights).sum(dim=1, keepdim=True)
    return Signals(
        group_advantages(table.scores, group_ids, table.applies, std).float(),
        group_advantages(total, group_ids, None, std)[:, 0].float(),
        table.applies,
        has_signal(table.scores, group_ids, table.applies),
    )


@dataclass(frozen=True)
class Direction:
    """The direction of an update, and the part of it that no advantage enters (None where nobody asked)."""

    vector: Tensor  # [P]
    free: Tensor | None  # [P]


class Method:
    """One of the methods above: asks for gradients when it wants them, and gives the update's direction."""

    def __init__(self, config: Config) -> None:
        """Set up from a checked configuration."""
        self.settings: Balance = config.balance
        self.amax = config.objective.amax
        self.fold = self.settings.norms == "folded"
        self.match = self.settings.advantage_scale == "match"
        self.balancer: Balancer | None = None
        if self.settings.method != "weighted-sum":
            self.balancer = Balancer(
                len(config.rewards),
                refresh=self.settings.refresh,
                decay=self.settings.decay,
                finish=self.settings.finish,
                updates=config.budget.updates,
                solver="uniform" if self.settings.method == "uniform" else "min-norm",
                fold=self.fold,
            )

    @property
    def to_the_letter(self) -> bool:
        """Whether a refresh applies the fresh weights to normalised gradients, as published."""
        return not self.fold and not self.match and self.settings.method in ("marble", "published")

    def due(self) -> bool:
        """Whether the coming update wants every reward's gradient."""
        return self.balancer is not None and self.balancer.due()

    def combined(self, signals: Signals) -> Tensor:
        """`[N]`: the one advantage that an amortised update uses."""
        if self.balancer is None:
            return self._matched(signals.weighted_sum.clamp(-self.amax, self.amax))
        clipped = signals.per_reward.clamp(-self.amax, self.amax)
        return self._matched(clipped @ self.balancer.coefficients.to(clipped))

    def _matched(self, advantage: Tensor) -> Tensor:
        return advantage * self._strength(advantage) if self.match else advantage

    @staticmethod
    def _strength(advantage: Tensor) -> Tensor:
        """What brings the root mean square of the advantages that are not 0 to 1."""
        some = advantage[advantage != 0]
        return 1 / some.square().mean().sqrt().clamp_min(1e-6) if len(some) else advantage.new_tensor(1.0)

    def advance(self) -> None:
        """Begin an update that is not `due()`."""
        if self.balancer is not None:
            self.balancer.step()

    def refresh(self, rows: Tensor, signals: Signals, free: Tensor | None = None) -> Direction | None:
        """Begin an update that is `due()`, with its gradients, and give its direction.

        Args:
            rows: `[K, P]`, every reward's gradient averaged over the images that it can judge, if `to_the_letter`;
                else `[K + 1, P]`, every reward's and the advantage-free one, averaged over all images.
            signals: of this epoch.
            free: `[K, P]`, if `to_the_letter`: the advantage-free parts of `rows`, for a diagnosis.

        Returns:
            The direction; None after a published refresh in which no reward has a signal. Matched advantages that
            exceed the objective's bound are clipped in amortised updates, but not here.
        """
        assert self.balancer is not None
        count = self.balancer.num_rewards
        own = rows[:count].double()
        self.balancer.step(own @ own.T, signals.signal)
        if self.to_the_letter:
            weights = self._published_weights(own.norm(dim=1), signals.signal)
            if weights is None:
                return None
            vector = (weights @ own).to(rows.dtype)
            return Direction(vector, None if free is None else weights.to(free) @ free)
        weights = self.balancer.coefficients.to(rows)
        clipped = signals.per_reward.clamp(-self.amax, self.amax)
        strength = self._strength(clipped @ weights) if self.match else 1.0
        return Direction(rows[count] + strength * (weights @ (rows[:count] - rows[count])), rows[count])

    def _published_weights(self, norms: Tensor, signal: Tensor) -> Tensor | None:
        """`alpha_k mean|g| / |g_k|` of the fresh solution; rewards without a signal take no part."""
        assert self.balancer is not None
        used = (norms > 0) & signal
        if self.balancer.solution is None or not used.any():
            return None
        alpha = torch.where(used, self.balancer.solution, 0.0)
        return torch.where(used, alpha / alpha.sum() / norms, 0.0) * norms[used].mean()
