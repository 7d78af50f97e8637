"""Scores remembered: only where the reward allows it, never for another image, prompt, revision or setting."""

import datetime
import sqlite3

import pytest
import torch

from marble import Reward
from marble.config import RewardUse
from marble.prompts import Record
from marble.rewards import make_reward, score_images
from marble.rewards.cache import VARIABLE, ScoreCache

RECORDS = [Record("a", "s"), Record("b", "s", {"text": "B"})] * 2
GROUPS = torch.tensor([0, 1, 0, 1])


class Counting(Reward):
    name = "counting"
    cached = True
    revision = "1"

    def __init__(self):
        self.judged = 0

    def score(self, images, records):
        self.judged += len(images)
        return images.float().mean(dim=(1, 2, 3)) / 3


@pytest.fixture
def cache(tmp_path):
    return ScoreCache(tmp_path / "deep" / "scores.sqlite")


def pictures(seed=0):
    return torch.rand(4, 3, 5, 4, generator=torch.Generator().manual_seed(seed))


def score(reward, cache, images=None, records=RECORDS):
    return score_images([reward], pictures() if images is None else images, records, GROUPS, cache=cache).scores


def test_a_second_time_nothing_is_judged_and_the_scores_are_the_same(cache, tmp_path):
    reward = Counting()
    first = score(reward, cache)
    assert score(reward, ScoreCache(tmp_path / "deep" / "scores.sqlite")).equal(first)  # from the file
    assert reward.judged == 4


def test_where_it_judges_is_no_matter(cache):
    reward = Counting()
    score(reward, cache)
    reward.settings = {"timeout": 3, "workers": 2, "device": "cuda"}
    score(reward, cache)
    assert reward.judged == 4


@pytest.mark.parametrize("change", ["image", "prompt", "targets", "revision", "settings", "size"])
def test_what_is_different_is_judged_anew(cache, change):
    reward, images, records = Counting(), pictures(), list(RECORDS)
    score(reward, cache)
    if change == "image":
        images[3, 2, 4, 3] = 1 - images[3, 2, 4, 3]
    elif change == "size":
        images = images.reshape(4, 3, 4, 5)
    elif change == "prompt":
        records[0] = Record("c", "s")
    elif change == "targets":
        records[1] = Record("b", "s", {"text": "b"})
    elif change == "revision":
        reward.revision = "2"
    else:
        reward.settings = {"dtype": "bfloat16"}
    score(reward, cache, images, records)
    assert reward.judged == 8


def one(images):
    return torch.ones(len(images))


def seven(images):
    return torch.full((len(images),), 7.0)


one.cached = seven.cached = True
one.revision = seven.revision = "1"


def test_functions_do_not_share_scores(cache):
    for name, expected in (("one", 1), ("seven", 7)):
        reward = make_reward(RewardUse(reward=f"{__name__}:{name}", settings={"name": "same"}))
        assert score(reward, cache).tolist() == [[expected]] * 4


def test_targets_of_any_kind(cache):
    records = [Record("a", "s", {"when": datetime.date(2026, 1, 1)})] * 4
    assert not score(Counting(), cache, records=records).isnan().any()


def test_part_of_a_portion_is_no_portion(cache):
    reward, images = Counting(), pictures()
    score(reward, cache)
    images[0] = 0
    score(reward, cache, images)
    assert reward.judged == 8  # all four: fewer would be another batch, with other last bits


def test_groupwise_scores_belong_to_their_group(cache):
    class Together(Counting):
        name, groupwise = "together", True

        def score(self, images, records):
            self.judged += len(images)
            return torch.full((len(images),), images.float().mean().item())

    reward, images = Together(), pictures()
    score(reward, cache)
    images[2] = 0  # in the group of 0
    score(reward, cache, images)
    assert reward.judged == 4 + 2  # the other group is known


def test_only_rewards_that_allow_it_and_say_what_they_are(cache):
    silent, unnamed = Counting(), Counting()
    silent.cached, unnamed.revision = False, ""
    for reward in (silent, unnamed):
        score(reward, cache)
        score(reward, cache)
        assert reward.judged == 8


def test_what_is_missing_is_not_remembered(cache):
    class Sometimes(Counting):
        def score(self, images, records):
            super().score(images, records)
            return torch.full((4,), torch.nan) if self.judged == 4 else torch.ones(4)

    reward = Sometimes()
    assert score(reward, cache).isnan().all()
    assert score(reward, cache).tolist() == [[1]] * 4


def test_one_that_cannot_be_used_is_done_without(tmp_path, caplog):
    file = tmp_path / "scores.sqlite"
    file.write_text("this is no database, but long enough to be taken for one " * 20)
    reward = Counting()
    scores = score(reward, ScoreCache(file))
    assert not scores.isnan().any()
    assert "scores are not remembered" in caplog.text
    (tmp_path / "file").write_text("")
    score(reward, ScoreCache(tmp_path / "file" / "scores.sqlite"))
    assert reward.judged == 8


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, "off")
    assert ScoreCache.default() is None
    monkeypatch.setenv(VARIABLE, str(tmp_path / "mine"))
    assert ScoreCache.default() is not None
    with sqlite3.connect(tmp_path / "mine" / "scores.sqlite") as connection:
        assert connection.execute("SELECT count(*) FROM scores").fetchone() == (0,)
    connection.close()
