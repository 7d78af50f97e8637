"""Scores on held-out prompts with fixed seeds, and what changed between two models, with intervals."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from marble.distributed import gather_rows, share
from marble.policy import Policy
from marble.prompts import Record
from marble.rewards import Judging, Reward, RewardTable
from marble.rewards.cache import ScoreCache
from marble.rewards.gather import gather_table
from marble.rewards.judging import to_bytes
from marble.seeds import derive
from marble.statistics import RESAMPLES, bootstrap_interval

SHOWN_PROMPTS = 18
"""How many prompts' images are kept to be looked at, from the first."""
SHOWN_IMAGES = 3
"""How many of each."""


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

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Evaluation:
        """What `to_json` gave, without images."""
        rows = [[float("nan") if v is None else v for v in row] for row in content["scores"]]
        scores = torch.tensor(rows, dtype=torch.float64).view(len(rows), len(content["names"]))
        empty = torch.empty(len(rows), 3, 0, 0, dtype=torch.uint8)
        return cls(content["names"], scores, content["prompts"], empty, content.get("missing", {}))


@dataclass(frozen=True)
class Gain:
    """What one reward gained from one evaluation to another, prompts paired."""

    before: float
    after: float
    gain: float  # in the reward's own units
    low: float  # 95% interval of the gain, bootstrapped over prompts
    high: float
    spread: float  # standard deviation of the first evaluation's scores, to express gains in


def fixed_seeds(count: int) -> list[int]:
    """The seeds of a prompt's images in every evaluation, whatever the run's own seed."""
    return [derive(0, "evaluation", i) % 2**32 for i in range(count)]


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
        scheduler: one of the catalogue's `SCHEDULERS`.
        frames: how many frames of a video a reward for images judges; all, if not given.
        shown: of how many prompts, from the first, the images are kept; of all, if not given.
        cache: scores of earlier evaluations, of the rewards that allow it.
    """
    own, each = share(len(prompts)), len(seeds)
    mine, rows = prompts[own.start : own.stop], range(own.start * each, own.stop * each)
    # every process makes as many calls as the one with the largest share
    idle = [prompts[0]] * (len(share(len(prompts), 0)) - len(mine)) if policy.in_step else []
    table, images, _ = make_and_judge(
        policy,
        rewards,
        mine,
        idle=idle,
        seeds=seeds,
        steps=steps,
        adapter=adapter,
        batch=batch,
        guidance=guidance,
        scheduler=scheduler,
        frames=frames,
        cache=cache,
    )
    table = gather_table(table, rows, len(prompts) * each)
    keep = each * (len(prompts) if shown is None else min(shown, len(prompts)))
    kept = range(min(rows.start, keep), min(rows.stop, keep))
    pixels = gather_rows(to_bytes(images[: len(kept)]), kept, keep)
    texts, missing = [p.text for p in prompts], table.metrics().get("missing", {})
    return Evaluation(table.names, table.scores, texts, pixels, missing, table.silent)


def make_and_judge(
    policy: Policy,
    rewards: Sequence[Reward],
    prompts: Sequence[Record],
    *,
    seeds: Sequence[int],
    frames: int | None,
    cache: ScoreCache | None,
    idle: Sequence[Record] = (),
    **sampling: Any,
) -> tuple[RewardTable, Tensor, list[str]]:
    """What `evaluate` does in one process alone, which is told nothing by the others.

    Args:
        policy: as for `evaluate`.
        rewards: K rewards.
        prompts: of this process, maybe none.
        seeds: as for `evaluate`.
        frames: as for `evaluate`.
        cache: as for `evaluate`.
        idle: prompts whose images are made beside and thrown away, to keep step with other processes.
        sampling: of `Policy.images`: `steps`, `adapter`, `batch`, `guidance`, `scheduler`.

    Returns:
        The table of these prompts' images alone; the images, `[M, 3, H, W]` float in [0, 1]; and the names of the
        rewards that raised or did not answer in time, rather than answer without a number.
    """
    each, made = len(seeds), [*prompts, *idle]
    groups = torch.arange(len(prompts)).repeat_interleave(each)
    judging = Judging(rewards, [record for record in prompts for _ in seeds], groups, frames=frames, cache=cache)
    images = torch.empty(0, 3, 0, 0)
    if made:
        texts, repeated = [record.text for record in made], list(seeds) * len(made)
        images = policy.images(texts, repeated, seen=judging.add, **sampling)[: len(prompts) * each]
    return judging.table(), images, judging.failed


def sample_of(pixels: Tensor) -> Tensor:
    """`[3, H, W]` of an image, or of a video's middle frame."""
    return pixels[len(pixels) // 2] if pixels.ndim == 4 else pixels


def save_sample(pixels: Tensor, folder: Path, prompt: int, image: int) -> None:
    """Write uint8 `[3, H, W]` as `PPP_I.png`, whole or not at all."""
    path = folder / f"{prompt:03d}_{image}.png"
    aside = path.with_name(path.name + ".part")
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(aside, format="PNG")
    os.replace(aside, path)


def paired(before: Evaluation, after: Evaluation, k: int) -> tuple[Tensor, Tensor]:
    """Both evaluations' scores by reward k, `[prompts, images]` each, NaN in both where one of them has none."""
    one, two = (evaluation.scores[:, k].view(len(before.prompts), -1) for evaluation in (before, after))
    both = ~one.isnan() & ~two.isnan()
    return torch.where(both, one, torch.nan), torch.where(both, two, torch.nan)


def gains(before: Evaluation, after: Evaluation, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Gain]:
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
        first, second = (scores.nanmean(dim=1).numpy() for scores in paired(before, after, k))
        judged = ~np.isnan(first)
        difference = (second - first)[judged]
        if not len(difference):
            continue
        low, high = bootstrap_interval(difference, resamples=resamples, seed=rng)
        spread = float(np.nanstd(before.scores[:, k].numpy()))
        means = float(first[judged].mean()), float(second[judged].mean()), float(difference.mean())
        out[name] = Gain(*means, low, high, spread)
    return out
