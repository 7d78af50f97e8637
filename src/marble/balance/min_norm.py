"""The point of a convex hull nearest to the origin: the direction on which all rewards agree most."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor


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
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not len(gram):
        raise ValueError(f"gram must be [K, K] with K ≥ 1, got {tuple(gram.shape)}")
    matrix = gram.detach().cpu().to(torch.float64).numpy()
    if not np.isfinite(matrix).all():
        raise ValueError("gram must be finite")
    matrix = (matrix + matrix.T) / 2
    scale = np.abs(matrix).max()
    if scale == 0:
        return torch.full((len(matrix),), 1 / len(matrix), dtype=torch.float64)
    matrix = matrix / scale
    values, vectors = np.linalg.eigh(matrix)
    root = np.sqrt(values.clip(min=0))[:, None] * vectors.T
    system = np.vstack([root, np.ones(len(matrix))])
    target = np.append(np.zeros(len(root)), 1.0)
    solution, _ = nnls(system, target, maxiter=100 * len(target))
    return torch.from_numpy(_polish(matrix, solution / solution.sum()))


def _polish(matrix: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Solve once more for equal `G alpha` on the weights in use; keep it if it is feasible and no worse."""
    support = np.flatnonzero(alpha > 1e-12)
    block = matrix[np.ix_(support, support)]
    bordered = np.block([[block, np.ones((len(support), 1))], [np.ones((1, len(support))), np.zeros((1, 1))]])
    solved = np.linalg.lstsq(bordered, np.append(np.zeros(len(support)), 1.0), rcond=None)[0][:-1]
    if solved.min() < 0 or not solved.sum() > 0.5:
        return alpha
    better = np.zeros_like(alpha)
    better[support] = solved / solved.sum()
    return better if _gap(matrix, better) < _gap(matrix, alpha) else alpha


def _gap(matrix: np.ndarray, alpha: np.ndarray) -> float:
    pull = matrix @ alpha
    return float(alpha @ pull - pull.min())
