import json

import numpy as np
import pytest
import torch
from PIL import Image

from marble import Evaluation, Policy, evaluate
from marble.evaluation import fixed_seeds, gains, sample_of, save_sample
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


def test_what_was_written_is_read_back():
    some = table([[0.1, float("nan")], [1 / 3, 2.0]])
    again = Evaluation.from_json(json.loads(json.dumps(some.to_json() | {"missing": {"a": 1}})))
    assert torch.equal(again.scores.nan_to_num(-1), some.scores.nan_to_num(-1))
    assert (again.names, again.prompts, again.missing) == (some.names, some.prompts, {"a": 1})
    assert again.means() == some.means()


def test_seeds_are_the_same_in_every_evaluation():
    assert fixed_seeds(3) == [2673900195, 1158369938, 2762274009]  # results of years rest on them
    assert fixed_seeds(5)[:3] == fixed_seeds(3)


def test_gains_of_several_rewards_draw_from_one_generator():
    rng = np.random.default_rng(1)
    before, after = (table(rng.normal(size=(20, 2))) for _ in range(2))
    found, drawing = gains(before, after, resamples=50, seed=7), np.random.default_rng(7)
    for k, name in enumerate("ab"):
        difference = (after.scores - before.scores)[:, k].view(10, 2).mean(dim=1).numpy()
        means = difference[drawing.integers(10, size=(50, 10))].mean(axis=1)
        expected = np.percentile(means, [2.5, 97.5]).tolist()
        assert [found[name].low, found[name].high] == pytest.approx(expected, rel=1e-12)


def test_samples_are_whole_and_of_a_video_the_middle(tmp_path):
    video = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 3, 4, 4)
    save_sample(sample_of(video), tmp_path, 2, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["002_1.png"]
    assert Image.open(tmp_path / "002_1.png").getpixel((0, 0)) == (1, 1, 1)
