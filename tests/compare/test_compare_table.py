"""The table's numbers, by hand."""

import math

import numpy as np
import pytest

from marble.compare.results import mean_over
from marble.compare.table import choose_baseline, composites, estimate, over_prompts, prompt_interval, summarise

from .made import result, results


def test_estimate_by_hand():
    # 1, 2, 3: standard deviation 1, t(0.975, 2) = 4.302653, half width 4.302653 / √3 = 2.484138
    found = estimate([1.0, 2.0, 3.0, math.nan])
    assert found["mean"] == 2.0
    assert found["low"] == pytest.approx(2 - 2.484138, abs=1e-6)
    assert estimate([5.0]) == {"mean": 5.0, "low": None, "high": None}
    assert estimate([math.nan]) == {"mean": None, "low": None, "high": None}


def test_means_leave_out_what_was_not_judged():
    rows = np.array([[1.0, np.nan], [3.0, np.nan]])
    assert mean_over(rows)[0] == 2.0
    assert np.isnan(mean_over(rows)[1])


def test_prompts_are_resampled_together():
    same = np.array([[1.0, 2.0], [1.0, 2.0]])
    assert prompt_interval(over_prompts(same, [0, 1])) == (1.5, 1.5)
    assert prompt_interval(over_prompts(same, [0, 1], worst=True)) == (1.0, 1.0)
    # the two rewards' gains cancel on every prompt, so that their mean is sure whatever is drawn
    opposite = np.array([[1.0, -1.0], [-1.0, 1.0], [3.0, -3.0]])
    assert prompt_interval(over_prompts(opposite, [0, 1])) == (0.0, 0.0)
    low, high = prompt_interval(over_prompts(opposite, [0]))
    assert low < 1 < high
    single = np.array([[1.0, 1.0], [2.0, np.nan]])  # one prompt has no interval
    assert prompt_interval(over_prompts(single, [1])) == (None, None)


def test_a_row_by_hand():
    found = results(
        marble={0: result(1.0, 0.5, 0.2, cosines=[0.1, -0.1]), 1: result(2.0, 0.7, -0.4, seconds=120.0)},
        weighted_sum={0: result(2.0, -0.5, 0.0), 1: result(2.0, -0.3, 0.0)},
    )
    table = summarise(found, "weighted-sum")
    row = table["marble"]
    assert row["means"]["a"]["mean"] == pytest.approx(1 + 1.5 * 0.5)
    assert row["gains"]["c"]["mean"] == pytest.approx(-0.1)
    assert row["mean_gain"]["mean"] == pytest.approx((0.75 + 1.35) / 2)
    assert row["worst_gain"]["mean"] == pytest.approx((0.5 + 0.7) / 2)
    assert row["worst_gain"]["reward"] == "b"
    assert row["hypervolume"]["mean"] == pytest.approx((1.0 * 0.5 + 2.0 * 0.7) / 2)
    assert table["weighted-sum"]["hypervolume"]["mean"] == 0.0
    assert row["seconds"] == 90.0
    assert row["cosine"] == {"mean": 0.0, "negative": 0.5}
    # marble's a: 1.5 then 2.0, b: 2.5 then 2.7; the sum's a: 2.0, b: 1.5 then 1.7
    first = ((1.5 - 2.0) / 2.0 + (2.5 - 1.5) / 1.5) / 2
    second = ((2.0 - 2.0) / 2.0 + (2.7 - 1.7) / 1.7) / 2
    assert row["relative"]["mean"] == pytest.approx((first + second) / 2)
    assert table["weighted-sum"]["relative"]["mean"] == 0.0


def test_composites_include_the_base_model():
    # a: base 1, arms 1.5 and 2: z −√1.5, 0, √1.5; b and c as well, so that each row's mean is its z
    found = results(x={0: result(1.0, 1.0, 1.0)}, y={0: result(2.0, 2.0, 2.0)})
    table = summarise(found, None)
    assert table["x"]["composite_z"] == pytest.approx(0.0)
    assert table["y"]["composite_z"] == pytest.approx(math.sqrt(1.5))
    assert table["x"]["relative"] is None


def test_one_seed_has_intervals_over_prompts_and_two_have_none_of_those():
    one = summarise(results(x={3: result(1.0, 1.0, 1.0, noise=0.5)}), None)["x"]
    assert one["mean_gain"]["low"] is None
    low, high = one["mean_gain"]["prompts"]
    assert low < one["mean_gain"]["mean"] < high
    two = summarise(results(x={s: result(1.0, 1.0, s) for s in (0, 1)}), None)["x"]
    assert "prompts" not in two["mean_gain"]
    assert two["mean_gain"]["low"] == two["mean_gain"]["high"] == pytest.approx(1.0)


def test_what_is_below_the_base_model_is_so_surely():
    sure = results(x={s: result(1.0, -1.0 + 0.01 * s, -1.0 + 2 * s) for s in (0, 1)})
    assert summarise(sure, None)["x"]["below_base"] == ["b"]
    single = results(x={0: result(1.0, -1.0, -0.1, noise=0.5)})
    assert summarise(single, None)["x"]["below_base"] == ["b"]


def test_relative_gains_without_common_seeds_and_over_zero():
    apart = summarise(results(ppo={0: result(0, 0, 0)}, x={1: result(2.0, 2.0, 0)}), "ppo")
    assert apart["x"]["relative"] == {"mean": pytest.approx((1.0 + 1.0) / 2), "low": None, "high": None, "seeds": 1}
    zero = summarise(results(ppo={0: result(-2.0, 0, 0)}, x={0: result(2.0, 2.0, 0)}), "ppo")
    assert zero["x"]["relative"]["mean"] is None


def test_relative_gains_of_one_seed_have_an_interval_over_prompts():
    one = results(ppo={0: result(0, 0, 0), 1: result(-2.0, 0, 0)}, x={0: result(2.0, 2.0, 0, noise=0.5)})
    found = summarise(one, "ppo")["x"]["relative"]
    low, high = found["prompts"]
    assert found["mean"] == pytest.approx(1.0)
    assert found["seeds"] == 1
    # a on each prompt: 2 ± 0.25 over 1, b: 4 ± 0.5 over 2, so that no draw is more than 25% away
    assert 0.75 <= low < 0.9
    assert 1.1 < high <= 1.25


def test_composites_are_seed_by_seed_where_all_arms_share_two():
    x = {0: result(1, 1, 1), 1: result(2, 2, 2), 2: result(9, 9, 9)}
    y = {0: result(2, 2, 2), 1: result(1, 1, 1)}
    table = summarise(results(x=x, y=y), None)
    for name in ("x", "y"):  # z 0 with one seed, √1.5 with the other
        assert table[name]["composite_z"] == pytest.approx(math.sqrt(1.5) / 2)
        # standard deviation √1.5 / √2, t(0.975, 1) = 12.7062: half width 12.7062 · √1.5 / 2
        half = 12.7062 * math.sqrt(1.5) / 2
        assert table[name]["composite_z_seeds"]["high"] == pytest.approx(math.sqrt(1.5) / 2 + half, abs=1e-4)
    assert composites(results(x=x, y={0: y[0]}))["y"] != pytest.approx(math.sqrt(1.5))  # of x's mean over all seeds


def test_baseline():
    both = results(marble={0: result(1, 1, 1)}, weighted_sum={0: result(1, 1, 1)}, ppo={0: "broke"})
    assert choose_baseline(both) == "weighted-sum"
    assert choose_baseline(both, "marble") == "marble"
    assert choose_baseline(both, "ppo") is None
    assert choose_baseline(results(marble={0: result(1, 1, 1)})) is None
