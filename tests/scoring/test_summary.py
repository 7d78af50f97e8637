import pytest
import torch

from marble import Evaluation
from marble.scoring import Estimate, summarise

NAN = float("nan")


def scores(*rows, missing=None):
    """By one reward, a row a prompt."""
    column = torch.tensor(rows, dtype=torch.float64).flatten()[:, None]
    return Evaluation(["a"], column, [f"p{i}" for i in range(len(rows))], torch.empty(0), missing or {})


def test_every_figure_by_hand():
    found = summarise(scores([1, 3], [2, 2]), scores([0, 3], [3, NAN], missing={"a": 1}), {"a": 3})["a"]
    assert found.mean == few(2.0)  # 2 and 2
    assert found.reference == few(2.25)  # 1.5 and 3
    assert found.difference == few(-0.25)  # (1 + 0) / 2, and 2 − 3 for the one pair there is
    assert found.win_rate == few(0.375)  # won and tied; lost
    assert found.accuracy == few(0.25)  # of at least 3: one of two, none of two
    assert found.reference_accuracy == few(0.75)
    assert found.accuracy_difference == few(-0.5)  # 0 in both pairs of the first, 0 − 1
    assert (found.prompts, found.pairs, found.missing) == (2, 2, 0)


def few(value):
    """Of two prompts: no interval."""
    return Estimate(value, None, None)


def test_of_five_prompts_intervals_are_students():
    found = summarise(scores(*([v, v] for v in (1.0, 2, 3, 4, 5))))["a"].mean
    # t of 4 degrees of freedom is 2.7764; the standard error is √(2.5 / 5)
    assert (found.value, found.low, found.high) == pytest.approx(
        (3, 3 - 2.7764 * 0.5**0.5, 3 + 2.7764 * 0.5**0.5), abs=1e-4
    )


def test_a_share_of_all_or_none_is_not_certain():
    ours, theirs = scores(*[[3, 3]] * 10), scores(*[[1, 1]] * 10)
    found = summarise(ours, theirs, {"a": 3})["a"]
    assert found.win_rate == found.accuracy
    assert (found.win_rate.low, found.win_rate.high) == pytest.approx((0.72247, 1), abs=1e-4)
    assert (found.reference_accuracy.low, found.reference_accuracy.high) == pytest.approx((0, 0.2775), abs=1e-4)


def test_against_itself_all_is_tied():
    found = summarise(scores([1, 3], [2, 5]), scores([1, 3], [2, 5]))["a"]
    assert (found.difference, found.win_rate) == (few(0.0), few(0.5))
    assert found.accuracy is None


def test_one_prompt_has_no_interval_and_none_no_figure():
    one = summarise(scores([1, 2], [NAN, NAN], missing={"a": 2}))["a"]
    assert one.mean == Estimate(1.5, None, None)
    assert (one.prompts, one.missing, one.difference) == (1, 2, None)
    assert summarise(scores([NAN, NAN]))["a"].mean is None


def test_prompts_that_only_one_side_has_scores_of_are_no_pairs():
    found = summarise(scores([1, 1], [NAN, NAN]), scores([NAN, NAN], [1, 1]), {"a": 1})["a"]
    assert found.pairs == 0
    assert (found.difference, found.win_rate, found.accuracy_difference) == (None, None, None)
    assert found.mean == found.reference == Estimate(1.0, None, None)


def test_evaluations_of_other_prompts_are_refused():
    with pytest.raises(ValueError, match="cannot be paired"):
        summarise(scores([1, 2]), scores([1, 2], [3, 4]))
