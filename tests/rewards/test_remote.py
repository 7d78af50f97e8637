import re
import time

import pytest
import torch

from marble import MarbleError
from marble.config import RewardUse
from marble.prompts import Record
from marble.rewards import load_rewards, make_reward, score_images
from marble.rewards.judging import Judging
from marble.serve.desk import revision_of

from .running import (
    BLUE,
    EXPECTED,
    IMAGES,
    RED,
    TOKEN,
    Clip,
    Mean,
    Together,
    pictures,
    remote,
    serving,
)

pytestmark = pytest.mark.usefixtures("quick")


def test_names_and_settings(server):
    by_url = make_reward(RewardUse(reward=f"{server}/mean"))
    assert (by_url.name, by_url.urls, by_url.workers) == ("mean", [server], 4)
    by_url.check()
    assert (by_url.revision, by_url.batch, by_url.about) == ("mean 1", 5, "mean of all values")
    assert by_url.accuracy_above == 0.1
    assert not by_url.groupwise
    settings = {"name": "brightness", "batch": 7, "workers": 2, "answer_within": 3}
    own = make_reward(RewardUse(reward="served-mean", url=[server + "/"], settings=settings))
    own.check()
    assert (own.name, own.batch, own.workers, own.answer_within) == ("brightness", 7, 2, 3.0)
    assert own.score(IMAGES, [RED] * 3).tolist() == EXPECTED
    remote("mean", server, workers=64).check()
    with pytest.raises(MarbleError, match=r"settings\.workers must be .*at most 64, got 65"):
        remote("mean", server, workers=65)
    together = remote("together", server)
    together.check()
    assert together.groupwise
    for use in (
        {"reward": "http://127.0.0.1:8420/"},
        {"reward": "http://mean"},
        {"reward": "mean", "url": "127.0.0.1:8420"},
        {"reward": "mean", "url": "http://me:secret@host:1"},
        {"reward": f"{server}/mean", "url": server},
        {"reward": "mean", "url": server, "settings": {"retries": -1}},
        {"reward": "mean", "url": server, "settings": {"answer_within": 0}},
        {"reward": "mean", "url": server, "settings": {"dtype": "float32"}},
        {"reward": "mean", "url": server, "settings": {"token_variable": 3}},
    ):
        with pytest.raises(MarbleError) as caught:
            make_reward(RewardUse.model_validate(use))
        assert "secret" not in str(caught.value)


def test_tables_are_those_of_local_rewards(server):
    records = [RED, BLUE, Record("red", "other"), RED, BLUE, RED] * 4
    images = pictures(*range(0, 240, 10)).float() / 255
    groups = torch.arange(24) % 6
    clips = images.reshape(6, 4, 3, 4, 4)
    for local, name in ((Mean(), "mean"), (Together(), "together")):
        tables = [score_images([each], images, records, groups) for each in (local, remote(name, server))]
        assert torch.equal(tables[0].wanted, tables[1].wanted)
        assert tables[0].scores.numpy().tobytes() == tables[1].scores.numpy().tobytes()
        assert tables[0].applies.any()
    for local, name in ((Mean(), "mean"), (Clip(), "clip")):
        tables = [
            score_images([each], clips, [RED] * 6, groups[:6], frames=3) for each in (local, remote(name, server))
        ]
        assert tables[0].scores.numpy().tobytes() == tables[1].scores.numpy().tobytes()
        assert tables[0].applies.all()


def test_what_applies_is_asked_once_and_in_bulk():
    class Once(Mean):
        asked = 0

        def applies(self, record):
            type(self).asked += 1
            return "text" in record.targets

    records = [Record(str(n), "s", {"text": "A"} if n % 3 else {}) for n in range(2500)]
    with serving(Once()) as (url, app):
        reward = remote("mean", url)
        for _ in range(2):
            assert reward.applies_to(records + records) == [bool(n % 3) for n in range(2500)] * 2
        assert reward.applies(records[1])
        assert app.metrics.requests["/applies", 200] == 3
    assert Once.asked == 2500


