"""The point of a convex hull nearest to the origin: the direction on which all rewards agree most."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

_GOOD_ENOUGH = 1e-13
"""Optimality gap, relative to the largest entry, at which refining stops."""


def min_norm_weights(gram: Tensor) -> Tensor:
    """`argmin alpha^T G alpha` over the simplex, exactly.

    With `G = B^T B`, the minimum-norm point follows from the non-negative least squares problem
    `min |[B; 1^T] x − [0; 1]|` by `alpha = x / sum x` (Wolfe's dual; Lawson and Hanson solve it in finitely
    many steps). Singular Grams, duplicate and opposite gradients need no special case; all zero does.

    Args:
        gram: `[K, K]` inner products of K gradients, any float dtype; only its symmetric part counts.
            Gradients whose norms differ by many orders should be normalised first.

    Returns:
        `[K]` float64 on the CPU, non-negative, summing to 1; uniform for an all-zero Gram. The optimality gap
        `alpha^T G alpha − min_k (G alpha)_k` is at most 1e-9 of the largest diagonal entry.

    Raises:
        ValueError: not square, empty, or not finite.
    """
    matrix = checked_gram(gram)
    scale = np.abs(matrix).max()
    if scale == 0:
        return torch.full((len(matrix),), 1 / len(matrix), dtype=torch.float64)
    matrix = matrix / scale
    values, vectors = np.linalg.eigh(matrix)
    root = np.sqrt(values.clip(min=0))[:, None] * vectors.T
    system = np.vstack([root, np.ones(len(matrix))])
    target = np.append(np.zeros(len(root)), 1.0)
    solution, _ = nnls(system, target, maxiter=100 * len(target))
    return torch.from_numpy(_refine(matrix, solution / solution.sum()))


def checked_gram(gram: Tensor) -> np.ndarray:
    """The symmetric part of a `[K, K]` Gram in float64; ValueError if it is not square, is empty or not finite."""
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not len(gram):
        raise ValueError(f"gram must be [K, K] with K ≥ 1, got {tuple(gram.shape)}")
    matrix = gram.detach().cpu().to(torch.float64).numpy()
    if not np.isfinite(matrix).all():
        raise ValueError(f"gram must be finite, got {matrix.tolist()}")
    return (matrix + matrix.T) / 2


def _refine(matrix: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Active-set steps on the Gram as given, from a solution on its positive part; returns the best point seen.

    A Gram computed in single precision may have eigenvalues of −1e-8. Clipping them moves the optimum by
    more than its gap may be, and along such a direction the optimum lies on the boundary.
    """
    best, least = alpha, _gap(matrix, alpha)
    active = alpha > 1e-12
    for _ in range(4 * len(alpha)):
        if least <= _GOOD_ENOUGH:
            break
        move = np.zeros_like(alpha)
        move[active] = _stationary(matrix[np.ix_(active, active)]) - alpha[active]
        curved = move @ matrix @ move > 0
        if not curved and alpha @ matrix @ move > 0:
            move = -move  # no minimum this way: downhill to the boundary
        room = np.divide(alpha, -move, out=np.full_like(alpha, np.inf), where=move < -1e-15)
        step = min(1.0, room.min()) if curved else room.min()
        if np.isfinite(step):
            alpha = (alpha + step * move).clip(min=0)
            alpha /= alpha.sum()
        gap = _gap(matrix, alpha)
        if gap < least:
            best, least = alpha, gap
        if step < 1 or not curved:
            active = active & (room > step * (1 + 1e-12))
        else:
            active = active | (np.arange(len(alpha)) == np.argmin(matrix @ alpha))
        if not active.any():
            break
    return best


def _stationary(block: np.ndarray) -> np.ndarray:
    """Weights that sum to 1 and make all of `block @ weights` equal."""
    size = len(block)
    bordered = np.block([[block, np.ones((size, 1))], [np.ones((1, size)), np.zeros((1, 1))]])
    return np.linalg.lstsq(bordered, np.append(np.zeros(size), 1.0), rcond=None)[0][:-1]


def _gap(matrix: np.ndarray, alpha: np.ndarray) -> float:
    pull = matrix @ alpha
    return float(alpha @ pull - pull.min())
