"""Scores to advantages: per prompt, per reward, missing scores left out."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(
    scores: Tensor, group_ids: Tensor, applies: Tensor | None = None, std: str = "group", eps: float = 1e-4
) -> Tensor:
    """Standardise every reward against the images of the same prompt.

    Args:
        scores: `[N, K]`, any float dtype; NaN counts as not applicable.
        group_ids: `[N]` integers, the prompt of each image.
        applies: `[N, K]` bool, where a reward can judge an image; everywhere, if not given.
        std: what the centred scores are divided by: the population standard deviation of the `"group"`, or
            of all applicable images of the `"batch"` (DiffusionNFT's `global_std`).
        eps: added to the standard deviation.

    Returns:
        `[N, K]` of the scores' dtype; 0 where a reward does not apply, in a group of one and in a constant
        group. Not clipped.

    Raises:
        ValueError: shapes do not fit, or `std` is neither of the two.
    """
    if std not in ("group", "batch"):
        raise ValueError(f'std must be "group" or "batch", got {std!r}')
    if scores.ndim != 2 or group_ids.shape != scores.shape[:1]:
        raise ValueError(
            f"scores must be [N, K] and group_ids [N], got {tuple(scores.shape)} and {tuple(group_ids.shape)}"
        )
    judged = ~scores.isnan()
    if applies is not None:
        if applies.shape != scores.shape:
            raise ValueError(f"applies must have the shape of scores {tuple(scores.shape)}, got {tuple(applies.shape)}")
        judged = judged & applies.bool()
    filled = torch.where(judged, scores, 0.0)
    groups, member = group_ids.unique(return_inverse=True)

    centred = torch.where(judged, filled - _group_mean(filled, judged, groups, member), 0.0)
    if std == "group":
        spread = _group_mean(centred.square(), judged, groups, member).sqrt()
    else:
        number = judged.sum(0).clamp_min(1)
        mean = filled.sum(0) / number
        spread = (torch.where(judged, filled - mean, 0.0).square().sum(0) / number).sqrt().expand_as(centred)
    flat = _constant(scores, judged, groups, member)
    return torch.where(flat, 0.0, centred / (spread + eps))


def has_signal(scores: Tensor, group_ids: Tensor, applies: Tensor) -> Tensor:
    """`[K]` bool: which rewards tell apart two images of some prompt. The others have nothing to say in this batch."""
    groups, member = group_ids.unique(return_inverse=True)
    return ~_constant(scores, applies & ~scores.isnan(), groups, member).all(dim=0)


def fill_missing(scores: Tensor, group_ids: Tensor, applies: Tensor) -> Tensor:
    """`[N, K]` scores with every missing one replaced by the mean of its prompt's others, or 0 if there are none."""
    groups, member = group_ids.unique(return_inverse=True)
    judged = applies & ~scores.isnan()
    filled = torch.where(judged, scores, 0.0)
    return torch.where(judged, scores, _group_mean(filled, judged, groups, member))


def _group_mean(values: Tensor, judged: Tensor, groups: Tensor, member: Tensor) -> Tensor:
    """`[N, K]` mean over the judged images of each image's group; `values` are 0 where they are not judged."""

    def per_group(part: Tensor) -> Tensor:
        return part.new_zeros(len(groups), part.shape[1]).index_add_(0, member, part)

    return (per_group(values) / per_group(judged.to(values.dtype)).clamp_min(1))[member]


def _constant(scores: Tensor, judged: Tensor, groups: Tensor, member: Tensor) -> Tensor:
    """`[N, K]` bool: the applicable scores of this image's group are all the same (or there are none).

    Asked of the scores themselves: the mean of equal numbers may be off by a rounding error, and divided by
    `eps` that would be an advantage.
    """
    inf = torch.inf
    index = member[:, None].expand_as(scores)
    low = scores.new_full((len(groups), scores.shape[1]), inf)
    low = low.scatter_reduce(0, index, torch.where(judged, scores, inf), "amin")
    high = scores.new_full((len(groups), scores.shape[1]), -inf)
    high = high.scatter_reduce(0, index, torch.where(judged, scores, -inf), "amax")
    return (low >= high)[member]
