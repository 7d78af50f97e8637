import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marble import group_advantages
from marble.advantages import has_signal


def slow(scores, groups, applies, std, eps):
    """The definition, one number at a time."""
    out = np.zeros_like(scores)
    count, rewards = scores.shape
    judged = applies & ~np.isnan(scores)
    for k in range(rewards):
        everyone = [scores[n, k] for n in range(count) if judged[n, k]]
        for n in range(count):
            if not judged[n, k]:
                continue
            mates = [scores[m, k] for m in range(count) if groups[m] == groups[n] and judged[m, k]]
            if min(mates) == max(mates):
                continue
            mean = math.fsum(mates) / len(mates)
            pool = mates if std == "group" else everyone
            centre = math.fsum(pool) / len(pool)
            spread = math.sqrt(math.fsum((v - centre) ** 2 for v in pool) / len(pool))
            out[n, k] = (scores[n, k] - mean) / (spread + eps)
    return out


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    images=st.integers(1, 24),
    rewards=st.integers(1, 4),
    groups=st.integers(1, 8),
    missing=st.sampled_from([0.0, 0.3, 1.0]),
    std=st.sampled_from(["group", "batch"]),
    scale=st.sampled_from([1e-10, 1.0, 1e10]),
    constant=st.booleans(),
)
def test_equals_the_definition(seed, images, rewards, groups, missing, std, scale, constant):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(images, rewards)) * scale
    ids = rng.integers(groups, size=images)
    if constant:
        scores[ids == ids[0], 0] = 0.1 * scale
    scores[rng.random(scores.shape) < missing / 2] = np.nan
    applies = rng.random(scores.shape) >= missing / 2
    got = group_advantages(torch.from_numpy(scores), torch.from_numpy(ids), torch.from_numpy(applies), std)
    expected = slow(scores, ids, applies, std, 1e-4)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9, atol=1e-9 * max(1.0, np.abs(expected).max()))


def test_by_hand():
    # group 0: 1, 3 → mean 2, population std 1; group 1 has one image, group 2 is constant
    scores = torch.tensor([[1.0], [3.0], [9.0], [5.0], [5.0]], dtype=torch.float64)
    ids = torch.tensor([0, 0, 1, 2, 2])
    got = group_advantages(scores, ids, eps=0.0)
    assert got.flatten().tolist() == [-1.0, 1.0, 0.0, 0.0, 0.0]
    # the whole batch: mean 4.6, variance (3.6² + 1.6² + 4.4² + 0.4² + 0.4²) / 5 = 7.04
    batch = group_advantages(scores, ids, std="batch", eps=0.0)
    assert batch.flatten().tolist() == pytest.approx([-1 / 7.04**0.5, 1 / 7.04**0.5, 0, 0, 0])


def test_missing_scores_do_not_enter_means():
    scores = torch.tensor([[1.0], [3.0], [100.0]])
    ids = torch.zeros(3, dtype=torch.long)
    applies = torch.tensor([[True], [True], [False]])
    with_mask = group_advantages(scores, ids, applies)
    scores[2] = torch.nan
    assert torch.equal(with_mask, group_advantages(scores, ids))
    assert with_mask[2] == 0
    assert with_mask[:2].flatten().tolist() == pytest.approx([-1, 1], abs=1e-3)


def test_constant_group_of_awkward_numbers_gives_exactly_zero():
    """The mean of equal floats may differ from them in the last bit."""
    scores = torch.full((49, 1), 0.1, dtype=torch.float64)
    assert group_advantages(scores, torch.zeros(49, dtype=torch.long), eps=0.0).abs().max() == 0


def test_signal_is_asked_of_scores():
    scores = torch.tensor([[1.0, 2.0, torch.nan], [1.0, 3.0, 1.0], [4.0, 3.0, 2.0], [4.0, 3.0, torch.nan]])
    ids = torch.tensor([0, 0, 1, 1])
    assert has_signal(scores, ids, ~scores.isnan()).tolist() == [False, True, False]


def test_refuses_bad_input():
    scores, ids = torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="std must be"):
        group_advantages(scores, ids, std="all")
    with pytest.raises(ValueError, match=r"\[N, K\]"):
        group_advantages(scores, ids[:3])
    with pytest.raises(ValueError, match="applies"):
        group_advantages(scores, ids, torch.ones(4, 3, dtype=torch.bool))
