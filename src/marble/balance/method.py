"""How a method turns per-reward advantages and gradients into the direction of one update.

Gradients come in parts: reward k's own part, `mean_n A[n, k] grad slope_n`, and the part that no advantage enters,
`grad mean const`, which is the same for all. A reward's whole gradient is the sum of the two. An exact update gathers
such sums in rows, and its direction is a mixture of the rows. So all is decided on the rows' Gram, and P numbers are
touched once.

| method | advantage of an amortised update | at a solve |
|---|---|---|
| `weighted-sum`, `standardised-sum`, `sequential`, `gdpo`, `reward-dropout` | as their names say | never |
| `uniform` | equal weights | only to learn the norms, if they are folded |
| `published` | smoothed min-norm weights as they are | fresh weights on normalised gradients, rescaled |
| all others | smoothed weights, norms folded, spread matched | the same, from the gradients just taken |

`marble` takes UPGrad's weights instead of min-norm's while rewards truly oppose each other (`opposition.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from marble.balance.balancer import Balancer
from marble.balance.controller import Controller
from marble.balance.dual_cone import keep_floors
from marble.balance.opposition import Opposition
from marble.balance.signals import Signals, signals_of
from marble.catalogue import FROM_GRADIENTS, SUMS
from marble.config import Balance, Config, Stage
from marble.gradients import whole_gram
from marble.rewards import RewardTable
from marble.rules import stage_ends
from marble.seeds import generator

_MIN_NORM = ("marble", "published", "closed-loop", "mgda")


class Method:
    """One of the methods: says which gradients it wants, and how to mix them."""

    def __init__(self, config: Config) -> None:
        """Set up from a checked configuration."""
        self.settings: Balance = config.balance
        self.amax, self.std, self.seed = config.objective.amax, config.objective.std, config.seed
        self.count = len(config.rewards)
        name = self.settings.method
        self.match = self.settings.advantage_scale == "match"
        self.halves = self.settings.estimate == "halves" and name in FROM_GRADIENTS
        self.wanted = torch.tensor([term.priority for term in config.rewards], dtype=torch.float64)
        self.weights = torch.tensor([term.weight for term in config.rewards], dtype=torch.float64)
        self.stages = _stages(config) if name == "sequential" else []
        self.floors = torch.tensor([term.floor for term in config.rewards])
        self.updates = 0
        self.lift = torch.zeros(self.count)  # what the floors added at the last solve, relative to the rest
        self.controller: Controller | None = None
        if name == "closed-loop":
            self.controller = Controller(self.count, rate=self.settings.rate, limit=self.settings.limit)
        self.opposition = Opposition(self.count) if name == "marble" and self.settings.guard else None
        self.balancer: Balancer | None = None
        if name in FROM_GRADIENTS or name == "uniform":
            self.balancer = Balancer(
                self.count,
                refresh=self.settings.refresh,
                decay=self.settings.decay,
                finish=self.settings.finish,
                updates=config.budget.updates,
                solver="min-norm" if name in _MIN_NORM else name,
                fold=self.settings.norms == "folded",
                smooth=self.settings.smooth,
                normalise=name != "mgda",
                priorities=self.wanted,
                seed=config.seed,
            )

    @property
    def to_the_letter(self) -> bool:
        """Whether a solve applies the fresh weights to normalised gradients, averaged where they apply, as published.

        What is not the rewards' (the penalty on the distance to the base model) then stays out of the rows.
        """
        plain = self.settings.norms == "raw" and not self.match and self.settings.smooth == "weights"
        return plain and self.settings.method in ("marble", "published") and not self.halves and not self.floors.any()

    def observe(self, table: RewardTable) -> None:
        """Take in an epoch's scores before its updates."""
        if self.controller is not None and self.balancer is not None:
            self.controller.observe(table)
            self.balancer.priorities = self.wanted * self.controller.priorities

    def signals(self, table: RewardTable, group_ids: Tensor) -> Signals:
        """An epoch's scores in advantages, with the sum that this method follows if it has one of its own."""
        return signals_of(table, group_ids, self.weights, std=self.std, own_weights=self.sum_weights(table))

    def sum_weights(self, table: RewardTable) -> Tensor | None:
        """`[K]` of the sum that this epoch's updates follow, if it is not the weighted sum of raw scores.

        `standardised-sum` divides by each reward's standard deviation over the epoch's images, a reward without any
        spread counting for nothing; `sequential` has the raw sum of the rewards of its stage.
        """
        if self.settings.method == "standardised-sum":
            judged = torch.where(table.applies, table.scores, torch.nan)
            spread = (judged - judged.nanmean(dim=0)).square().nanmean(dim=0).sqrt().nan_to_num()
            return torch.where(spread > 0, self.weights / spread, 0.0)
        if self.stages:
            stage = next((chosen for last, chosen in self.stages if self.updates < last), self.stages[-1][1])
            return self.weights * stage
        return None

    def due(self) -> bool:
        """Whether the coming update wants every reward's gradient."""
        return self.balancer is not None and self.balancer.due()

    def advance(self) -> None:
        """Begin an update that is not `due()`."""
        self.updates += 1
        if self.balancer is not None:
            self.balancer.step()

    def mixed(self, signals: Signals) -> tuple[Tensor, Tensor]:
        """What an amortised update mixes, in an update that has begun.

        Returns:
            `[N, J]` advantages, `[J]` their weights: the loss is taken at `effective(advantages) @ weights`, so that
            an objective clips and masks every advantage for itself, as in an exact update.
        """
        own = signals.per_reward
        if self.settings.method in SUMS:
            return self._alone(signals.weighted_sum if signals.own_sum is None else signals.own_sum)
        if self.settings.method == "gdpo":
            total = own @ self.wanted.to(own)
            return self._alone((total - total.mean()) / (total.std(correction=0) + 1e-4))
        clipped = own.clamp(-self.amax, self.amax)
        if self.settings.method == "reward-dropout":
            weights = lifted = self._kept(signals.signal).to(own)
        else:
            assert self.balancer is not None
            weights = self.balancer.coefficients.to(own)
            lifted = weights + self.lift.to(own)  # the strength is as at the solve: before the floors
        return own, self._strength(clipped @ weights) * lifted if self.match else lifted

    def _alone(self, advantage: Tensor) -> tuple[Tensor, Tensor]:
        strength = self._strength(advantage.clamp(-self.amax, self.amax)) if self.match else advantage.new_tensor(1.0)
        return advantage[:, None], strength[None]

    def combined(self, signals: Signals) -> Tensor:
        """`[N]`: `mixed` as one advantage, for an objective that does nothing but clip."""
        advantages, weights = self.mixed(signals)
        return advantages.clamp(-self.amax, self.amax) @ weights

    def _kept(self, signal: Tensor) -> Tensor:
        """Weights of the rewards that this update keeps: of those with a signal, at least one."""
        draw = torch.rand(self.count, generator=generator(self.seed, "dropout", self.updates)).double()
        draw = torch.where(signal, draw, -1.0) if signal.any() else draw
        kept = (draw >= self.settings.dropout) | (draw == draw.max())
        weights = torch.where(kept, self.wanted, 0.0)
        return weights / weights.sum()

    @staticmethod
    def _strength(advantage: Tensor) -> Tensor:
        """What brings the root mean square of the advantages that are not 0 to 1."""
        some = advantage[advantage != 0]
        return 1 / some.square().mean().sqrt().clamp_min(1e-6) if len(some) else advantage.new_tensor(1.0)

    def columns(self, signals: Signals) -> tuple[Tensor, Tensor]:
        """What an exact update gathers: a row for every column, `mean_n column[n] grad slope_n` or `… grad const_n`.

        Returns:
            `[N, J]` advantages for `slope`, `[N, I]` weights for `const`.
        """
        ones = torch.ones(len(signals.half), 1)
        if self.halves:
            sides = torch.stack([signals.half == 0, signals.half == 1], dim=1).to(ones)
            return (sides[:, :, None] * signals.per_reward[:, None]).flatten(1), sides
        if self.to_the_letter:
            return signals.per_reward, torch.cat([signals.applies.to(ones), ones], dim=1)
        return signals.per_reward, ones

    def parts(self) -> Tensor:
        """`[K + 1, J + I]`: the rewards' own parts and the common one, as mixtures of the rows."""
        every = torch.eye(self.count, dtype=torch.float64)
        common = torch.zeros(self.count, 1, dtype=torch.float64)
        if self.halves:
            own, const = torch.cat([every, every, common, common], dim=1), [1.0, 1.0]
        elif self.to_the_letter:
            own, const = torch.cat([every, 0 * every, common], dim=1), [1.0]
        else:
            own, const = torch.cat([every, common], dim=1), [1.0]
        last = torch.tensor([0.0] * (own.shape[1] - len(const)) + const, dtype=torch.float64)
        return torch.cat([own, last[None]])

    def solve(self, gram: Tensor, signals: Signals) -> Tensor | None:
        """Begin an update that is `due()`.

        Args:
            gram: `[J + I, J + I]` inner products of the rows that `columns` asked for.
            signals: of this epoch.

        Returns:
            `[J + I]` float64: the direction as a mixture of the rows; None if it is to the letter and no reward has a
            signal.
        """
        assert self.balancer is not None
        self.updates += 1
        gram = gram.detach().cpu().double()
        if self.to_the_letter:
            return self._solve_to_the_letter(gram, signals)
        parts = self.parts()
        biased = products(parts, gram)
        estimate = self._across(gram) if self.halves else biased
        if self.opposition is not None:
            self.opposition.observe(biased[:-1, :-1], signals.signal)
            self.balancer.solver = "upgrad" if self.opposition.pairs() else "min-norm"
        self.balancer.step(self._of_rewards(estimate), signals.signal, self._of_rewards(biased).diagonal())
        weights = self.balancer.coefficients
        clipped = signals.per_reward.clamp(-self.amax, self.amax)
        strength = self._strength(clipped @ weights.to(clipped)).double() if self.match else 1.0
        usable = biased.diagonal()[:-1].isfinite()
        mixture = torch.cat([torch.where(usable, strength * weights, 0.0), weights.new_ones(1)])
        lifted = self._above_floors(biased, mixture, usable & signals.signal)
        self.lift = (lifted[:-1] / lifted[-1] - mixture[:-1]) / strength
        return lifted @ parts

    def _across(self, gram: Tensor) -> Tensor:
        """`[K + 1, K + 1]` products of parts from the two halves' rows, free of the noise that one batch shares."""
        count, rows = self.count, torch.eye(len(gram), dtype=torch.float64)
        first = torch.cat([rows[:count], rows[2 * count : 2 * count + 1]])
        second = torch.cat([rows[count : 2 * count], rows[2 * count + 1 :]])
        across = products(torch.cat([first, second]), gram)[: count + 1, count + 1 :]
        return 2 * (across + across.T)  # either half is expected to be half of the whole

    def _solve_to_the_letter(self, gram: Tensor, signals: Signals) -> Tensor | None:
        """`alpha_k mean|g| / |g_k|` of the fresh solution; rewards without a signal take no part."""
        assert self.balancer is not None
        share = signals.applies.double().mean(dim=0).clamp_min(1 / len(signals.applies))
        every = torch.eye(self.count, dtype=torch.float64) / share
        whole = torch.cat([every, every, every.new_zeros(self.count, 1)], dim=1)
        gram = products(whole, gram)
        self.balancer.step(gram, signals.signal)
        norms, used = gram.diagonal().clamp_min(0).sqrt(), ~self.balancer.missing
        if self.balancer.solution is None or not used.any():
            return None
        alpha = torch.where(used, self.balancer.solution, 0.0)
        return torch.where(used, alpha / alpha.sum() / norms, 0.0) * norms[used].mean() @ whole

    def _of_rewards(self, gram: Tensor) -> Tensor:
        """`[K, K]` of what is balanced: whole gradients, or their parts that advantages enter."""
        return gram[:-1, :-1] if self.settings.gradients == "advantage" else whole_gram(gram)

    def _above_floors(self, gram: Tensor, mixture: Tensor, usable: Tensor) -> Tensor:
        """The nearest mixture whose direction opposes neither the own part of a floor's gradient nor the whole."""
        kept = (self.floors & usable).nonzero().flatten()
        if not len(kept):
            return mixture
        gram = torch.where(gram.isfinite(), gram, 0.0)
        every = torch.eye(len(gram), dtype=torch.float64)
        rows = torch.cat([every, every[kept], every[kept] + every[-1]])  # the parts, then every floor's own and whole
        floors = torch.arange(len(rows)) >= len(every)
        weights = torch.cat([mixture, mixture.new_zeros(2 * len(kept))])
        return keep_floors(rows @ gram @ rows.T, weights, floors) @ rows

    def state_dict(self) -> dict[str, Any]:
        """Everything that updates and epochs change."""
        return {
            "updates": self.updates,
            "lift": self.lift,
            "balancer": None if self.balancer is None else self.balancer.state_dict(),
            "controller": None if self.controller is None else self.controller.state_dict(),
            "opposition": None if self.opposition is None else self.opposition.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.updates, self.lift = state["updates"], state["lift"].clone()
        for part in (self.balancer, self.controller):
            if part is not None:
                part.load_state_dict(state["balancer" if part is self.balancer else "controller"])
        if self.opposition is not None and state.get("opposition"):  # older checkpoints have none
            self.opposition.load_state_dict(state["opposition"])


def _stages(config: Config) -> list[tuple[int, Tensor]]:
    """The update before which each stage of `sequential` ends, and which rewards `[K]` it trains on (1 or 0)."""
    names = [term.label for term in config.rewards]
    stages = config.balance.stages or [Stage(rewards=[name]) for name in names]
    ends = stage_ends([stage.share for stage in stages], config.budget.updates or 0)
    chosen = [torch.tensor([float(name in stage.rewards) for name in names], dtype=torch.float64) for stage in stages]
    return list(zip(ends, chosen, strict=True))


def products(mixtures: Tensor, gram: Tensor) -> Tensor:
    """`[M, M]` inner products of mixtures `[M, R]` of R vectors; a vector that is not finite spoils its own alone."""
    fine = gram.diagonal().isfinite()
    found = mixtures @ torch.where(fine[:, None] & fine, gram, 0.0) @ mixtures.T
    spoilt = (mixtures[:, ~fine] != 0).any(dim=1)
    found[spoilt] = torch.nan
    found[:, spoilt] = torch.nan
    return found
