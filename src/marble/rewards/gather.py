"""Scores of several processes, each of its own images, as one table."""

from __future__ import annotations

from marble.distributed import gather_rows
from marble.rewards.base import RewardTable


def gather_table(table: RewardTable, own: range, count: int) -> RewardTable:
    """The scores of all processes, bit for bit, in every one of them: statistics over a batch are then those of all.

    Args:
        table: of this process's images.
        own: which of the images these are.
        count: N images in all.
    """
    scores, wanted = (gather_rows(rows, own, count) for rows in (table.scores, table.wanted))
    return RewardTable.of(table.names, scores, wanted)
