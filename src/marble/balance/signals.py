"""An epoch's scores as advantages: what every method starts from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from marble.advantages import fill_missing, group_advantages, has_signal
from marble.rewards import RewardTable


@dataclass(frozen=True)
class Signals:
    """What an epoch's scores say, in advantages."""

    per_reward: Tensor  # [N, K] float32, clipped by the objective later
    weighted_sum: Tensor  # [N] float32, of the weighted sum of raw scores
    applies: Tensor  # [N, K] bool
    signal: Tensor  # [K] bool, see `has_signal`
    half: Tensor  # [N] int64, 0 or 1: two halves of the batch that share no prompt
    own_sum: Tensor | None = None  # [N] float32, of the sum that the method takes in place of the weighted one


def signals_of(
    table: RewardTable, group_ids: Tensor, weights: Tensor, *, std: str, own_weights: Tensor | None = None
) -> Signals:
    """Advantages of every reward and of their weighted sum, and of that with a method's own weights if it has some.

    Where a reward judges none of a prompt's images it adds nothing to their sums; where it judges some, the others
    count as their mean. The halves take turns over the prompts that the same rewards judge, so that each reward is
    in both of them as evenly as can be.
    """
    filled = fill_missing(table.scores, group_ids, table.applies)

    def of_sum(weights: Tensor) -> Tensor:
        return group_advantages((filled * weights).sum(dim=1, keepdim=True), group_ids, None, std)[:, 0].float()

    return Signals(
        group_advantages(table.scores, group_ids, table.applies, std).float(),
        of_sum(weights),
        table.applies,
        has_signal(table.scores, group_ids, table.applies),
        _halves(table.applies, group_ids),
        None if own_weights is None else of_sum(own_weights),
    )


def _halves(applies: Tensor, group_ids: Tensor) -> Tensor:
    groups, member = group_ids.unique(return_inverse=True)
    turn: dict[tuple[bool, ...], int] = {}  # whose it is next; the kinds do not all begin with the same half
    side = torch.zeros(len(groups), dtype=torch.int64)
    for group in range(len(groups)):
        kind = tuple(applies[member == group].any(dim=0).tolist())
        side[group] = turn.setdefault(kind, len(turn) % 2)
        turn[kind] = 1 - turn[kind]
    return side[member]
