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
    # Of two prompts, 0.05 of the resamples and more are twice the same one: intervals reach from one to the other.
    assert found.mean == Estimate(2.0, 2.0, 2.0)  # 2 and 2
    assert found.reference == Estimate(2.25, 1.5, 3.0)  # 1.5 and 3
    assert found.difference == Estimate(-0.25, -1.0, 0.5)  # (1 + 0) / 2, and 2 − 3 for the one pair there is
    assert found.win_rate == Estimate(0.375, 0.0, 0.75)  # won and tied; lost
    assert found.accuracy == Estimate(0.25, 0.0, 0.5)  # of at least 3: one of two, none of two
    assert found.reference_accuracy == Estimate(0.75, 0.5, 1.0)
    assert found.accuracy_difference == Estimate(-0.5, -1.0, 0.0)  # 0 in both pairs of the first, 0 − 1
    assert (found.prompts, found.pairs, found.missing) == (2, 2, 0)


def test_against_itself_all_is_tied():
    found = summarise(scores([1, 3], [2, 5]), scores([1, 3], [2, 5]))["a"]
    assert found.difference == Estimate(0.0, 0.0, 0.0)
    assert found.win_rate == Estimate(0.5, 0.5, 0.5)
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
