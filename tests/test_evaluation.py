import numpy as np
import pytest
import torch

from marble import Evaluation, Policy, evaluate
from marble.evaluation import gains
from marble.mini.rewards import Aesthetic, Diversity, TextRendering
from marble.prompts import Record

EMPTY = torch.empty(0)


def table(scores, names=("a", "b"), prompts=None):
    prompts = prompts or [f"p{i}" for i in range(len(scores) // 2)]
    return Evaluation(list(names), torch.tensor(scores, dtype=torch.float64), prompts, EMPTY)


def test_gains_are_paired_and_masked():
    nan = float("nan")
    before = table([[0.0, 1.0], [2.0, 1.0], [4.0, nan], [6.0, nan]])
    after = table([[1.0, 0.0], [3.0, 0.0], [5.0, nan], [7.0, nan]])
    found = gains(before, after)
    assert (found["a"].before, found["a"].after, found["a"].gain) == (3.0, 4.0, 1.0)
    assert (found["a"].low, found["a"].high) == (1.0, 1.0)  # every prompt gained the same
    assert found["a"].spread == pytest.approx(np.std([0, 2, 4, 6]))
    assert (found["b"].before, found["b"].gain) == (1.0, -1.0)


def test_pictures_without_a_score_in_one_evaluation_count_in_neither():
    nan = float("nan")
    before = table([[0.0, 1.0], [10.0, 1.0], [5.0, 1.0], [7.0, 1.0]])
    after = table([[nan, nan], [10.0, nan], [6.0, nan], [8.0, nan]])  # the first of each pair of pictures failed
    found = gains(before, after)
    assert found["a"].before == 8.0  # (10 + 6) / 2
    assert found["a"].gain == pytest.approx(0.5)  # 0 and 1
    assert "b" not in found


def test_what_is_missing_stands_in_the_file():
    some = Evaluation(["a"], torch.zeros(2, 1, dtype=torch.float64), ["p"], EMPTY, {"a": 1})
    assert some.to_json()["missing"] == {"a": 1}
    assert "missing" not in table([[0.0, 1.0], [1.0, 1.0]]).to_json()


def test_a_score_that_failed_does_not_drop_its_prompt():
    nan = float("nan")
    some = table([[1.0, nan], [nan, nan]])
    assert some.per_prompt[0, 0] == 1.0
    assert some.means() == {"a": 1.0, "b": None}


def test_interval_is_that_of_the_mean_over_prompts():
    rng = np.random.default_rng(0)
    difference = rng.normal(0.3, 1.0, size=200)
    before = table(np.zeros((400, 1)), ["a"])
    after = table(np.repeat(difference, 2)[:, None], ["a"])
    found = gains(before, after)["a"]
    half = 1.96 * difference.std() / 200**0.5
    assert found.low == pytest.approx(difference.mean() - half, abs=0.03)
    assert found.high == pytest.approx(difference.mean() + half, abs=0.03)


def test_different_prompts_cannot_be_paired():
    with pytest.raises(ValueError, match="cannot be paired"):
        gains(table([[0.0, 0.0]] * 2), table([[0.0, 0.0]] * 2, prompts=["other"]))


def test_evaluate_is_fixed_by_its_seeds(untrained):
    policy = Policy.from_pretrained(str(untrained), call={"max_sequence_length": 12})
    prompts = [Record("a beach at noon", "x"), Record('the word "CAT" in red', "x", {"text": "CAT"})]
    rewards = [Aesthetic(), TextRendering(), Diversity()]
    one = evaluate(policy, rewards, prompts, seeds=[1, 2, 3], steps=2, adapter=None)
    two = evaluate(policy, rewards, prompts, seeds=[1, 2, 3], steps=2, adapter=None, batch=2)
    assert one.scores.shape == (6, 3)
    assert one.scores[:3, 1].isnan().all()
    torch.testing.assert_close(one.scores, two.scores, atol=1e-3, rtol=0, equal_nan=True)
    assert one.means().keys() == {"aesthetic", "text", "diversity"}
    assert one.to_json()["scores"][0][1] is None
