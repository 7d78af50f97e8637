"""How rewards disagree in their scores: spreads, correlations within prompts, who speaks of which samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

INFORMATIVE = 1.0
"""A sample is informative for a reward if its advantage is further from 0 than this."""
_RESAMPLES = 1000


def describe_scores(
    names: Sequence[str],
    scores: np.ndarray,
    judgeable: np.ndarray,
    groups: np.ndarray,
    advantages: np.ndarray,
    weights: np.ndarray,
) -> dict[str, Any]:
    """Everything that conflict.json says of the scores; every key has a line in `docs/metrics.md`.

    Args:
        names: K rewards.
        scores: `[M, K]`, NaN where missing.
        judgeable: `[M, K]` bool: the reward can judge the image's prompt.
        groups: `[M]` integers, images of one prompt share a number.
        advantages: `[M, K]`, as training would make them.
        weights: `[K]`, of the weighted sum.
    """
    groups = np.unique(groups, return_inverse=True)[1]
    spreads = [_spread(scores[:, k], groups) for k in range(len(names))]
    largest = max(spreads)
    owned = _owned(scores, groups, weights)
    speaks = np.abs(advantages) > INFORMATIVE
    alone = speaks & (speaks.sum(axis=1, keepdims=True) == 1)
    rewards = {}
    for k, name in enumerate(names):
        judged = scores[~np.isnan(scores[:, k]), k]
        rewards[name] = {
            "mean": float(judged.mean()) if len(judged) else None,
            "spread": float(judged.std()) if len(judged) else None,
            "spread_within": spreads[k],
            "spread_relative": spreads[k] / largest if largest else 0.0,
            "judges": float(judgeable[:, k].mean()),
            "missing": int((judgeable[:, k] & np.isnan(scores[:, k])).sum()),
            "constant": _constant(scores[:, k], groups),
            "informative": float(speaks[:, k].mean()),
            "alone": float(alone[:, k].mean()),
            "owns": float(owned[k]),
        }
    count = speaks.sum(axis=1)
    share = {
        "none": float((count == 0).mean()),
        "one": float((count == 1).mean()),
        "some": float(((count > 1) & (count < len(names))).mean()),
        "all": float((count == len(names)).mean()),
    }
    weighted = [spread * weight for spread, weight in zip(spreads, weights.tolist(), strict=True) if spread]
    mismatch = max(weighted) / min(weighted) if weighted else None
    return {"rewards": rewards, "informative": share, "mismatch": mismatch} | correlations(scores, groups)


def correlations(scores: np.ndarray, groups: np.ndarray) -> dict[str, list[list[Any]]]:
    """Correlations of every two rewards over the images that both judged, each score less its prompt's mean.

    Args:
        scores: `[M, K]`, NaN where missing.
        groups: `[M]` integers from 0.

    Returns:
        `[K, K]` each: `pearson` with `pearson_low` and `pearson_high` (95%, prompts resampled), `spearman` (of the
        centred scores' ranks), None where there are fewer than three images or one of the rewards is constant;
        `jointly`, the number of images; `jointly_prompts`, that of the prompts whose images both tell apart.
    """
    count = scores.shape[1]
    keys = ("pearson", "pearson_low", "pearson_high", "spearman")
    out: dict[str, list[list[Any]]] = {key: [[None] * count for _ in range(count)] for key in keys}
    out |= {key: [[0] * count for _ in range(count)] for key in ("jointly", "jointly_prompts")}
    for i in range(count):
        for j in range(i, count):
            both = ~np.isnan(scores[:, i]) & ~np.isnan(scores[:, j])
            x, y = (_centred(scores[both, k], groups[both]) for k in (i, j))
            found = _correlated(x, y, groups[both])
            prompts = len(set(groups[both][x != 0]) & set(groups[both][y != 0]))
            for a, b in {(i, j), (j, i)}:
                out["jointly"][a][b], out["jointly_prompts"][a][b] = int(both.sum()), prompts
                for key, value in zip(keys, found, strict=True):
                    out[key][a][b] = value
    return out


def _correlated(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> tuple[float | None, ...]:
    if len(x) < 3 or not x.any() or not y.any():
        return None, None, None, None
    member = np.unique(groups, return_inverse=True)[1]
    sums = np.stack([np.bincount(member, weights=each) for each in (x * y, x * x, y * y)], axis=1)
    drawn = sums[np.random.default_rng(0).integers(len(sums), size=(_RESAMPLES, len(sums)))].sum(axis=1)
    drawn = drawn[(drawn[:, 1] > 0) & (drawn[:, 2] > 0)]
    low, high = np.percentile(drawn[:, 0] / np.sqrt(drawn[:, 1] * drawn[:, 2]), [2.5, 97.5])
    total = sums.sum(axis=0)
    spearman = stats.spearmanr(x, y).statistic
    return float(total[0] / np.sqrt(total[1] * total[2])), float(low), float(high), float(spearman)


def _centred(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Values less their group's mean; exactly 0 in a group whose values are all the same."""
    member = np.unique(groups, return_inverse=True)[1]
    low, high = np.full(len(values), np.inf), np.full(len(values), -np.inf)
    np.minimum.at(low, member, values)
    np.maximum.at(high, member, values)
    mean = np.bincount(member, weights=values) / np.bincount(member) if len(values) else values
    return np.where(low[member] == high[member], 0.0, values - mean[member])


def _spread(scores: np.ndarray, groups: np.ndarray) -> float:
    """Root of the mean square of what a score differs from its prompt's mean; 0 if nothing is judged."""
    judged = ~np.isnan(scores)
    return float(np.sqrt(np.square(_centred(scores[judged], groups[judged])).mean())) if judged.any() else 0.0


def _constant(scores: np.ndarray, groups: np.ndarray) -> float | None:
    """Share of the prompts with two judged images or more in which all scores are the same; None without any."""
    alike = []
    for group in np.unique(groups[~np.isnan(scores)]):
        values = scores[(groups == group) & ~np.isnan(scores)]
        if len(values) > 1:
            alike.append(values.min() == values.max())
    return float(np.mean(alike)) if alike else None


def _owned(scores: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`[K]` share of the weighted sum's variance within prompts that is each reward's: `cov(part, sum) / var(sum)`.

    They add up to 1; one may be negative. All 0 if the sum is constant. A missing score counts as its prompt's mean.
    """
    parts = np.zeros_like(scores)
    for k in range(scores.shape[1]):
        judged = ~np.isnan(scores[:, k])
        parts[judged, k] = weights[k] * _centred(scores[judged, k], groups[judged])
    total = parts.sum(axis=1)
    variance = total @ total
    return parts.T @ total / variance if variance > 0 else np.zeros(scores.shape[1])
