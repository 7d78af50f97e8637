"""What an evaluation says of each reward, alone and against another: means, accuracies and pairs, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from marble.evaluation import Evaluation, paired
from marble.statistics import FEWEST_PROMPTS, prompt_interval, share_interval, win_rate


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts, with its 95% interval over them; fewer than 5 have none."""

    value: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: np.ndarray, *, share: bool = False) -> Estimate | None:
        """From a value a prompt, `[prompts]`; NaN is left out. None if nothing is left.

        Args:
            values: of prompts.
            share: whether each is a share from 0 to 1; the interval is then Wilson's, which has a width at 0 and 1 too.
        """
        values = np.asarray(values, dtype=float)
        values = values[~np.isnan(values)]
        if not len(values):
            return None
        mean = float(values.mean())
        if share and len(values) >= FEWEST_PROMPTS:
            return cls(mean, *share_interval(mean, len(values)))
        return cls(mean, *(prompt_interval(values) or (None, None)))


@dataclass(frozen=True)
class RewardSummary:
    """One reward. Prompts count alike: every figure is a mean over prompts of the mean over a prompt's images."""

    prompts: int
    """Judged."""
    missing: int
    """Images that it should have judged and did not."""
    mean: Estimate | None
    accuracy_above: float | None = None
    """The score from which an image is right, for rewards that have one."""
    accuracy: Estimate | None = None
    """Share of right images."""
    reference: Estimate | None = None
    """The reference's mean."""
    reference_accuracy: Estimate | None = None
    pairs: int = 0
    """Prompts with an image that both sides have a score of; what follows is of such images, same prompt and seed."""
    difference: Estimate | None = None
    """Of the scores, the reference's subtracted."""
    accuracy_difference: Estimate | None = None
    win_rate: Estimate | None = None
    """Share of pairs with the higher score, ties counting half."""


def summarise(
    evaluated: Evaluation, reference: Evaluation | None = None, accuracies: Mapping[str, float] | None = None
) -> dict[str, RewardSummary]:
    """All rewards.

    Args:
        evaluated: the scores.
        reference: of the same prompts and seeds by the same rewards.
        accuracies: reward → the score from which an image is right.

    Raises:
        ValueError: the two are of different prompts or rewards.
    """
    if reference is not None and (evaluated.prompts, evaluated.names) != (reference.prompts, reference.names):
        raise ValueError("evaluations of different prompts or rewards cannot be paired")
    return {
        name: _summary(evaluated, reference, k, (accuracies or {}).get(name)) for k, name in enumerate(evaluated.names)
    }


def _summary(evaluated: Evaluation, reference: Evaluation | None, k: int, above: float | None) -> RewardSummary:
    own, name = _alone(evaluated, k), evaluated.names[k]
    summary = RewardSummary(
        prompts=_judged(own),
        missing=evaluated.missing.get(name, 0),
        mean=_mean(own),
        accuracy_above=above,
        accuracy=None if above is None else _mean(_right(own, above), share=True),
    )
    if reference is None:
        return summary
    other, (ours, theirs) = _alone(reference, k), paired(evaluated, reference, k)
    wins = np.array([win_rate(one, two) for one, two in zip(ours.numpy(), theirs.numpy(), strict=True)])
    return replace(
        summary,
        reference=_mean(other),
        reference_accuracy=None if above is None else _mean(_right(other, above), share=True),
        pairs=_judged(ours),
        difference=_mean(ours - theirs),
        accuracy_difference=None if above is None else _mean(_right(ours, above) - _right(theirs, above)),
        win_rate=Estimate.of(wins, share=True),
    )


def _alone(evaluation: Evaluation, k: int) -> torch.Tensor:
    """`[prompts, images]` scores by reward k."""
    return evaluation.scores[:, k].view(len(evaluation.prompts), -1)


def _judged(scores: torch.Tensor) -> int:
    """How many prompts have a score."""
    return int((~scores.isnan()).any(dim=1).sum())


def _mean(scores: torch.Tensor, *, share: bool = False) -> Estimate | None:
    """Of `[prompts, images]`."""
    return Estimate.of(scores.nanmean(dim=1).numpy(), share=share)


def _right(scores: torch.Tensor, above: float) -> torch.Tensor:
    """1 where a score is at least `above`, 0 below, NaN where there is none."""
    return torch.where(scores.isnan(), torch.nan, (scores >= above).double())
