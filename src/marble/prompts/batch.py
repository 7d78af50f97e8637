"""Batches of prompts: sources mixed by share, every prompt repeated G times, seeds by label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from marble.prompts.record import Record
from marble.rules import split_by_share
from marble.seeds import derive, generator


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of one epoch, or one process's share of them: `N = len(prompts) · group_size` images."""

    prompts: list[Record]  # one a group
    group_size: int  # G
    seeds: list[int]  # [N], one an image, groups one after the other
    start: int = 0  # of the first image among those of the whole epoch

    @property
    def records(self) -> list[Record]:
        """`[N]`: every prompt repeated for each image of its group."""
        return [record for record in self.prompts for _ in range(self.group_size)]

    @property
    def group_ids(self) -> Tensor:
        """`[N]` int64: which prompt each image belongs to."""
        return torch.arange(len(self.prompts)).repeat_interleave(self.group_size)

    @property
    def images(self) -> range:
        """Which of the whole epoch's images these are."""
        return range(self.start, self.start + len(self.seeds))

    def part(self, own: range) -> PromptBatch:
        """Some of the prompts, one after the other, with all images of each."""
        images = slice(own.start * self.group_size, own.stop * self.group_size)
        return PromptBatch(
            self.prompts[own.start : own.stop], self.group_size, self.seeds[images], self.start + images.start
        )


class PromptMixture:
    """Draws batches from several sources in fixed shares.

    Every source is walked in a shuffled order of its own, without repeats until it is used up. Which
    prompts epoch `e` gets depends on the seed and on `e` alone, so any process can ask for any epoch.
    """

    def __init__(self, sources: Sequence[tuple[list[Record], float]], *, prompts: int, group_size: int, seed: int):
        """Mix `sources` (records and share each) into batches of `prompts` groups of `group_size`."""
        self.sources = [records for records, _ in sources]
        self.counts = split_by_share([share for _, share in sources], prompts)
        self.group_size = group_size
        self.seed = seed

    def batch(self, epoch: int) -> PromptBatch:
        """The prompts and image seeds of one epoch."""
        prompts = []
        for which, (records, count) in enumerate(zip(self.sources, self.counts, strict=True)):
            for position in range(epoch * count, (epoch + 1) * count):
                lap, at = divmod(position, len(records))
                order = torch.randperm(len(records), generator=generator(self.seed, "prompts", which, lap))
                prompts.append(records[int(order[at])])
        number = len(prompts) * self.group_size
        seeds = [derive(self.seed, "image", epoch, n) % 2**32 for n in range(number)]
        return PromptBatch(prompts, self.group_size, seeds)
