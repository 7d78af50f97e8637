import numpy as np
import pytest

from marble.conflict.scores import correlations, describe_scores

NAN = np.nan
# two prompts of four images; b is a turned upside down and ten times as large; c judges the second prompt alone, and d
# finds the first prompt's images alike
SCORES = np.array(
    [
        [1.0, 40.0, NAN, 5.0],
        [2.0, 30.0, NAN, 5.0],
        [3.0, 20.0, NAN, 5.0],
        [4.0, 10.0, NAN, 5.0],
        [11.0, 9.0, 0.0, 1.0],
        [11.0, 9.0, 1.0, 2.0],
        [13.0, -11.0, 0.0, 3.0],
        [13.0, -11.0, 1.0, 4.0],
    ]
)
GROUPS = np.array([7, 7, 7, 7, 9, 9, 9, 9])
NAMES = ["a", "b", "c", "d"]


def described(advantages=None, weights=(1.0, 1, 1, 1), scores=SCORES, judgeable=None):
    advantages = np.zeros(SCORES.shape) if advantages is None else advantages
    judgeable = ~np.isnan(SCORES) if judgeable is None else judgeable
    return describe_scores(NAMES, scores, judgeable, GROUPS, advantages, np.array(weights))


def test_spreads_by_hand():
    rows = described()["rewards"]
    # a less its prompts' means: ±1.5, ±0.5 and four times ±1
    within = ((2 * 1.5**2 + 2 * 0.5**2 + 4) / 8) ** 0.5
    assert rows["a"]["spread_within"] == pytest.approx(within)
    assert rows["b"]["spread_within"] == pytest.approx(10 * within)
    assert rows["a"]["spread_relative"] == pytest.approx(0.1)
    assert rows["a"]["mean"] == pytest.approx(58 / 8)
    assert rows["c"]["mean"] == 0.5
    assert [rows[name]["judges"] for name in NAMES] == [1, 1, 0.5, 1]
    assert [rows[name]["constant"] for name in NAMES] == [0, 0, 0, 0.5]
    assert described()["mismatch"] == pytest.approx(10 * within / 0.5)  # c: ±0.5


def test_weights_count_in_what_a_sum_makes_of_it():
    even = described(weights=(1, 0.1, 1, 1))
    assert even["mismatch"] == pytest.approx(within_of("a") / 0.5)
    owned = [even["rewards"][name]["owns"] for name in NAMES]
    # a and a tenth of b cancel: the sum is c + d, of square 8; a is with it by 4, c by 2 and d by 6
    assert owned == pytest.approx([0.5, -0.5, 0.25, 0.75])


def within_of(name):
    return described()["rewards"][name]["spread_within"]


def test_a_reward_that_the_sum_works_against_owns_a_negative_share():
    rows = described()["rewards"]
    assert rows["b"]["owns"] > 1
    assert rows["a"]["owns"] < 0


def test_correlations_within_prompts():
    found = correlations(SCORES, np.array([0, 0, 0, 0, 1, 1, 1, 1]))
    pearson, spearman = found["pearson"], found["spearman"]
    assert pearson[0][1] == pytest.approx(-1)  # over all images it would be +0.3 at best: prompts differ
    assert spearman[0][1] == pytest.approx(-1)
    assert found["pearson_low"][0][1] == found["pearson_high"][0][1] == pytest.approx(-1)
    # c against d, second prompt: (−.5, .5, −.5, .5) · (−1.5, −.5, .5, 1.5) over sqrt(1 · 5)
    assert pearson[2][3] == pytest.approx(1 / 5**0.5)
    assert found["jointly"][2][3] == 4
    assert found["jointly"][0][1] == 8
    assert pearson[1][0] == pearson[0][1]
    # a against d: the first prompt adds to a's square alone
    assert pearson[0][3] == pytest.approx(4 / (9 * 5) ** 0.5)


def test_pairs_that_nothing_is_known_of():
    scores = np.array([[1.0, NAN, 3.0], [2.0, NAN, 3.0], [NAN, 1.0, 3.0], [NAN, 2.0, 3.0]])
    found = correlations(scores, np.array([0, 0, 1, 1]))
    assert found["jointly"][0][1] == 0
    assert found["pearson"][0][1] is found["spearman"][0][1] is None
    assert found["pearson"][0][2] is None  # a constant reward


def test_prompts_that_say_how_two_rewards_correlate():
    shared = described()["jointly_prompts"]
    assert shared[0][1] == shared[1][0] == 2
    assert shared[0][2] == 1  # c judges the second prompt alone
    assert shared[0][3] == 1  # and d tells the first one's images not apart
    assert described()["pearson_low"][0][2] == described()["pearson_high"][0][2]  # one prompt's bootstrap has no width


def test_informative_samples_by_hand():
    advantages = np.zeros((8, 4))
    advantages[0] = [2, 0.9, 0, -0.9]  # for a alone
    advantages[1] = [0, -1.5, 0, 0]  # for b alone, bad ones count too
    advantages[2] = [1.5, 1.5, 0, 0]  # for two
    advantages[3] = [2, 2, 2, -2]  # for all
    advantages[4] = [1, 1, 1, 1]  # not beyond 1
    found = described(advantages)
    assert found["informative"] == {"none": 4 / 8, "one": 2 / 8, "some": 1 / 8, "all": 1 / 8}
    assert found["rewards"]["a"]["informative"] == 3 / 8
    assert found["rewards"]["a"]["alone"] == 1 / 8
    assert found["rewards"]["d"]["alone"] == 0


def test_missing_scores_are_counted():
    scores, judgeable = SCORES.copy(), ~np.isnan(SCORES)
    scores[5, 2] = NAN
    row = described(scores=scores, judgeable=judgeable)["rewards"]["c"]
    assert row["missing"] == 1
    assert row["judges"] == 0.5


def test_rewards_that_say_nothing_at_all():
    found = described(scores=np.full(SCORES.shape, NAN))
    assert found["mismatch"] is None
    assert found["rewards"]["a"]["mean"] is None
    assert found["rewards"]["a"]["owns"] == 0
