"""MARBLE's schedule: solve every N updates, smooth what is solved, finish at uniform weights.

Leaves out: where gradients come from and where weights go. A training loop of one's own needs only

    gram = g @ g.T if balancer.due() else None      # g [K, P]: one gradient per reward
    alpha = balancer.step(gram)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from marble.balance.min_norm import min_norm_weights

SOLVERS = ("min-norm", "uniform")


class Balancer:
    """Turns Gram matrices of raw per-reward gradients into weights on the simplex.

    Attributes:
        solution: `[K]` float64, the weights solved for at the last refresh, not smoothed; None before it.
        norms: `[K]` float64, the gradients' norms at the last refresh in which each had a signal; None before.
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
    ) -> None:
        """Set up for K = `num_rewards`.

        Args:
            num_rewards: K ≥ 1.
            refresh: updates from one Gram to the next, N ≥ 1.
            decay: rho in [0, 1): `average ← rho average + (1 − rho) solution`, started at the first solution.
            finish: number of last updates at uniform weights; needs `updates`.
            updates: how many updates the run will have.
            solver: `min-norm`, or `uniform` for equal weights throughout.
            fold: let `coefficients` carry the gradients' norms, so that what is applied to raw gradients is
                the direction that was solved for on normalised ones.

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
        self.num_rewards, self.refresh, self.decay, self.finish = num_rewards, refresh, decay, finish
        self.updates, self.solver, self.fold = updates, solver, fold
        self.done = 0
        self.solution: Tensor | None = None
        self.norms: Tensor | None = None
        self._average: Tensor | None = None

    @property
    def alpha(self) -> Tensor:
        """`[K]` float64: the weights in force, smoothed; uniform before the first refresh and at the finish."""
        if self._average is None or self._finishing(self.done - 1):
            return torch.full((self.num_rewards,), 1 / self.num_rewards, dtype=torch.float64)
        return self._average

    @property
    def coefficients(self) -> Tensor:
        """`[K]` float64 summing to 1: what to weigh the rewards' advantages with in an amortised update.

        `alpha`; with `fold`, `alpha_k / |g_k|` renormalised, a reward without a known norm taking the mean.
        """
        if not self.fold or self.norms is None:
            return self.alpha
        known = self.norms > 0
        if not known.any():
            return self.alpha
        folded = self.alpha / torch.where(known, self.norms, self.norms[known].mean())
        return folded / folded.sum()

    def due(self) -> bool:
        """Whether the coming update wants a fresh Gram."""
        wanted = self.solver == "min-norm" or self.fold
        return wanted and self.done % self.refresh == 0 and not self._finishing(self.done)

    def step(self, gram: Tensor | None = None, has_signal: Tensor | None = None) -> Tensor:
        """Advance by one update.

        Args:
            gram: `[K, K]` inner products of the raw gradients, when `due()`.
            has_signal: `[K]` bool, which rewards can tell images apart in this batch; the others, and those
                whose gradient is zero or not finite, are left out of the solve and keep their weight.

        Returns:
            `alpha` `[K]` float64, smoothed.

        Raises:
            ValueError: a Gram is due and was not given, or has the wrong shape.
        """
        if self.due():
            if gram is None:
                raise ValueError(f"update {self.done} needs a Gram: due() is true")
            if gram.shape != (self.num_rewards, self.num_rewards):
                raise ValueError(f"gram must be [K={self.num_rewards}, K], got {tuple(gram.shape)}")
            self._refresh(gram.detach().cpu().to(torch.float64), has_signal)
        self.done += 1
        return self.alpha

    def _refresh(self, gram: Tensor, has_signal: Tensor | None) -> None:
        squares = gram.diagonal()
        usable = squares.isfinite() & (squares > 0)
        if has_signal is not None:
            usable = usable & has_signal.cpu()
        before = self._average
        if before is None:
            before = torch.full((self.num_rewards,), 1 / self.num_rewards, dtype=torch.float64)
        chosen = usable.nonzero().flatten()
        if len(chosen) == 0:
            return
        norms = squares[chosen].sqrt()
        if self.norms is None:
            self.norms = torch.zeros(self.num_rewards, dtype=torch.float64)
        self.norms[chosen] = norms
        solved = before.clone()
        share = before[chosen].sum() if before[chosen].sum() > 0 else before.new_tensor(1.0)
        if self.solver == "min-norm":
            cosines = gram[chosen][:, chosen] / (norms[:, None] * norms[None])
            weights = min_norm_weights(cosines)
        else:
            weights = torch.full((len(chosen),), 1 / len(chosen), dtype=torch.float64)
        solved[chosen] = weights * share
        self.solution = solved / solved.sum()
        if self._average is None:
            self._average = self.solution.clone()
        else:
            self._average = self.decay * self._average + (1 - self.decay) * self.solution

    def _finishing(self, update: int) -> bool:
        return bool(self.finish) and self.updates is not None and update >= self.updates - self.finish

    def state_dict(self) -> dict[str, Any]:
        """Everything that `step` changes."""
        return {"done": self.done, "solution": self.solution, "norms": self.norms, "average": self._average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.done, self.solution = state["done"], state["solution"]
        self.norms, self._average = state["norms"], state["average"]
