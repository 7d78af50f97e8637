"""MARBLE's schedule: solve every N updates, smooth over solves, finish at uniform weights.

Leaves out: where gradients come from and where weights go. A training loop of one's own needs only

    gram = g @ g.T if balancer.due() else None      # g [K, P]: one gradient per reward
    alpha = balancer.step(gram)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from marble.balance.solvers import SOLVERS, solve

_LEAST_SQUARE = 0.05
"""An estimate of a squared norm that noise does not inflate may be negative; it counts as at least this share of the
one that noise inflates."""


class Balancer:
    """Turns Gram matrices of raw per-reward gradients into weights on the simplex.

    Attributes:
        solution: `[K]` float64, the weights solved for at the last refresh, not smoothed; None before it.
        norms: `[K]` float64, the gradients' norms at the last refresh in which each had a signal; None before.
        priorities: `[K]` float64, may be changed between updates.
        left_out: `[K]` int64, how many refreshes left each reward out of the solve.
        missing: `[K]` bool, which rewards the last refresh left out.
    """

    def __init__(
        self,
        num_rewards: int,
        *,
        refresh: int = 10,
        decay: float = 0.7,
        finish: int = 0,
        updates: int | None = None,
        solver: str = "min-norm",
        fold: bool = False,
        smooth: str = "weights",
        normalise: bool = True,
        priorities: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        """Set up for K = `num_rewards`.

        Args:
            num_rewards: K ≥ 1.
            refresh: updates from one Gram to the next, N ≥ 1.
            decay: rho in [0, 1): `average ← rho average + (1 − rho) new`, started at the first refresh.
            finish: number of last updates at uniform weights; needs `updates`.
            updates: how many updates the run will have.
            solver: one of `SOLVERS`; `uniform` gives equal weights throughout.
            fold: let `coefficients` carry the gradients' norms, so that what is applied to raw gradients is
                the direction that was solved for on normalised ones.
            smooth: what is averaged over refreshes: the `weights` that were solved for, or the `gram` to solve on.
            normalise: solve for gradients of unit length.
            priorities: `[K]`, > 0; equal, if not given.
            seed: for solvers that draw an order.

        Raises:
            ValueError: an argument is out of its range.
        """
        if num_rewards < 1 or refresh < 1 or not 0 <= decay < 1 or finish < 0:
            raise ValueError(
                "need num_rewards ≥ 1, refresh ≥ 1, 0 ≤ decay < 1 and finish ≥ 0, got "
                f"num_rewards={num_rewards}, refresh={refresh}, decay={decay}, finish={finish}"
            )
        if finish and updates is None:
            raise ValueError(f"finish={finish} counts from the end: give the number of updates of the run")
        if solver not in SOLVERS:
            raise ValueError(f"solver must be one of {SOLVERS}, got {solver!r}")
        if smooth not in ("weights", "gram"):
            raise ValueError(f'smooth must be "weights" or "gram", got {smooth!r}')
        self.num_rewards, self.refresh, self.decay, self.finish = num_rewards, refresh, decay, finish
        self.updates, self.solver, self.fold = updates, solver, fold and normalise
        self.smooth, self.normalise, self.seed = smooth, normalise, seed
        self.priorities = torch.ones(num_rewards, dtype=torch.float64) if priorities is None else priorities.double()
        if self.priorities.shape != (num_rewards,) or not (self.priorities > 0).all():
            raise ValueError(f"priorities must be [K={num_rewards}] and > 0, got {priorities}")
        self.done = 0
        self.left_out = torch.zeros(num_rewards, dtype=torch.int64)
        self.missing = torch.zeros(num_rewards, dtype=torch.bool)
        self.solution: Tensor | None = None
        self.norms: Tensor | None = None
        self._average: Tensor | None = None
        self._gram = torch.zeros(num_rewards, num_rewards, dtype=torch.float64)  # weighted sums over refreshes,
        self._squares = torch.zeros(num_rewards, dtype=torch.float64)
        self._mass = torch.zeros(num_rewards, num_rewards, dtype=torch.float64)  # and the sums of their weights

    @property
    def alpha(self) -> Tensor:
        """`[K]` float64: the weights in force, smoothed; by priority before the first refresh and at the finish."""
        if self._average is None or self._finishing(self.done - 1):
            return self.priorities / self.priorities.sum()
        return self._average

    @property
    def coefficients(self) -> Tensor:
        """`[K]` float64 summing to 1: what to weigh the rewards' advantages with in an amortised update.

        `alpha`; with `fold`, `alpha_k / |g_k|` renormalised, a reward without a known norm taking the mean. Weights of
        both signs may then add up to 0 or less; such a solution counts as equal weights of normalised gradients.
        """
        if not self.fold or self.norms is None:
            return self.alpha
        known = self.norms > 0
        if not known.any():
            return self.alpha
        norms = torch.where(known, self.norms, self.norms[known].mean())
        folded = self.alpha / norms
        folded = folded if folded.sum() > 0 else 1 / norms
        return folded / folded.sum()

    def direction(self, gradients: Tensor) -> Tensor:
        """`[P]`: `gradients [K, P]` mixed by `coefficients`, without those that are not finite."""
        fine = gradients.isfinite().all(dim=1)
        return self.coefficients.to(gradients)[fine] @ gradients[fine]

    def due(self) -> bool:
        """Whether the coming update wants a fresh Gram."""
        wanted = self.solver != "uniform" or self.fold
        return wanted and self.done % self.refresh == 0 and not self._finishing(self.done)

    def step(
        self, gram: Tensor | None = None, has_signal: Tensor | None = None, squares: Tensor | None = None
    ) -> Tensor:
        """Advance by one update.

        Args:
            gram: `[K, K]` inner products of the raw gradients, when `due()`.
            has_signal: `[K]` bool, which rewards can tell images apart in this batch; the others, and those
                whose gradient is zero or not finite, are left out of the solve and keep their weight.
            squares: `[K]` squared norms of the raw gradients, if `gram` is an estimate whose diagonal may fall to 0
                and below (products of gradients of independent halves of the batch).

        Returns:
            `alpha` `[K]` float64, smoothed.

        Raises:
            ValueError: a Gram is due and was not given, or something has the wrong shape.
        """
        if self.due():
            if gram is None:
                raise ValueError(f"update {self.done} needs a Gram: due() is true")
            if gram.shape != (self.num_rewards, self.num_rewards):
                raise ValueError(f"gram must be [K={self.num_rewards}, K], got {tuple(gram.shape)}")
            for name, given in (("has_signal", has_signal), ("squares", squares)):
                if given is not None and given.shape != (self.num_rewards,):
                    raise ValueError(f"{name} must be [K={self.num_rewards}], got {tuple(given.shape)}")
            gram = gram.detach().cpu().to(torch.float64)
            self._refresh(gram, has_signal, gram.diagonal() if squares is None else squares.detach().cpu().double())
        self.done += 1
        return self.alpha

    def _refresh(self, gram: Tensor, has_signal: Tensor | None, squares: Tensor) -> None:
        usable = gram.diagonal().isfinite() & squares.isfinite() & (squares > 0)
        if has_signal is not None:
            usable = usable & has_signal.cpu().bool()
        usable = usable & ~(~gram.isfinite() & usable).any(dim=1)
        self.missing = ~usable
        self.left_out += self.missing
        chosen = usable.nonzero().flatten()
        if len(chosen) == 0:
            return
        gram, squares = self._seen(gram, squares, chosen)
        norms = torch.maximum(gram.diagonal(), _LEAST_SQUARE * squares).sqrt()
        if self.norms is None:
            self.norms = torch.zeros(self.num_rewards, dtype=torch.float64)
        self.norms[chosen] = norms
        cosines = (gram / (norms[:, None] * norms)).clamp(-1, 1)
        cosines.fill_diagonal_(1)
        gram = cosines if self.normalise else cosines * norms[:, None] * norms
        before = self._average if self._average is not None else self.priorities / self.priorities.sum()
        share = before[chosen].sum() if before[chosen].sum() > 0 else before.new_tensor(1.0)
        solved = before.clone()
        solved[chosen] = solve(self.solver, gram, self.priorities[chosen], self.seed + self.done) * share
        self.solution = solved / solved.sum()
        if self._average is None or self.smooth == "gram":
            self._average = self.solution.clone()
        else:
            self._average = self.decay * self._average + (1 - self.decay) * self.solution

    def _seen(self, gram: Tensor, squares: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen rewards' Gram and squared norms, averaged over refreshes if that is what is smoothed."""
        pairs = (chosen[:, None], chosen[None])
        if self.smooth == "weights":
            return gram[pairs], squares[chosen]
        keep, add = self.decay, 1 - self.decay
        self._gram[pairs] = keep * self._gram[pairs] + add * gram[pairs]
        self._mass[pairs] = keep * self._mass[pairs] + add
        self._squares[chosen] = keep * self._squares[chosen] + add * squares[chosen]
        return self._gram[pairs] / self._mass[pairs], self._squares[chosen] / self._mass.diagonal()[chosen]

    def _finishing(self, update: int) -> bool:
        return bool(self.finish) and self.updates is not None and update >= self.updates - self.finish

    def state_dict(self) -> dict[str, Any]:
        """Everything that `step` changes, and the priorities."""
        values = {name: getattr(self, name) for name in _STATE}
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in values.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`; ValueError if it is of another number of rewards."""
        if len(state["priorities"]) != self.num_rewards:
            raise ValueError(f"state must be of {self.num_rewards} rewards, got {len(state['priorities'])}")
        for name in _STATE:
            value = state[name]
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)


_STATE = (
    *("done", "solution", "norms", "priorities", "left_out", "missing"),
    *("_average", "_gram", "_squares", "_mass"),
)