def test_a_server_that_is_not_there_refuses_or_has_another_reward(server, monkeypatch, unused):
    with pytest.raises(MarbleError, match=f"{unused} does not answer: ConnectError"):
        remote("mean", unused).check()
    with pytest.raises(MarbleError, match=r'serves no reward "men"\. Did you mean "mean"\? It serves: mean, together'):
        remote("men", server).check()
    with serving(Mean(), token=TOKEN) as (url, _):
        with pytest.raises(MarbleError, match=r"answered 401: .*the environment variable MARBLE_TOKEN"):
            remote("mean", url).check()
        monkeypatch.setenv("MARBLE_TOKEN", TOKEN)
        reward = remote("mean", url)
        reward.check()
        assert reward.score(IMAGES, [RED] * 3).tolist() == EXPECTED
        monkeypatch.setenv("MARBLE_TOKEN", "zwölf zeichen")
        with pytest.raises(MarbleError, match="MARBLE_TOKEN: a token is of ASCII"):
            remote("mean", url).check()


def test_without_a_server_scores_are_missing_and_what_waits_fails_at_once(unused, caplog):
    reward = remote("mean", unused, batch=1)
    table = score_images([reward], IMAGES.float() / 255, [RED] * 3, torch.arange(3))
    assert table.wanted.all()
    assert table.missing.tolist() == [3]
    assert "does not answer" in caplog.text
    began = time.perf_counter()
    for _ in range(20):
        with pytest.raises(MarbleError, match="does not answer"):
            reward.score(IMAGES, [RED] * 3)
    assert time.perf_counter() - began < 0.3  # less than one round of tries each


def test_a_server_that_comes_late_is_asked_with_its_own_portions(unused):
    reward = remote("together", unused)
    assert reward.applies_to([RED]) == [True]
    assert not reward.groupwise
    time.sleep(0.35)
    with serving(Together()) as (url, _):
        reward.urls, reward._servers = [url], []
        with pytest.raises(MarbleError, match="could not be asked before, and wants other portions"):
            reward.score(IMAGES, [RED] * 3)
        assert reward.applies_to([RED]) == [True]
        assert reward.groupwise
        assert reward.score(IMAGES, [RED] * 3).tolist() == [3.0] * 3
        assert remote("together", url).score(IMAGES, [RED] * 3).tolist() == [3.0] * 3


def test_several_servers_share_the_work_and_stand_in_for_each_other(unused, caplog):
    with serving(Mean()) as (one, first), serving(Mean()) as (two, second):
        reward = remote("mean", one, two)
        reward.check()
        for _ in range(6):
            reward.score(IMAGES, [RED] * 3)
        assert [app.metrics.requests["/score", 200] for app in (first, second)] == [3, 3]
        lame = remote("mean", unused, one)
        lame.check()
        assert re.search(f"reward mean: going on with {one} alone for now: {unused} does not answer", caplog.text)
        for _ in range(4):
            assert lame.score(IMAGES, [RED] * 3).tolist() == EXPECTED

    class Other(Mean):
        revision = "mean 2"

    with serving(Mean()) as (one, _), serving(Other()) as (two, _):
        with pytest.raises(MarbleError, match=r"serves another one than .*mean 2"):
            remote("mean", one, two).check()
        reward = remote("mean", one)
        reward.check()
        reward.urls, reward._servers = [one, two], []
        for _ in range(4):  # the one that is another reward by now is left out
            assert reward.score(IMAGES, [RED] * 3).tolist() == EXPECTED
        reward.urls, reward._servers = [two], []
        with pytest.raises(MarbleError, match='serves revision "mean 2" by now and no longer "mean 1"'):
            reward.score(IMAGES, [RED] * 3)


def test_settings_of_the_server_are_part_of_the_revision(monkeypatch):
    class Set(Mean):
        def __init__(self, *, size: int = 3):
            self.size = size

    monkeypatch.setitem(globals(), "Set", Set)
    (reward,) = load_rewards([RewardUse(reward=f"{__name__}:Set", settings={"size": 4, "batch": 9, "timeout": 5})])
    with serving(reward) as (url, _):
        client = remote("mean", url)
        client.check()
        assert re.fullmatch("mean 1 with settings [0-9a-f]{8}", client.revision)  # no setting itself: it may be a key
        assert client.batch == 9
    five, again = (load_rewards([RewardUse(reward=f"{__name__}:Set", settings={"size": n})])[0] for n in (5, 4))
    assert revision_of(five) != revision_of(reward) == revision_of(again)


