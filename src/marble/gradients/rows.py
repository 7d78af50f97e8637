"""Several gradients side by side, made block by block as a backward pass gets to them.

A backward pass frees a layer's activations when it is through with it. Made whole and beforehand, the rows of K rewards
would lie in memory beside all activations; made on the way, they take the place of those that are gone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from marble.distributed import sum_over_processes


class Rows:
    """`[J + I, P]` numbers: J rows and I rows, each a block per parameter."""

    def __init__(
        self,
        counts: tuple[int, int],
        sizes: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        whole: bool = False,
    ) -> None:
        """All zero, and nothing in memory yet unless `whole`.

        Args:
            counts: J and I.
            sizes: numbers of each parameter, P in all.
            dtype: of the rows.
            device: where they lie.
            whole: make them in one piece at once, to be summed over processes in one message.
        """
        self.counts, self.sizes, self.dtype, self.device = counts, list(sizes), dtype, device
        self._blocks: tuple[list[Tensor | None], ...] = tuple([None] * len(self.sizes) for _ in counts)
        self._whole: Tensor | None = None
        if whole:
            self._whole = torch.zeros(sum(counts), sum(self.sizes), dtype=dtype, device=device)
            self._blocks = tuple(list(part.split(self.sizes, dim=1)) for part in self._whole.split(counts))

    @classmethod
    def of(cls, first: Tensor, second: Tensor, sizes: Sequence[int]) -> Rows:
        """Over matrices that there are, `[J, P]` and `[I, P]`: what is written goes there."""
        rows = cls((len(first), len(second)), sizes, dtype=first.dtype, device=first.device)
        rows._blocks = (list(first.split(rows.sizes, dim=1)), list(second.split(rows.sizes, dim=1)))
        return rows

    def __len__(self) -> int:
        return sum(self.counts)

    def block(self, part: int, parameter: int) -> Tensor:
        """`[J, p]` (part 0) or `[I, p]` (part 1) of one parameter, to write to."""
        found = self._blocks[part][parameter]
        if found is None:
            found = torch.zeros(self.counts[part], self.sizes[parameter], dtype=self.dtype, device=self.device)
            self._blocks[part][parameter] = found
        return found

    def _both(self, parameter: int) -> Tensor:
        return torch.cat([self.block(part, parameter) for part in range(len(self.counts))])

    def matrix(self) -> Tensor:
        """`[J + I, P]` in one piece."""
        if self._whole is not None:
            return self._whole
        return torch.cat([self._both(i) for i in range(len(self.sizes))], dim=1)

    def gram(self) -> Tensor:
        """`[J + I, J + I]` float64 inner products, see `gram_of`."""
        total = torch.zeros(len(self), len(self), dtype=torch.float64, device=self.device)
        for parameter in range(len(self.sizes)):
            _add_gram(total, self._both(parameter))
        return total.cpu()

    def mix(self, mixture: Tensor) -> list[Tensor]:
        """`mixture @ rows` for every parameter, `[p]` each. A row that the mixture leaves out may be anything."""
        used = (mixture != 0).nonzero().flatten().to(self.device)
        weights = mixture.to(device=self.device, dtype=self.dtype)[used]
        return [weights @ self._both(parameter)[used] for parameter in range(len(self.sizes))]

    def sum_over_processes(self) -> None:
        """Add up what all processes have, in one message (in place, if they were made `whole`)."""
        matrix = sum_over_processes(self.matrix())
        first, second = matrix.split(self.counts)
        self._blocks = Rows.of(first, second, self.sizes)._blocks


def gram_of(rows: Tensor) -> Tensor:
    """`[R, R]` float64 inner products of `rows [R, P]`, added up in double precision a piece of P at a time.

    Where a row is not finite, so are its products.
    """
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    _add_gram(total, rows)
    return total.cpu()


def whole_gram(parts: Tensor) -> Tensor:
    """`[K, K]` inner products of whole gradients, from those `[K + 1, K + 1]` of K own parts and one common part."""
    own, const = parts[:-1, :-1], parts[:-1, -1]
    return own + const[:, None] + const + parts[-1, -1]


def _add_gram(total: Tensor, rows: Tensor) -> None:
    piece = 2**20 if rows.is_cuda else 2**14  # what a core's cache holds: three times as fast at 20 rows
    for part in rows.split(piece, dim=1):
        wide = part.double()
        total += wide @ wide.T
