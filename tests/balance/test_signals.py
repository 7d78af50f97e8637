"""Two halves of a batch; what is said of advantages is tested with the methods."""

import pytest
import torch

from marble.balance.signals import signals_of
from marble.rewards import RewardTable


def halves(kinds, size=3):
    """Which half `[prompts]` each prompt is in, for prompts that the given rewards `[prompts, K]` judge."""
    judged = torch.tensor(kinds).repeat_interleave(size, dim=0)
    scores = torch.randn(judged.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = RewardTable(["a"] * judged.shape[1], scores.masked_fill(~judged, torch.nan), judged)
    groups = torch.arange(len(kinds)).repeat_interleave(size)
    half = signals_of(table, groups, torch.ones(judged.shape[1]), std="batch").half
    each = half.view(-1, size)
    assert (each == each[:, :1]).all()  # no prompt in both
    return each[:, 0]


PLACES, WORDS, OBJECTS = (True, False, False), (True, True, False), (True, False, True)


KINDS = [PLACES, WORDS, OBJECTS]


def assert_even(prompts):
    side = halves(prompts)
    for kind in KINDS:
        mine = side[torch.tensor([prompt == kind for prompt in prompts])]
        assert abs(2 * mine.sum().item() - len(mine)) == len(mine) % 2
    assert abs(2 * side.sum().item() - len(prompts)) <= 1  # odd ones out do not pile up in one half


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_every_kind_of_prompt_is_in_both_halves_as_evenly_as_can_be(count):
    assert_even([kind for kind in KINDS for _ in range(count)])


@pytest.mark.parametrize("count", [2, 4])
def test_also_where_sources_take_turns(count):
    assert_even(KINDS * count)


def test_scores_missing_here_and_there_do_not_matter():
    judged = torch.ones(12, 2, dtype=torch.bool)
    judged[4, 1] = judged[10, 0] = False
    table = RewardTable(["a", "b"], torch.randn(12, 2, dtype=torch.float64).masked_fill(~judged, torch.nan), judged)
    half = signals_of(table, torch.arange(4).repeat_interleave(3), torch.ones(2), std="batch").half
    assert half.view(4, 3)[:, 0].sum() == 2