def test_a_reward_that_raises_is_missing_with_its_reason(server, caplog):
    table = score_images([remote("raising", server, retries=1)], IMAGES.float() / 255, [RED] * 3, torch.arange(3))
    assert table.missing.tolist() == [3]
    assert f"{server}/score answered 500: ValueError: no such luck" in caplog.text


def test_a_server_that_is_away_when_asked_what_applies_and_back_to_score(caplog):
    images, records = pictures(0, 90, 250, 30, 60), [RED, BLUE, RED, BLUE, RED]
    with serving(Mean()) as (url, _):
        rewards = [remote("mean", url, retries=0)]
        rewards[0].check()
    port = int(url.rpartition(":")[2])
    for back in (True, False):
        judging = Judging(rewards, records, torch.arange(5))
        assert judging.wanted.all()
        time.sleep(0.31)
        with serving(Mean(), port=port) if back else serving(Mean()):
            judging.add(images.float() / 255)
            table = judging.table()
        local = Mean().score(images[::2], [RED] * 3).tolist()
        assert table.scores[::2, 0].tolist() == pytest.approx(local if back else [torch.nan] * 3, abs=0, nan_ok=True)
        assert table.scores[1::2].isnan().all()
        assert table.missing.tolist() == [2 if back else 5]
        reason = "2 of 5 images: it does not apply to their prompts" if back else "5 of 5 images: .* does not answer"
        assert re.search(f"reward mean: no score for {reason}", caplog.text)
        caplog.clear()
        rewards[0]._applies.clear()


def test_a_server_that_comes_back_as_another_is_left_out(caplog):
    class Other(Mean):
        revision = "mean 2"

    with serving(Other()) as (absent, _):
        pass
    with serving(Mean()) as (one, _):
        reward = remote("mean", one, absent, retries=0)
        reward.check()
        assert f"{absent} does not answer" in caplog.text
        caplog.clear()
        time.sleep(0.31)
        with serving(Other(), port=int(absent.rpartition(":")[2])) as (_, app):
            for _ in range(6):
                assert reward.score(IMAGES, [RED] * 3).tolist() == EXPECTED
            assert app.metrics.requests["/score", 200] < 3  # asked last for a while
    assert len(caplog.messages) == 1
    assert 'serves revision "mean 2" by now' in caplog.text
    assert "this server is left out" in caplog.text


LONG = "a b" * 2000


def test_questions_of_what_applies_are_cut_to_what_a_server_takes(monkeypatch):
    records = [Record(str(n), "s", {"text": LONG} if n % 3 else {"long": LONG}) for n in range(2500)]
    with serving(Mean()) as (url, app):
        assert remote("mean", url).applies_to(records) == [bool(n % 3) for n in range(2500)]
        assert app.metrics.requests["/applies", 200] == 5  # 500, 500, 500, 500, 500


def test_each_server_may_have_a_token_of_its_own(monkeypatch):
    other = "another-token-as-long"
    monkeypatch.setenv("MARBLE_TOKEN", TOKEN)
    monkeypatch.setenv("OTHER", other)
    with serving(Mean(), token=TOKEN) as (one, _), serving(Mean(), token=other) as (two, _):
        remote("mean", one).check()
        remote("mean", two, token_variable="OTHER").check()
        with pytest.raises(MarbleError, match=r"401: .* in the environment variable OTHER$"):
            remote("mean", one, token_variable="OTHER").check()
        with pytest.raises(MarbleError, match=r"to be named in settings\.token_variable"):
            remote("mean", one, token_variable="").check()
        with pytest.raises(MarbleError, match=r"settings\.token_variable: the environment variable ABSENT is not set"):
            remote("mean", two, token_variable="ABSENT").check()
