"""The nearest direction that opposes none of some gradients: gradients as floors below which no reward may fall."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from marble.balance.min_norm import checked_gram


def keep_floors(gram: Tensor, weights: Tensor, floors: Tensor) -> Tensor:
    """Weights of the direction closest to `d = sum_k w_k g_k` whose product with no floor's gradient is negative.

    The directions `x` with `g_f · x ≥ 0` for every floor f form a cone. The projection of `d` on it is
    `d + sum_f v_f g_f` with the `v ≥ 0` that make it shortest (Moreau), a non-negative least squares problem on a
    root `G = B^T B` of the Gram, solved in finitely many steps (Lawson and Hanson). With every gradient a floor it
    is the projection on the dual cone of Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization"
    (arXiv 2406.16232), Proposition 1: `v = u + x`. Gradients are normalised on the way, so their norms may differ
    by many orders.

    Args:
        gram: `[K, K]` inner products of K gradients, any float dtype; only its symmetric part counts.
        weights: `[K]`, of any sign; or `[M, K]`, to move M directions at once.
        floors: `[K]` bool, the gradients that the direction may not oppose.

    Returns:
        Float64 on the CPU, in the shape of `weights`: `w + v`, with `v ≥ 0`, and 0 outside `floors`; exactly `w`
        where no floor is broken. Products with floors are at least `−1e-9 |g_f| sum_k (|w_k| + v_k) |g_k|` for a Gram
        computed in double precision (−1e-6 in single). The direction is unique; the weights are not where gradients
        depend linearly. Floors that nearly oppose each other can make `v` large.

    Raises:
        ValueError: `gram` is not square, is empty or not finite; `weights` or `floors` do not fit it.
    """
    matrix = checked_gram(gram)
    count = len(matrix)
    start = weights.detach().cpu().to(torch.float64).numpy()
    if start.ndim not in (1, 2) or start.shape[-1] != count or not np.isfinite(start).all():
        raise ValueError(f"weights must be finite and [K={count}] or [M, K], got {tuple(weights.shape)}: {weights}")
    if floors.shape != (count,) or floors.dtype != torch.bool:
        raise ValueError(f"floors must be [K={count}] bool, got {tuple(floors.shape)} {floors.dtype}")
    chosen = floors.cpu().numpy()
    norms, cosines = split_norms(matrix)
    values, vectors = np.linalg.eigh(cosines)
    root = np.sqrt(values.clip(min=0))[:, None] * vectors.T
    moved = start.copy()
    for row in moved.reshape(-1, count):  # views: writing to them fills `moved`
        scaled = norms * row
        if (cosines[chosen] @ scaled < 0).any():
            lift, _ = nnls(root[:, chosen], -root @ scaled, maxiter=100 * count)
            row[chosen] += np.divide(lift, norms[chosen], out=np.zeros_like(lift), where=norms[chosen] > 0)
    return torch.from_numpy(moved)


def split_norms(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Norms `[K]` and cosines `[K, K]` of a Gram; the cosines of a gradient that is 0 are 0, its own included."""
    norms = np.sqrt(matrix.diagonal().clip(min=0))
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    return norms, matrix * inverse[:, None] * inverse
