import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marble.statistics import (
    bootstrap_interval,
    composite_z,
    hypervolume,
    nondominated,
    relative_gain,
    seed_interval,
    share_interval,
    win_rate,
)


def test_seed_interval_by_hand():
    # mean 2, standard deviation 1, three seeds: 2 ± 4.3027 / sqrt(3)
    low, high = seed_interval(np.array([1.0, 2.0, 3.0]))
    assert low == pytest.approx(2 - 4.30265 / 3**0.5, abs=1e-4)
    assert high == pytest.approx(2 + 4.30265 / 3**0.5, abs=1e-4)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan]])
def test_fewer_than_two_seeds_have_no_interval(values):
    assert seed_interval(np.array(values)) is None


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        low, high = bootstrap_interval(rng.normal(size=40), resamples=400, seed=trial)
        covered += low <= 0 <= high
    assert 0.88 < covered / 300 < 0.985


def test_bootstrap_refuses_what_has_no_mean():
    with pytest.raises(ValueError, match="at least one number"):
        bootstrap_interval(np.array([]))
    with pytest.raises(ValueError, match="no NaN"):
        bootstrap_interval(np.array([1.0, math.nan]))


def test_win_rate_counts_ties_half_and_leaves_out_what_is_missing():
    assert win_rate(np.array([1, 2, 3, math.nan]), np.array([0, 2, 4, 0])) == pytest.approx(0.5)
    assert math.isnan(win_rate(np.array([math.nan]), np.array([1.0])))


def test_composite_z_of_the_papers_rows():
    # MARBLE's ablation in method.md: z-scores depend on the rows, their order does not
    table = np.array([[0.94, 0.96], [0.92, 0.91], [0.86, 0.89]])
    found = composite_z(table)
    by_hand = ((table - table.mean(0)) / table.std(0)).mean(1)
    assert found == pytest.approx(by_hand)
    assert list(np.argsort(-found)) == [0, 1, 2]
    assert composite_z(np.column_stack([table, [1, 1, 1]])) == pytest.approx(by_hand * 2 / 3)


def test_relative_gain_by_hand():
    assert relative_gain(np.array([1.2, -0.5]), np.array([1.0, -1.0])) == pytest.approx((0.2 + 0.5) / 2)
    with pytest.raises(ValueError, match="over 0"):
        relative_gain(np.array([1.0]), np.array([0.0]))


def test_nondominated_keeps_equal_points_and_drops_what_is_worse():
    points = np.array([[1, 3], [2, 2], [2, 2], [1, 2], [3, 1]])
    assert nondominated(points).tolist() == [True, True, True, False, True]


def test_hypervolume_by_hand():
    assert hypervolume(np.array([[2.0, 1.0], [1.0, 2.0]]), np.zeros(2)) == pytest.approx(3.0)
    assert hypervolume(np.array([[1.0, 1.0, 1.0]]), np.zeros(3)) == pytest.approx(1.0)
    assert hypervolume(np.array([[2.0, -1.0]]), np.zeros(2)) == 0.0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 10_000))
def test_hypervolume_is_the_share_of_boxes_that_are_dominated(count, axes, seed):
    rng = np.random.default_rng(seed)
    points = rng.integers(0, 5, (count, axes)).astype(float)
    cells = np.stack(np.meshgrid(*[np.arange(5)] * axes, indexing="ij"), axis=-1).reshape(-1, axes) + 0.5
    inside = (points[:, None] >= cells[None]).all(axis=2).any(axis=0).sum()
    assert hypervolume(points, np.zeros(axes)) == pytest.approx(inside)


def test_share_interval_is_wilsons():
    assert share_interval(0.0, 10) == pytest.approx((0, 1.96**2 / (10 + 1.96**2)), abs=1e-4)
    low, high = share_interval(0.5, 20)
    assert low == pytest.approx(1 - high)
    # (p + z²/2n ± z sqrt(p(1−p)/n + z²/4n²)) / (1 + z²/n) at p = .5, n = 20, z = 1.96
    assert high == pytest.approx((0.5 + 0.09604 + 1.96 * (0.0125 + 0.002401) ** 0.5) / 1.19208, abs=1e-4)
