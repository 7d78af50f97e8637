"""Scores on held-out prompts with fixed seeds, and what changed between two models, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from marble.distributed import gather_rows, share
from marble.policy import Policy
from marble.prompts import Record
from marble.rewards import Judging, Reward
from marble.rewards.cache import ScoreCache
from marble.rewards.gather import gather_table
from marble.rewards.judging import to_bytes


@dataclass(frozen=True)
class Evaluation:
    """Scores of `M = prompts · seeds` images by K rewards, prompt after prompt."""

    names: list[str]  # [K]
    scores: Tensor  # [M, K] float64, NaN where a reward does not apply
    prompts: list[str]  # one a group of images
    images: Tensor  # [M, 3, H, W] ([M, F, 3, H, W] of videos) uint8, or those of the first prompts alone
    missing: dict[str, int] = field(default_factory=dict)  # images that a reward should have judged and did not
    silent: list[str] = field(default_factory=list)  # rewards that should have judged images and did none

    @property
    def per_prompt(self) -> np.ndarray:
        """`[prompts, K]` mean scores, NaN where a reward does not apply."""
        grouped = self.scores.view(len(self.prompts), -1, len(self.names))
        return grouped.nanmean(dim=1).numpy()

    def means(self) -> dict[str, float | None]:
        """Mean score by reward, over the prompts that it judges; None if there are none."""
        columns = {name: column[~np.isnan(column)] for name, column in zip(self.names, self.per_prompt.T, strict=True)}
        return {name: float(column.mean()) if len(column) else None for name, column in columns.items()}

    def to_json(self) -> dict[str, Any]:
        """Everything but the images; NaN becomes null."""
        rows = [[None if np.isnan(v) else v for v in row] for row in self.scores.tolist()]
        content = {"names": self.names, "prompts": self.prompts, "scores": rows, "means": self.means()}
        return content | ({"missing": self.missing} if self.missing else {})


@dataclass(frozen=True)
class Gain:
    """What one reward gained from one evaluation to another, prompts paired."""

    before: float
    after: float
    gain: float  # in the reward's own units
    low: float  # 95% interval of the gain, bootstrapped over prompts
    high: float
    spread: float  # standard deviation of the first evaluation's scores, to express gains in


def evaluate(
    policy: Policy,
    rewards: Sequence[Reward],
    prompts: Sequence[Record],
    *,
    seeds: Sequence[int],
    steps: int = 40,
    adapter: str | None = "ema",
    batch: int = 256,
    guidance: float = 1.0,
    scheduler: str = "own",
    frames: int | None = None,
    shown: int | None = None,
    cache: ScoreCache | None = None,
) -> Evaluation:
    """Make images of `prompts` with the same `seeds` for each prompt, and score them.

    Several processes share the prompts out, and all of them have to call this; each gets the whole evaluation.

    Args:
        policy: the model.
        rewards: K rewards.
        prompts: held-out prompts.
        seeds: one image per prompt and seed; at least 2 for groupwise rewards to say anything.
        steps: denoising steps.
        adapter: which adapter to evaluate, None for the base model.
        batch: images sampled in one call of the pipeline.
        guidance: guidance scale; 1 for none.
        scheduler: one of `marble.noise.SCHEDULERS`.
        frames: how many frames of a video a reward for images judges; all, if not given.
        shown: of how many prompts, from the first, the images are kept; of all, if not given.
        cache: scores of earlier evaluations, of the rewards that allow it.
    """
    own, each = share(len(prompts)), len(seeds)
    mine, rows = prompts[own.start : own.stop], range(own.start * each, own.stop * each)
    images, made = torch.empty(0, 3, 0, 0), [*mine]
    if policy.in_step:  # every process makes as many calls as the one with the largest share
        made += [prompts[0]] * (len(share(len(prompts), 0)) - len(mine))
    groups = torch.arange(own.start, own.stop).repeat_interleave(each)
    judging = Judging(rewards, [record for record in mine for _ in seeds], groups, frames=frames, cache=cache)
    if made:
        images = policy.images(
            [p.text for p in made],
            list(seeds) * len(made),
            steps=steps,
            adapter=adapter,
            guidance=guidance,
            scheduler=scheduler,
            batch=batch,
            seen=judging.add,
        )[: len(rows)]
    table = gather_table(judging.table(), rows, len(prompts) * each)
    keep = each * (len(prompts) if shown is None else min(shown, len(prompts)))
    kept = range(min(rows.start, keep), min(rows.stop, keep))
    pixels = gather_rows(to_bytes(images[: len(kept)]), kept, keep)
    texts, missing = [p.text for p in prompts], table.metrics().get("missing", {})
    return Evaluation(table.names, table.scores, texts, pixels, missing, table.silent)


def gains(before: Evaluation, after: Evaluation, *, resamples: int = 2000, seed: int = 0) -> dict[str, Gain]:
    """Paired gains by reward, with percentile bootstrap intervals over prompts.

    Prompts, not images, are resampled: images of one prompt are not independent of each other. Images that a reward
    gave no score for in one of the two count in neither; a reward without a pair of scores has no gain.

    Raises:
        ValueError: the two were not made with the same prompts and rewards.
    """
    if before.prompts != after.prompts or before.names != after.names:
        raise ValueError("evaluations of different prompts or rewards cannot be paired")
    rng = np.random.default_rng(seed)
    out = {}
    for k, name in enumerate(before.names):
        each = [evaluation.scores[:, k].view(len(before.prompts), -1) for evaluation in (before, after)]
        paired = ~each[0].isnan() & ~each[1].isnan()
        first, second = (torch.where(paired, scores, torch.nan).nanmean(dim=1).numpy() for scores in each)
        judged = paired.any(dim=1).numpy()
        difference = (second - first)[judged]
        if not len(difference):
            continue
        drawn = difference[rng.integers(len(difference), size=(resamples, len(difference)))].mean(axis=1)
        low, high = np.percentile(drawn, [2.5, 97.5])
        spread = float(np.nanstd(before.scores[:, k].numpy()))
        out[name] = Gain(
            float(first[judged].mean()),
            float(second[judged].mean()),
            float(difference.mean()),
            float(low),
            float(high),
            spread,
        )
    return out
