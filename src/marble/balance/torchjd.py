"""Other methods' weights for the same Gram: the multi-objective methods of TorchJD, by name.

Every method is TorchJD's (SimplexLab/TorchJD 0.18.0, MIT) in what it computes. Where the sums are done:

| method | by | why |
|---|---|---|
| `pcgrad`, `imtl-g`, `aligned-mtl` | TorchJD's weightings | they need nothing but torch |
| `upgrad`, `dualproj` | `keep_floors` | TorchJD's want quadprog (GPL) and qpsolvers (LGPL), and blur by 1e-4 |
| `cagrad` | `min_norm_weights` in a root search | TorchJD's wants cvxpy and its four solvers |
| `nash-mtl` | a damped Newton iteration | TorchJD's wants ECOS (GPL), keeps state, stops at 1e-3 |

The last four are therefore there without TorchJD too. Tests hold each against TorchJD's own. Leaves out: methods that
need more than a Gram, and TorchJD's MGDA, whose exact form is `min_norm_weights`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from marble.balance.dual_cone import keep_floors, split_norms
from marble.balance.min_norm import checked_gram, min_norm_weights
from marble.errors import MarbleError, nearest

TORCHJD: dict[str, str] = {
    "upgrad": "every gradient moved until it opposes none, then the mean (Quinton and Rey 2024)",
    "dualproj": "the mean gradient moved until it opposes none (Lopez-Paz and Ranzato 2017)",
    "cagrad": "the best for the worst-off reward near the mean gradient, c = 0.4 (Liu et al. 2021)",
    "nash-mtl": "the Nash bargaining solution between rewards (Navon et al. 2022)",
    "pcgrad": "what opposes another gradient is cut away, in random order (Yu et al. 2020)",
    "imtl-g": "equal projections on every gradient; weights may be negative (Liu et al. 2021)",
    "aligned-mtl": "the gradients made orthogonal and equally long, then the mean (Senushkin et al. 2023)",
}
"""Name of each method → what it does, in a line."""

_CAGRAD_RADIUS = 0.4
"""`c`: how far CAGrad may leave the mean gradient, as a share of its norm."""

_CAGRAD_STATIONARY = 1e-4
"""TorchJD's `norm_eps`: below this share of the gradients' root sum of squares, CAGrad sees no common direction."""

_NASH_CURVATURE = 1e-8
"""Least eigenvalue that Nash-MTL sees in the cosines: with none, opposite gradients' weights would grow for ever."""


def torchjd_weights(name: str, gram: Tensor, seed: int = 0) -> Tensor:
    """Weights of a TorchJD method for one Gram: the direction is `sum_k w_k g_k`.

    The Gram is brought to a mean diagonal of 1 first (below a trace of 1e-4, which small gradients reach, TorchJD
    takes gradients for 0), and the weights are divided by their sum: only the direction is the method's, its length is
    not. Nothing is kept between calls, and the global random state is left as it was.

    Args:
        name: a key of `TORCHJD`.
        gram: `[K, K]` inner products of K gradients, any float dtype; only its symmetric part counts.
        seed: of the orders in which `pcgrad` goes through the gradients; the others ignore it.

    Returns:
        `[K]` float64 on the CPU, finite, summing to 1. Negative entries occur in `imtl-g`, whose weights know no bound
        where gradients are almost dependent, and in `aligned-mtl`. Uniform for an all-zero Gram, and where the sum
        is not positive or not finite: `cagrad` where no direction serves all, `imtl-g` in some conflicts (there
        TorchJD's division by a negative sum turns its direction round, against every gradient). `nash-mtl` gives
        gradients that are 0 no weight.

    Raises:
        MarbleError: unknown name, or a method that needs TorchJD without it.
        ValueError: `gram` is not square, is empty or not finite.
    """
    if name not in TORCHJD:
        raise MarbleError(
            f'no TorchJD method "{name}": it must be one of {", ".join(TORCHJD)}.{nearest(name, TORCHJD)}'
        )
    matrix = checked_gram(gram)
    count = len(matrix)
    uniform = torch.full((count,), 1 / count, dtype=torch.float64)
    scale = matrix.diagonal().mean()
    if scale <= 0:
        return uniform
    rescaled = torch.from_numpy(matrix / scale)
    if name == "upgrad":
        weights = keep_floors(rescaled, torch.diag(uniform), torch.ones(count, dtype=torch.bool)).sum(dim=0)
    elif name == "dualproj":
        weights = keep_floors(rescaled, uniform, torch.ones(count, dtype=torch.bool))
    elif name == "cagrad":
        weights = _cagrad(rescaled)
    elif name == "nash-mtl":
        weights = _nash_mtl(rescaled)
    else:
        weights = _by_torchjd(name, rescaled, seed)
    total = weights.sum()
    weights = weights / total
    return weights if total > 0 and weights.isfinite().all() else uniform


