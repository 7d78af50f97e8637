"""A comparison in numbers: for every arm its means, gains, worst reward and cost, with intervals over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from marble.compare.results import Result, Results, mean_over
from marble.statistics import RESAMPLES, composite_z, hypervolume, relative_gain, seed_interval

Estimate = dict[str, Any]
"""`mean`, and `low` and `high` of its 95% interval: None where there are too few seeds for one."""


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95% interval over seeds; NaN is left out, None is what cannot be had."""
    known = np.array([value for value in values if not np.isnan(value)])
    low, high = seed_interval(known) or (None, None)
    return {"mean": float(known.mean()) if len(known) else None, "low": low, "high": high}


def over_prompts(gains: np.ndarray, columns: Sequence[int], *, worst: bool = False, seed: int = 0) -> np.ndarray:
    """What resampled prompts make of the mean (or the smallest) of some rewards' gains.

    Args:
        gains: `[P, K]`, NaN where a reward does not judge a prompt.
        columns: which rewards.
        worst: the smallest instead of the mean.
        seed: of the resampling; equal seeds draw equal prompts.

    Returns:
        `[resamples]`, NaN where some reward judged none of the prompts drawn; all NaN if one judges fewer than two.
    """
    means = resampled(gains[:, list(columns)], seed)
    return means.min(axis=1) if worst else means.mean(axis=1)


