"""What comparisons are told in: intervals, win rates, composite scores, fronts and hypervolumes. Plain NumPy.

Everything here takes arrays of numbers and knows nothing of runs. Larger is better throughout; NaN is what was not
measured.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

RESAMPLES = 2000
FEWEST_PROMPTS, FEW_PROMPTS = 5, 20
"""Of fewer prompts than the first there is no interval, of fewer than the second none by bootstrap."""


def bootstrap_interval(
    values: np.ndarray, *, resamples: int = RESAMPLES, seed: int | np.random.Generator = 0
) -> tuple[float, float]:
    """95% percentile interval of the mean of `values` `[M]`, M ≥ 1, resampled independently of each other.

    Of one value it has no width: say so where it is shown. A generator as `seed` is drawn from where it stands.

    Raises:
        ValueError: there are none, or some are NaN.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not len(values) or np.isnan(values).any():
        raise ValueError(f"need a row of at least one number and no NaN, got {values!r}")
    rng = np.random.default_rng(seed)
    drawn = values[rng.integers(len(values), size=(resamples, len(values)))].mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def seed_interval(values: np.ndarray) -> tuple[float, float] | None:
    """95% interval of the mean over seeds by Student's t; None for fewer than two, which have none."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    return None if len(values) < 2 else t_interval(values)


def t_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Interval of the mean of `values` `[M]`, M ≥ 2, by Student's t: it covers the mean with probability `level`."""
    quantile = float(stats.t.ppf((1 + level) / 2, len(values) - 1))
    half = quantile * float(values.std(ddof=1)) / len(values) ** 0.5
    return float(values.mean()) - half, float(values.mean()) + half


def prompt_interval(values: np.ndarray) -> tuple[float, float] | None:
    """95% interval of a mean over prompts, of a value a prompt `[M]`; NaN is left out.

    None of fewer than 5 prompts. By Student's t of fewer than 20, of which a bootstrap's percentiles lie too close
    together (those of 5 values hold the mean four times in five); from 20 on by bootstrap.
    """
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if len(values) < FEWEST_PROMPTS:
        return None
    return t_interval(values) if len(values) < FEW_PROMPTS else bootstrap_interval(values)


def share_interval(share: float, count: int) -> tuple[float, float]:
    """95% interval of a share of `count` ≥ 1 independent cases, by Wilson's score.

    A mean of `count` independent shares, each between 0 and 1, varies no more than one of yes and no does: for that it
    is never too narrow.
    """
    z = float(stats.norm.ppf(0.975))
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def win_rate(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Share of pairs in which `ours` is larger, ties counting half; pairs with a NaN are left out.

    Returns:
        NaN if no pair is left.
    """
    ours, theirs = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    judged = ~np.isnan(ours) & ~np.isnan(theirs)
    if not judged.any():
        return float("nan")
    difference = ours[judged] - theirs[judged]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def composite_z(table: np.ndarray) -> np.ndarray:
    """`[M]`: mean over metrics of every row's z-score among the rows, from `[M, K]`.

    It depends on which rows are in the table. A metric in which all rows are equal says nothing and counts as 0, and
    so does what was not measured; population standard deviations, as in the paper's Table 1.
    """
    table = np.asarray(table, dtype=float)
    spread = np.nanstd(table, axis=0)
    z = (table - np.nanmean(table, axis=0)) / np.where(spread > 0, spread, 1.0)
    return np.nan_to_num(z).mean(axis=1)


def relative_gain(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean over metrics of `(ours − theirs) / |theirs|`, `[K]` each; 0.14 is "14% better".

    Only as good as the metrics' zeros: it says nothing where they have none.

    Raises:
        ValueError: one of `theirs` is 0.
    """
    ours, theirs = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if (theirs == 0).any():
        raise ValueError(f"a relative gain over 0 is not defined, got {theirs!r}")
    return float(((ours - theirs) / np.abs(theirs)).mean())


def nondominated(points: np.ndarray) -> np.ndarray:
    """`[M]` bool of `[M, D]` points: no other is at least as good in everything and better in something."""
    points = np.asarray(points, dtype=float)
    at_least = (points[:, None] >= points[None]).all(axis=2)  # [i, j]: i is at least as good as j
    better = (points[:, None] > points[None]).any(axis=2)
    return np.logical_not((at_least & better).any(axis=0))


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """Volume that `points` `[M, D]` dominate above `reference` `[D]`, exactly; 0 without a point above it.

    By slicing along the last axis: fine for the tens of points and the few axes of a comparison, exponential in D.
    """
    points, reference = np.asarray(points, dtype=float), np.asarray(reference, dtype=float)
    points = points[(points > reference).all(axis=1)]
    if not len(points):
        return 0.0
    points = points[nondominated(points)]
    if points.shape[1] == 1:
        return float(points.max() - reference[0])
    points = points[np.argsort(-points[:, -1])]
    edges = np.append(points[:, -1], reference[-1])
    volume = 0.0
    for i in range(len(points)):
        depth = edges[i] - edges[i + 1]
        if depth > 0:
            volume += depth * hypervolume(points[: i + 1, :-1], reference[:-1])
    return volume