def _by_torchjd(name: str, gram: Tensor, seed: int) -> Tensor:
    """`[K]` as TorchJD gives them."""
    try:
        from torchjd import aggregation
    except ImportError as error:
        raise MarbleError(
            f'"{name}" needs TorchJD, which is missing: pip install "marble-diffusion[torchjd]"'
        ) from error
    weightings: dict[str, Any] = {
        "pcgrad": aggregation.PCGradWeighting,
        "imtl-g": aggregation.IMTLGWeighting,
        "aligned-mtl": aggregation.AlignedMTLWeighting,
    }
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)  # the CPU's alone: torch.manual_seed would also reach the GPUs'
        weights: Tensor = weightings[name]()(gram)
    if name == "imtl-g":  # divided by their sum already: give its sign back, for products with gradients are positive
        weights = weights * (weights @ gram.diagonal().clamp_min(0).sqrt()).sign()
    return weights


def _cagrad(gram: Tensor) -> Tensor:
    """`g_0 + r g_w / |g_w|`, with `g_0` the mean and `r = c |g_0|`; w on the simplex minimises `g_0 · g_w + r |g_w|`.

    All 0 where `g_w` vanishes. As `|x| = min_t (t + |x|² / t) / 2`, the minimum is that over t of the least
    `|g_w + (t / r) g_0|²`, the minimum-norm point of shifted gradients, and there `t = |g_w|`. The difference
    `t − |g_w(t)|` has the sign of the derivative of a convex function, so it changes its sign once.
    """
    mean_products = gram.mean(dim=1)  # g_k · g_0
    square = float(mean_products.mean().clamp_min(0))
    radius = _CAGRAD_RADIUS * square**0.5
    uniform = torch.full((len(gram),), 1 / len(gram), dtype=torch.float64)
    least = _CAGRAD_STATIONARY * float(gram.trace()) ** 0.5
    if radius < 1e-8:  # the mean is 0 but for rounding, and so is the ball around it
        return uniform

    def solved(t: float) -> Tensor:
        shift = t / radius
        return min_norm_weights(gram + shift * (mean_products[:, None] + mean_products) + shift**2 * square)

    def excess(t: float) -> float:
        weights = solved(t)
        return t - float((weights @ gram @ weights).clamp_min(0).sqrt())

    if excess(least) >= 0:
        return torch.zeros_like(uniform)
    length = brentq(excess, least, 2 * float(gram.abs().max()) ** 0.5, xtol=1e-13, rtol=1e-13)
    return uniform + radius / length * solved(length)


def _nash_mtl(gram: Tensor) -> Tensor:
    """The positive a with `(G a)_k = 1 / a_k`: the least of `a^T G a / 2 − sum log a` (Navon et al., equation 2).

    Solved for `b_k = a_k |g_k|`, which depends on cosines alone, by Newton steps relative to b, damped as
    self-concordance asks, so that they never leave the positive weights.
    """
    norms, cosines = split_norms(gram.numpy())
    used = norms > 0
    values, vectors = np.linalg.eigh(cosines[np.ix_(used, used)])
    curved = (vectors * values.clip(min=_NASH_CURVATURE)) @ vectors.T
    b = np.ones(used.sum())
    for _ in range(1000):
        scaled = b[:, None] * curved * b
        slope = scaled.sum(axis=1) - 1
        if np.abs(slope).max() <= 1e-13 * np.abs(scaled).sum(axis=1).max():
            break
        move = -np.linalg.solve(scaled + np.eye(len(b)), slope)
        decrement = float(np.sqrt(-move @ slope))
        b *= 1 + move / (1 + decrement if decrement > 0.25 else 1.0)
    weights = np.zeros(len(norms))
    weights[used] = b / norms[used]
    return torch.from_numpy(weights)