def resampled(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """`[resamples, K]` means of `[P, K]` over resampled prompts, NaN left out; all NaN if one has fewer than two."""
    if ((~np.isnan(values)).sum(axis=0) < 2).any():
        return np.full((RESAMPLES, values.shape[1]), np.nan)
    rng = np.random.default_rng(seed)
    return mean_over(values[rng.integers(len(values), size=(RESAMPLES, len(values)))])


def prompt_interval(drawn: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """95% percentile interval of resampled values; none if there are none."""
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return None, None
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def summarise(results: Results, baseline: str | None) -> dict[str, dict[str, Any]]:
    """Arm → its row of the table, of the arms that have a finished run.

    Args:
        results: of the comparison.
        baseline: arm over whose means relative gains are taken.
    """
    arms = {name: list(seeds.values()) for name, seeds in results.done.items() if seeds}
    scores, by_seed = composites(results), composites_by_seed(results)
    return {
        name: _row(results, runs)
        | {"composite_z": scores[name], "composite_z_seeds": estimate([*by_seed.get(name, {}).values()])}
        | {"relative": relative(results, name, baseline) if baseline else None}
        for name, runs in arms.items()
    }


def composites(results: Results) -> dict[str | None, float]:
    """Composite z of every arm with a finished run, and of the base model (None), over all rewards.

    It depends on who is in the table; the base model is. The mean of `composites_by_seed` where there are any, or else
    of the arms' means.
    """
    first, by_seed = results.first, composites_by_seed(results)
    if first is None:
        return {}
    if by_seed:
        return {name: float(np.mean([*scores.values()])) for name, scores in by_seed.items()}
    names = [None, *(name for name, seeds in results.done.items() if seeds)]
    rows = [first.base, *(_mean_scores(list(seeds.values())) for seeds in results.done.values() if seeds)]
    return dict(zip(names, composite_z(np.stack(rows)).tolist(), strict=True))


def composites_by_seed(results: Results) -> dict[str | None, dict[int, float]]:
    """Arm (None: the base model) → seed → composite z among the runs of that seed.

    Of the seeds that all arms with a finished run have, if there are at least two; else empty.
    """
    arms = {name: seeds for name, seeds in results.done.items() if seeds}
    common = sorted(set.intersection(*({*seeds} for seeds in arms.values()))) if arms else []
    found: dict[str | None, dict[int, float]] = {name: {} for name in (None, *arms)}
    for seed in common:
        rows = [runs[seed].means for runs in arms.values()]
        scores = composite_z(np.stack([next(iter(arms.values()))[seed].base, *rows]))
        for name, score in zip(found, scores.tolist(), strict=True):
            found[name][seed] = score
    return found if len(common) > 1 else {}


def _mean_scores(runs: Sequence[Result]) -> np.ndarray:
    """`[K]` means over seeds, NaN left out."""
    return mean_over(np.stack([run.means for run in runs]))


def _row(results: Results, runs: Sequence[Result]) -> dict[str, Any]:
    rewards, trained = results.rewards, len(results.training)
    gains = np.stack([run.gains for run in runs])  # [S, K]
    own = gains[:, :trained]
    every = {name: _gain(gains[:, k], runs, k) for k, name in enumerate(rewards)}
    cosines = [cosine for run in runs for cosine in run.cosines]
    mean, worst = estimate(own.mean(axis=1).tolist()), estimate(own.min(axis=1).tolist())
    if len(runs) == 1:
        prompts = runs[0].prompt_gains
        mean |= {"prompts": list(prompt_interval(over_prompts(prompts, range(trained))))}
        worst |= {"prompts": list(prompt_interval(over_prompts(prompts, range(trained), worst=True)))}
    volumes = [hypervolume(np.atleast_2d(point), np.zeros(trained)) for point in np.nan_to_num(own)]
    known = [run.seconds for run in runs if run.seconds is not None]
    memory = [run.memory for run in runs if run.memory is not None]
    return {
        "seeds": len(runs),
        "means": {name: estimate([run.means[k] for run in runs]) for k, name in enumerate(rewards)},
        "gains": every,
        "mean_gain": mean,
        "worst_gain": worst | {"reward": worst_reward(results, runs)},
        "hypervolume": estimate(volumes),
        "below_base": [name for name, gain in every.items() if below(gain)],
        "seconds": float(np.mean(known)) if known else None,
        "memory": max(memory) if memory else None,
        "images": float(np.mean([run.images for run in runs])),
        "updates": float(np.mean([run.updates for run in runs])),
        "cosine": {
            "mean": float(np.mean(cosines)) if cosines else None,
            "negative": float(np.mean(np.array(cosines) < 0)) if cosines else None,
        },
    }


def _gain(values: np.ndarray, runs: Sequence[Result], k: int) -> Estimate:
    """One reward's gain; of a single seed with its interval over prompts."""
    found = estimate(values.tolist())
    if len(runs) == 1:
        found["prompts"] = list(prompt_interval(over_prompts(runs[0].prompt_gains, [k])))
    return found


def below(gain: Mapping[str, Any]) -> bool:
    """Whether a gain is below 0 with its interval: over seeds, or over prompts where there is one seed."""
    high = gain["high"] if gain["high"] is not None else gain.get("prompts", (None, None))[1]
    return high is not None and high < 0


def worst_reward(results: Results, runs: Sequence[Result]) -> str | None:
    """The training reward with the smallest gain, on average over seeds."""
    own = np.stack([run.gains for run in runs])[:, : len(results.training)].mean(axis=0)
    return None if np.isnan(own).all() else results.training[int(np.nanargmin(own))]


def relative(results: Results, name: str, baseline: str) -> Estimate:
    """Mean over training rewards of an arm's score over the baseline's, minus 1: seed by seed where both have them.

    Nothing where one of the baseline's means is 0 or missing. `seeds` says how many pairs went in; of a single one
    `prompts` is the interval over prompts, resampled alike for both.
    """
    trained = len(results.training)
    ours, theirs = results.done[name], results.done.get(baseline, {})
    common = [seed for seed in ours if seed in theirs]
    if common:
        pairs = [(ours[seed].means[:trained], theirs[seed].means[:trained]) for seed in common]
    elif ours and theirs:
        pairs = [(_mean_scores([*ours.values()])[:trained], _mean_scores([*theirs.values()])[:trained])]
    else:
        pairs = []
    found = [relative_gain(a, b) for a, b in pairs if not ((b == 0) | np.isnan(a) | np.isnan(b)).any()]
    told = estimate(found) | {"seeds": len(found)}
    if len(found) == len(common) == 1:
        drawn = [resampled(arm[common[0]].prompt_scores[:, :trained]) for arm in (ours, theirs)]
        over = np.where(drawn[1] == 0, np.nan, drawn[1])
        told["prompts"] = list(prompt_interval(((drawn[0] - over) / np.abs(over)).mean(axis=1)))
    return told


def choose_baseline(results: Results, wanted: str | None = None) -> str | None:
    """The arm that others are told relative to: the one wanted, else scalarised PPO, else the weighted sum."""
    order = [wanted] if wanted is not None else ["ppo", "weighted-sum"]
    return next((name for name in order if results.done.get(name)), None)
