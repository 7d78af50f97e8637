import pytest
import torch

from marble.balance.method import Direction
from marble.diagnose import reward_cosines, worst_cosines

TRUE = torch.tensor([True, True])


def test_by_hand():
    # two orthogonal rewards, no advantage-free part, a weighted sum that is the first reward alone
    rows = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 0], [2, 0, 0]])
    found = worst_cosines(rows, Direction(torch.tensor([-1.0, 1.0, 0.0]), None), TRUE)
    assert found["cosine/weighted_sum"] == pytest.approx(0)
    assert found["cosine/fresh"] == pytest.approx(0.5**0.5)
    assert found["cosine/applied"] == pytest.approx(-(0.5**0.5))


def test_the_advantage_free_part_is_taken_out():
    const = torch.tensor([0.0, 0.0, 5.0])
    own = torch.tensor([[1.0, 0, 0], [-1.0, 0.1, 0]])
    rows = torch.cat([own + const, const[None], (own[0] + const)[None]])
    found = worst_cosines(rows, Direction(own[0] + const, const), TRUE)
    assert found["cosine/weighted_sum"] > 0.9  # the common pull hides the conflict
    assert found["cosine_advantage/weighted_sum"] < -0.9
    assert found["cosine_advantage/applied"] < -0.9
    assert found["cosine_advantage/fresh"] >= 0


def test_fresh_is_never_negative_and_silent_rewards_are_left_out():
    for seed in range(20):
        rows = torch.randn(6, 9, generator=torch.Generator().manual_seed(seed))
        found = worst_cosines(rows, Direction(rows[0], None), torch.tensor([True, True, False, True]))
        assert found["cosine/fresh"] > -1e-9
        assert found["cosine_advantage/fresh"] > -1e-9
    assert worst_cosines(rows, Direction(rows[0], None), torch.zeros(4, dtype=torch.bool)) == {}


def test_reward_cosines():
    rows = torch.tensor([[2.0, 1], [1, 2], [1, 1], [0, 0]])
    torch.testing.assert_close(reward_cosines(rows), torch.eye(2, dtype=torch.float64))
