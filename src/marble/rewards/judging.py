"""How a batch of images is judged by several rewards: always in the same portions, some beside the sampling.

What a network answers for an image depends in its last bits on what else is in its batch. So each reward judges the
images that it applies to in order, `batch` at a time (whole groups if it is groupwise), whatever the rollout's batches
were and wherever it judges: in line, in threads, or on a server.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from marble.errors import MarbleError
from marble.prompts import Record
from marble.rewards.base import Reward, RewardTable
from marble.rewards.cache import ScoreCache
from marble.rewards.crew import Crew, Job
from marble.rewards.load import prepare_rewards

log = logging.getLogger("marble")


@dataclass(eq=False)
class _Portion:
    """Images that a reward judges in one call."""

    rows: Tensor  # [M] int64, rising
    job: Job | None = None
    keys: list[bytes] = field(default_factory=list)

    def of(self, pictures: list[Tensor]) -> Tensor:
        """`[M, …]`: its own among all."""
        return torch.stack([pictures[i] for i in self.rows.tolist()])


class Judging:
    """One batch of images on its way through K rewards: `add` images as they are made, then ask for the `table`."""

    def __init__(
        self,
        rewards: Sequence[Reward],
        records: Sequence[Record],
        group_ids: Tensor,
        *,
        frames: int | None = None,
        cache: ScoreCache | None = None,
    ) -> None:
        """For images of `records` `[N]` in the groups `group_ids` `[N]`; see `score_images`."""
        self.rewards, self.records, self.frames, self.cache = rewards, list(records), frames, cache
        if cache is not None:  # what a model's revision is may be known only once it is there
            prepare_rewards([reward for reward in rewards if cache.holds(reward)])
        self.wanted = torch.tensor([applies_to(reward, self.records) for reward in rewards], dtype=torch.bool)
        self.wanted = self.wanted.reshape(len(rewards), len(records)).T
        self.portions = [_portions(reward, self.wanted[:, k], group_ids) for k, reward in enumerate(rewards)]
        self.seconds: dict[str, float] = {}  # of judging, by reward, once the table is there
        self.failed: list[str] = []  # rewards that raised or did not answer in time, once the table is there
        self.hidden = 0.0  # seconds of sampling during which rewards were at work
        self._bytes: list[Tensor] = []  # one an image
        self._floats: list[Tensor] = []
        self._began = time.perf_counter()

    def add(self, images: Tensor) -> None:
        """Take in the next images, `[n, 3, H, W]` float in [0, 1] or videos; more than N are not looked at."""
        images = images[: len(self.records) - len(self._bytes)]
        self._bytes += to_bytes(images).unbind(0)
        if any(getattr(reward, "wants_floats", False) for reward in self.rewards):
            self._floats += images.unbind(0)
        for reward, portions in zip(self.rewards, self.portions, strict=True):
            if getattr(reward, "workers", 0):
                self._submit(reward, portions)

    def table(self) -> RewardTable:
        """Wait for all scores, `[N, K]` on the CPU; those that cannot be had are missing, and a warning says why."""
        sampled = time.perf_counter()
        scores = torch.full((len(self.records), len(self.rewards)), torch.nan, dtype=torch.float64)
        inline = [k for k, reward in enumerate(self.rewards) if not getattr(reward, "workers", 0)]
        beside = [k for k in range(len(self.rewards)) if k not in inline]
        jobs: list[Job] = []
        for k in inline + beside:
            reward, timeout = self.rewards[k], getattr(self.rewards[k], "timeout", Reward.timeout)
            crew, failed, own = Crew.of(reward, max(1, getattr(reward, "workers", 0))), Counter[str](), []
            for portion in self.portions[k]:
                if portion.job is None:
                    self._submit(reward, [portion])
                assert portion.job is not None
                crew.wait(portion.job, timeout)
                own.append(portion.job)
                if portion.job.scores is None or portion.job.given_up:
                    self.failed += [reward.name] * (reward.name not in self.failed)
                    failed[portion.job.error] += len(portion.rows)
                    continue
                scores[portion.rows, k] = portion.job.scores
                if absent := int(portion.job.scores.isnan().sum()):
                    failed["it answered with no number"] += absent
                if self.cache is not None and portion.keys:
                    self.cache.put(portion.keys, portion.job.scores.tolist())
            _report(reward, failed, int(self.wanted[:, k].sum()))
            self.seconds[reward.name] = sum(job.ended - job.began for job in own if job.ended and job.began)
            jobs += own if k in beside else []
        self._bytes, self._floats = [], []  # the judging outlives them
        self.hidden = _covered([(job.began, min(job.ended, sampled)) for job in jobs if job.ended and job.began])
        return RewardTable.of([reward.name for reward in self.rewards], scores, self.wanted)

    def times(self) -> dict[str, Any]:
        """Seconds of work of each reward, and of the sampling during which some was done."""
        return {"judging": self.seconds, "hidden": self.hidden}

    def _submit(self, reward: Reward, portions: list[_Portion]) -> None:
        """Have what is complete judged."""
        pictures = self._floats if getattr(reward, "wants_floats", False) else self._bytes
        for portion in portions:
            if portion.job is not None or int(portion.rows[-1]) >= len(pictures):
                continue
            portion.job = self._known(reward, portion, pictures)
            if portion.job is None:  # pictures are put together when their turn comes: there may be many in waiting
                portion.job = Job(functools.partial(self._judge, reward, portion, pictures))
                Crew.of(reward, max(1, getattr(reward, "workers", 0))).submit(portion.job)

    def _judge(self, reward: Reward, portion: _Portion, pictures: list[Tensor]) -> Tensor:
        return judge(reward, portion.of(pictures), [self.records[i] for i in portion.rows.tolist()], self.frames)

    def _known(self, reward: Reward, portion: _Portion, pictures: list[Tensor]) -> Job | None:
        """A finished job if all scores of the portion stand in the cache: part of it would make another batch."""
        if self.cache is None or not self.cache.holds(reward):
            return None
        records = [self.records[i] for i in portion.rows.tolist()]
        portion.keys = self.cache.keys(reward, portion.of(pictures), records, self.frames)
        known = self.cache.get(portion.keys)
        if known is None:
            return None
        portion.keys = []
        job = Job(lambda: torch.tensor(known, dtype=torch.float64))
        job.run()
        return job


def score_images(
    rewards: Sequence[Reward],
    images: Tensor,
    records: Sequence[Record],
    group_ids: Tensor,
    *,
    frames: int | None = None,
    cache: ScoreCache | None = None,
) -> RewardTable:
    """Score a batch by every reward, each on the images it can judge.

    Args:
        rewards: K rewards.
        images: `[N, 3, H, W]` float in [0, 1], or videos `[N, F, 3, H, W]`; rounded to uint8 for rewards that do not
            ask for floats.
        records: `[N]`, the image's prompt.
        group_ids: `[N]` int64, images of one prompt share a number.
        frames: how many frames of a video, evenly spaced, a reward for images judges; all, if not given.
        cache: scores of earlier evaluations.

    Returns:
        The table. A reward that raises, does not answer in time, or answers with another shape or no number, leaves
        scores missing and a warning.
    """
    judging = Judging(rewards, records, group_ids, frames=frames, cache=cache)
    judging.add(images)
    return judging.table()


def judge(reward: Reward, pictures: Tensor, records: list[Record], frames: int | None) -> Tensor:
    """`[N]` float64 scores of pictures or videos, NaN for those that are not finite.

    Raises:
        MarbleError: the reward does not return one number an image.
    """
    if pictures.ndim == 5 and not getattr(reward, "judges_videos", False):
        if frames is not None and frames < pictures.shape[1]:
            pictures = pictures[:, _spaced(pictures.shape[1], frames)]
        each = [judge(reward, frame, records, None) for frame in pictures.unbind(1)]  # groups of one moment each
        return torch.stack(each).nanmean(dim=0)
    result = torch.as_tensor(reward.score(pictures, records))
    if result.shape == (len(pictures), 1):
        result = result[:, 0]
    if result.shape != (len(pictures),):
        raise MarbleError(f"score() must return one number an image, [{len(pictures)}], got shape {list(result.shape)}")
    result = result.detach().to("cpu", torch.float64)
    return torch.where(result.isfinite(), result, torch.nan)


def applies_to(reward: Reward, records: Sequence[Record]) -> list[bool]:
    """Which of `records` a reward can judge.

    Raises:
        MarbleError: it cannot say.
    """
    try:
        if hasattr(reward, "applies_to"):
            return [bool(applies) for applies in reward.applies_to(records)]
        return [bool(reward.applies(record)) for record in records]
    except MarbleError:
        raise
    except Exception as error:
        raise MarbleError(
            f"reward {reward.name}: applies() fails on a prompt: {type(error).__name__}: {error}; it must answer for "
            "every record, with or without targets"
        ) from error


def to_bytes(images: Tensor) -> Tensor:
    """uint8 of floats in [0, 1], one image at a time: videos are large."""
    made = torch.empty(images.shape, dtype=torch.uint8)
    for one, image in zip(made, images, strict=True):
        one.copy_((image.clamp(0, 1) * 255).round())
    return made


def _portions(reward: Reward, wanted: Tensor, group_ids: Tensor) -> list[_Portion]:
    rows = wanted.nonzero().flatten()
    if getattr(reward, "groupwise", False):
        return [_Portion(rows[group_ids[rows] == g]) for g in group_ids[rows].unique()]
    return [_Portion(part) for part in rows.split(max(1, getattr(reward, "batch", Reward.batch))) if len(part)]


def _spaced(count: int, some: int) -> Tensor:
    """`some` of `count` frames from the first to the last; the middle one of one."""
    return torch.tensor([count // 2]) if some == 1 else torch.linspace(0, count - 1, some).round().long()


def _report(reward: Reward, failed: Counter[str], wanted: int) -> None:
    """Warn of what is new: reasons not given for the batch before, and the first batch without any."""
    told: set[str] = getattr(reward, "_told", set())
    for reason, count in failed.items():
        if reason not in told:
            log.warning("reward %s: no score for %d of %d images: %s", reward.name, count, wanted, reason)
    if told and not failed and wanted:
        log.warning("reward %s: answers again", reward.name)
    if wanted and (told or failed):
        with suppress(AttributeError):  # an object without a place for it is told of every time
            reward._told = set(failed)  # type: ignore[attr-defined]


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of time spans."""
    covered, until = 0.0, float("-inf")
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, until))
        until = max(until, stop)
    return covered
