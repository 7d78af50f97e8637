"""Methods that follow one advantage of a sum: scaled, or of some rewards at a time."""

import pytest
import torch

from marble.balance.method import Method
from marble.rewards import RewardTable

from .toy import SIZE, config, table_of


@pytest.fixture
def table():
    return table_of()


def summed(table, method):
    """The advantage that a method of sums follows, before its strength is matched."""
    groups = torch.arange(len(table.scores)) // SIZE
    signals = method.signals(table, groups)
    method.advance()
    return method.combined(signals)


def test_standardised_sum_does_not_depend_on_the_scales(table):
    def follow(scales):
        scaled = RewardTable(table.names, table.scores * torch.tensor(scales).double(), table.applies)
        return summed(scaled, Method(config(method="standardised-sum", advantage_scale="published")))

    torch.testing.assert_close(follow([1.0, 1.0, 1.0]), follow([50.0, 1.0, 0.01]), atol=1e-3, rtol=1e-3)


def test_standardised_sum_by_hand():
    # standard deviations 1 and 10 over the batch, so that the sum is (1 + 1, 1 − 1, −1 + 1, −1 − 1) = (2, 0, 0, −2)
    scores = torch.tensor([[1.0, 10], [1, -10], [-1, 10], [-1, -10]], dtype=torch.float64)
    table = RewardTable(["a", "b"], scores, torch.ones(4, 2, dtype=torch.bool))
    found = summed(table, Method(config({}, {}, method="standardised-sum", advantage_scale="published")))
    torch.testing.assert_close(found, torch.tensor([2.0, 0, 0, -2]) / (2**0.5 + 1e-4))


def test_a_reward_without_spread_counts_for_nothing_in_a_standardised_sum(table):
    scores = table.scores.clone()
    scores[:, 0] = 0.3
    flat = RewardTable(table.names, scores, table.applies)
    assert Method(config(method="standardised-sum")).sum_weights(flat)[0] == 0


def test_sequential_follows_one_stage_after_another(table):
    stages = [{"rewards": ["r0"]}, {"rewards": ["r1", "r2"], "share": 2}]
    method = Method(config(method="sequential", stages=stages, updates=9))
    seen = []
    for _ in range(9):
        seen.append((method.sum_weights(table) > 0).tolist())
        method.advance()
    assert seen == [[True, False, False]] * 3 + [[False, True, True]] * 6
    each = Method(config(method="sequential", updates=6))
    assert (each.sum_weights(table) > 0).tolist() == [True, False, False]


def test_sequential_goes_on_with_its_stage_after_a_resume(table):
    method = Method(config(method="sequential", updates=6))
    for _ in range(3):
        method.advance()
    other = Method(config(method="sequential", updates=6))
    other.load_state_dict(method.state_dict())
    assert (other.sum_weights(table) > 0).tolist() == [False, True, False]
