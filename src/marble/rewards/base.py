"""The contract of a reward, and the table that several of them fill in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from marble.errors import MarbleError
from marble.prompts import Record
from marble.registry import resolve


class Reward:
    """Base of all rewards: higher is better, the scale is the reward's own.

    A subclass sets `name` and writes `score`; it overrides `applies` if it cannot judge every prompt.
    Models are loaded on first use, not when the object is made.
    """

    name: str
    groupwise: bool = False
    """Whether `score` judges the images of one prompt together (it is then called once a group)."""
    judges_videos: bool = False
    """Whether videos come whole, `[N, F, 3, H, W]`; otherwise their frames do, as pictures, and the mean counts."""
    wants_floats: bool = False
    """Images come as uint8 so that local and remote scores agree; set this to get floats in [0, 1]."""
    revision: str = ""
    """What exactly scored: a model's revision, a world's version. Written into `evaluation.json`."""
    about: str = ""
    """One line for `marble list rewards`."""

    def applies(self, record: Record) -> bool:
        """Whether this reward can judge pictures of `record`. Where it cannot, the score is missing, not zero."""
        return True

    def score(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """Judge pictures.

        Args:
            images: `[N, 3, H, W]`, uint8 (or float in [0, 1], see `wants_floats`); `[N, F, 3, H, W]` are videos (see
                `judges_videos`).
            records: `[N]`, the prompts they were made from; all apply.

        Returns:
            `[N]`, higher is better; NaN where a score could not be had.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class RewardTable:
    """Scores of N images by K rewards; `scores` is NaN wherever `applies` is false."""

    names: list[str]  # [K]
    scores: Tensor  # [N, K] float64
    applies: Tensor  # [N, K] bool


def load_rewards(names: Sequence[str]) -> list[Reward]:
    """Make the rewards of the given registered names or `package.module:Class` paths.

    Raises:
        MarbleError: a name is unknown, or two rewards call themselves the same.
    """
    rewards = []
    for name in names:
        reward = resolve("reward", name)
        reward = reward() if isinstance(reward, type) else reward
        missing = [part for part in ("name", "applies", "score") if not hasattr(reward, part)]
        if missing:
            raise MarbleError(
                f'reward "{name}" is no reward: it has no {", ".join(missing)}; derive it from marble.Reward'
            )
        rewards.append(reward)
    own = [reward.name for reward in rewards]
    if twice := sorted({name for name in own if own.count(name) > 1}):
        raise MarbleError(f"rewards: {', '.join(twice)} given more than once")
    return rewards


def score_images(
    rewards: Sequence[Reward],
    images: Tensor,
    records: Sequence[Record],
    group_ids: Tensor,
    *,
    frames: int | None = None,
) -> RewardTable:
    """Score a batch by every reward, each on the images it can judge.

    Args:
        rewards: K rewards.
        images: `[N, 3, H, W]` float in [0, 1], or videos `[N, F, 3, H, W]`; rounded to uint8 for rewards that do not
            ask for floats.
        records: `[N]`, the image's prompt.
        group_ids: `[N]` int64, images of one prompt share a number.
        frames: how many frames of a video, evenly spaced, a reward for images judges; all, if not given.

    Returns:
        The table, on the CPU; a score that is not finite counts as missing.

    Raises:
        MarbleError: a reward does not return one number an image.
    """
    as_bytes = to_bytes(images)
    scores = torch.full((len(images), len(rewards)), torch.nan, dtype=torch.float64)
    for k, reward in enumerate(rewards):
        judged = torch.tensor([reward.applies(record) for record in records], dtype=torch.bool)
        pictures = images if getattr(reward, "wants_floats", False) else as_bytes
        parts = [judged]
        if getattr(reward, "groupwise", False):
            parts = [judged & (group_ids == g) for g in group_ids[judged].unique()]
        for part in parts:
            chosen = part.nonzero().flatten()
            if len(chosen):
                some = [records[i] for i in chosen.tolist()]
                scores[chosen, k] = _score(reward, pictures[chosen], some, frames)
    return RewardTable([reward.name for reward in rewards], scores, ~scores.isnan())


def _spaced(count: int, some: int) -> Tensor:
    """`some` of `count` frames from the first to the last; the middle one of one."""
    return torch.tensor([count // 2]) if some == 1 else torch.linspace(0, count - 1, some).round().long()


def to_bytes(images: Tensor) -> Tensor:
    """uint8 of floats in [0, 1], one image at a time: videos are large."""
    made = torch.empty(images.shape, dtype=torch.uint8)
    for one, image in zip(made, images, strict=True):
        one.copy_((image.clamp(0, 1) * 255).round())
    return made


def _score(reward: Reward, pictures: Tensor, records: list[Record], frames: int | None) -> Tensor:
    """`[N]` float64 scores of pictures or videos, NaN for those that are not finite."""
    if pictures.ndim == 5 and not getattr(reward, "judges_videos", False):
        if frames is not None and frames < pictures.shape[1]:
            pictures = pictures[:, _spaced(pictures.shape[1], frames)]
        each = [_score(reward, frame, records, None) for frame in pictures.unbind(1)]  # groups of one moment each
        return torch.stack(each).nanmean(dim=0)
    result = torch.as_tensor(reward.score(pictures, records))
    if result.shape != (len(pictures),):
        raise MarbleError(
            f"reward {reward.name}: score() must return one number an image, [{len(pictures)}], "
            f"got shape {list(result.shape)}"
        )
    result = result.detach().to("cpu", torch.float64)
    return torch.where(result.isfinite(), result, torch.nan)
