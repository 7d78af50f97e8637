"""What independent batches say together of gradients that none of them shows well.

One batch's gradient is the true one plus noise, and the noise is often several times as long: norms of a batch are too
large and cosines too small. Products of gradients of two different batches are right on average. Their sum needs no
pair of batches side by side: `sum over b ≠ c of g_b · g_c = |sum_b g_b|² − sum_b |g_b|²`.

Batches are dealt to folds, of each of which only the sum is kept; what is estimated without one fold after the other
says how sure it is (the jackknife, which for such products errs on the side of too wide).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from marble.gradients import gram_of

FOLDS = 8
"""Most folds: sums of all rows that are kept. Any more would make intervals narrower by a sixth at most."""


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error, any shape; NaN where it cannot be had."""

    value: Tensor
    error: Tensor
    freedom: int  # folds less one

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Lower and upper end by Student's t."""
        half = float(stats.t.ppf(0.5 + level / 2, self.freedom)) * self.error
        return self.value - half, self.value + half


class AcrossBatches:
    """Gathers `[R, P]` rows of independent batches; estimates inner products of their expectations."""

    def __init__(self, batches: int) -> None:
        """For so many batches, at least 2."""
        self.folds = min(batches, FOLDS)
        self.sizes = torch.zeros(self.folds, dtype=torch.float64)  # batches in each fold
        self._sums: list[Tensor] = []  # [R, P] a fold
        self._own: list[Tensor] = []  # [R, R] a fold: its batches' Grams, added up
        self._products: Tensor | None = None  # [F, F, R, R]

    def add(self, rows: Tensor) -> None:
        """Take in one batch's rows `[R, P]`, float32 on the CPU; they are kept or added to others."""
        fold = int(self.sizes.sum()) % self.folds
        if fold == len(self._sums):
            self._own.append(gram_of(rows))
            self._sums.append(rows)
        else:
            self._own[fold] += gram_of(rows)
            self._sums[fold] += rows
        self.sizes[fold] += 1
        self._products = None

    def gram(self, without: int | None = None) -> Tensor:
        """`[R, R]` float64: unbiased inner products of the true rows, from all folds or all but one.

        A square may come out negative. NaN if fewer than two batches are left.
        """
        if self._products is None:
            self._products = _between(self._sums)
        kept = torch.tensor([fold for fold in range(len(self._sums)) if fold != without])
        count = self.sizes[kept].sum()
        own = torch.stack(self._own)[kept].sum(dim=0)
        return (self._products[kept][:, kept].sum(dim=(0, 1)) - own) / (count * (count - 1))

    def jackknife(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """What `function` makes of the true Gram `[R, R]`, with its error.

        Folds may differ by a batch in size, which the weights account for (Busing, Meijer and van der Leeden 1999).
        """
        whole, parts = function(self.gram()), torch.stack([function(self.gram(fold)) for fold in range(self.folds)])
        share = (self.sizes / self.sizes.sum()).view(-1, *[1] * whole.ndim)
        mean = self.folds * whole - ((1 - share) * parts).sum(dim=0)
        pseudo = whole / share - (1 / share - 1) * parts
        variance = ((pseudo - mean).square() / (1 / share - 1)).mean(dim=0)
        return Estimate(whole, variance.sqrt(), self.folds - 1)


def _between(sums: list[Tensor]) -> Tensor:
    """`[F, F, R, R]` inner products of the folds' rows."""
    folds, rows = len(sums), len(sums[0])
    found = torch.zeros(folds, folds, rows, rows, dtype=torch.float64)
    for i in range(folds):
        for j in range(i, folds):
            both = gram_of(torch.cat([sums[i], sums[j]]))[:rows, rows:]
            found[i, j], found[j, i] = both, both.T
    return found


def true_cosines(gram: Tensor) -> Tensor:
    """`[R, R]` cosines of a Gram as `AcrossBatches` estimates it; NaN with a row whose square is not above 0.

    Estimates may lie beyond ±1.
    """
    norms = torch.where(gram.diagonal() > 0, gram.diagonal(), torch.nan).sqrt()
    return gram / norms[:, None] / norms
