import pytest
import torch

from marble.diagnose import reward_cosines, worst_cosines

TRUE = torch.tensor([True, True])


def looked_at(own, const, signal=TRUE, **directions):
    """Rewards' own gradients and a common one given outright, directions as vectors without their common part."""
    own = torch.as_tensor(own, dtype=torch.float64)
    vectors = torch.cat([own, torch.tensor([const], dtype=torch.float64)])
    vectors = torch.cat([vectors, *(torch.tensor([each], dtype=torch.float64) for each in directions.values())])
    every = torch.eye(len(vectors), dtype=torch.float64)
    common = every[len(own)]
    named = {name: (every[len(own) + 1 + i] + common, every[len(own) + 1 + i]) for i, name in enumerate(directions)}
    return worst_cosines(vectors @ vectors.T, every[: len(own) + 1], signal, named)


def test_by_hand():
    # two orthogonal rewards, no advantage-free part, a weighted sum that is the first reward alone
    found = looked_at([[1, 0], [0, 1]], [0, 0], weighted_sum=[2.0, 0], applied=[-1.0, 1])
    assert set(found) == {
        f"{a}/{b}" for a in ("cosine", "cosine_advantage") for b in ("weighted_sum", "applied", "fresh")
    }
    for kind in ("cosine", "cosine_advantage"):
        assert found[f"{kind}/weighted_sum"] == pytest.approx(0)
        assert found[f"{kind}/fresh"] == pytest.approx(0.5**0.5)
        assert found[f"{kind}/applied"] == pytest.approx(-(0.5**0.5))


def test_the_advantage_free_part_is_taken_out():
    found = looked_at([[1, 0, 0], [-1, 0.1, 0]], [0, 0, 5], weighted_sum=[1.0, 0, 0])
    assert found["cosine/weighted_sum"] == pytest.approx((-1 + 25) / (26 * 26.01) ** 0.5)  # the pull hides the conflict
    assert found["cosine_advantage/weighted_sum"] == pytest.approx(-1 / 1.01**0.5)
    # the nearest point of both units' hull: half of each, with the square (1 + cosine) / 2
    assert found["cosine/fresh"] == pytest.approx(((1 + 24 / (26 * 26.01) ** 0.5) / 2) ** 0.5)
    assert found["cosine_advantage/fresh"] == pytest.approx(((1 - 1 / 1.01**0.5) / 2) ** 0.5)


def test_parts_may_be_mixtures_of_the_vectors():
    """As with halves of a batch: a reward's own part is the sum of two rows, and so is the common one."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 9, dtype=torch.float64, generator=generator)  # own 2 × 2 halves, common 2 halves, one more
    parts = torch.tensor([[1, 0, 1, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0]], dtype=torch.float64)
    last = torch.eye(7, dtype=torch.float64)[6]
    found = worst_cosines(rows @ rows.T, parts, TRUE, {"applied": (last, last)})
    own, common = (parts @ rows)[:2], (parts @ rows)[2]
    assert found["cosine_advantage/applied"] == pytest.approx(torch.cosine_similarity(own, rows[6:]).min().item())
    assert found["cosine/applied"] == pytest.approx(torch.cosine_similarity(own + common, rows[6:]).min().item())


def test_fresh_is_never_negative_and_nothing_is_better_for_the_worst_off():
    for seed in range(20):
        g = torch.randn(6, 9, generator=torch.Generator().manual_seed(seed)).tolist()
        found = looked_at(g[:4], g[4], torch.tensor([True, True, False, True]), applied=g[5])
        for kind in ("cosine", "cosine_advantage"):
            assert found[f"{kind}/fresh"] > -1e-9
            assert found[f"{kind}/fresh"] >= found[f"{kind}/applied"] - 1e-9


def test_rewards_without_a_signal_are_left_out():
    own, applied = [[1.0, 0], [-1, 0]], [1.0, 0]
    assert looked_at(own, [0, 0], applied=applied)["cosine/applied"] == pytest.approx(-1)
    one = torch.tensor([True, False])
    assert looked_at(own, [0, 0], one, applied=applied)["cosine/applied"] == pytest.approx(1)
    assert looked_at(own, [0, 0], ~TRUE, applied=applied) == {}


def test_a_gradient_that_is_not_finite_is_left_out():
    for broken in (torch.nan, torch.inf):
        found = looked_at([[1.0, 0], [broken, 1], [1, 1]], [0, 0], torch.ones(3, dtype=torch.bool), applied=[1.0, 0])
        assert found["cosine/applied"] == pytest.approx(0.5**0.5)
        assert found["cosine_advantage/fresh"] == pytest.approx(((1 + 0.5**0.5) / 2) ** 0.5)


def test_a_direction_that_is_zero_has_no_cosine():
    assert looked_at([[1.0, 0], [0, 1]], [0, 0], applied=[0.0, 0])["cosine/applied"] == 0


def test_reward_cosines():
    rows = torch.tensor([[2.0, 0], [1, 1], [0, 0]])
    half = 0.5**0.5
    expected = torch.tensor([[1, half, 0], [half, 1, 0], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(reward_cosines(rows @ rows.T), expected, atol=1e-7, rtol=0)


def test_reward_cosines_of_one_that_is_not_finite():
    rows = torch.tensor([[2.0, 0], [torch.nan, 1], [1, 1]])
    found = reward_cosines(rows @ rows.T)
    assert found[0, 2] == pytest.approx(0.5**0.5)
    assert found[1].tolist() == found[:, 1].tolist() == [0, 0, 0]
