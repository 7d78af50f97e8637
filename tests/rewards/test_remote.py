import json
import logging
import re
import socket
import threading
import time

import pytest
import torch
from starlette.applications import Starlette
from starlette.responses import JSONResponse, RedirectResponse
from starlette.routing import Route

from marble import MarbleError, Reward
from marble.config import RewardUse
from marble.prompts import Record
from marble.rewards import http, load_rewards, make_reward, score_images
from marble.rewards import remote as remote_module
from marble.rewards.judging import Judging
from marble.serve.desk import revision_of

from .running import BLUE, RED, Clip, Mean, Raising, Slow, Together, pictures, running, serving

TOKEN = "a-token-of-some-length"
IMAGES = pictures(0, 90, 250)
EXPECTED = Mean().score(IMAGES, [RED] * 3).tolist()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(http, "PAUSE", 0.01)
    monkeypatch.setattr(http, "REST", 0.3)
    monkeypatch.delenv("MARBLE_TOKEN", raising=False)


def remote(name, *urls, **settings):
    return make_reward(RewardUse(reward=name, url=list(urls), settings=settings))


@pytest.fixture(scope="module")
def server():
    with serving(Mean(), Together(), Clip(), Raising()) as (url, _):
        yield url


def test_names_and_settings(server):
    by_url = make_reward(RewardUse(reward=f"{server}/mean"))
    assert (by_url.name, by_url.urls, by_url.workers) == ("mean", [server], 4)
    by_url.check()
    assert (by_url.revision, by_url.batch, by_url.about) == ("mean 1", 5, "mean of all values")
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


@pytest.fixture
def unused():
    """A URL at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


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


# ---- servers that misbehave -----------------------------------------------------------------------------


class Playing:
    """A server whose answers are given: functions of the body, one a request, the last for ever."""

    def __init__(self):
        self.play()
        app = Starlette(routes=[Route("/rewards", self.rewards), Route("/score", self.score, methods=["POST"])])
        self.asgi = app

    def play(self, *answers):
        self.answers, self.asked, self.headers = list(answers), [], []

    async def rewards(self, request):
        row = {"name": "mean", "served_as": "mean", "groupwise": False, "judges_videos": False, "cached": False}
        return JSONResponse({"rewards": [row | {"batch": 64, "revision": "mean 1", "about": ""}]})

    async def score(self, request):
        import hashlib

        body = await request.body()
        self.headers.append(request.headers)
        self.asked.append(time.monotonic())
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        good = {
            "reward": "mean",
            "revision": "mean 1",
            "digest": hashlib.sha256(body).hexdigest(),
            "scores": [1, None, 2],
        }
        return answer(good)


@pytest.fixture(scope="module")
def playing():
    play = Playing()
    with running(play.asgi) as play.url:
        yield play


def well(good):
    return JSONResponse(good)


def status(code, **headers):
    return lambda good: JSONResponse({"error": "because"}, code, headers)


def but(**changes):
    return lambda good: JSONResponse(good | changes)


@pytest.mark.parametrize(
    ("answer", "message", "times"),
    [
        (but(digest="0"), "answered another request", 1),
        (but(reward="other"), "answered another request", 1),
        (but(revision="mean 2"), "by now and no longer", 1),
        (but(scores=[1.0, 2.0]), "scores: 3 are needed, got 2", 1),
        (but(scores=[1.0, 2.0, "3"]), "each is a number or null", 1),
        (but(scores=None), "scores: 3 are needed", 1),
        (lambda good: JSONResponse([good]), "answered with no JSON", 3),
        (status(400), "answered 400: because", 1),
        (status(401), "answered 401: because; the server wants its token", 1),
        (status(413), "--max-megabytes", 1),
        (status(500), "answered 500: because", 3),
        (status(503), "answered 503: because", 3),
        (status(429), "answered 429: because", 3),
        (lambda good: RedirectResponse("http://evil.example/score"), "a redirect, which is not followed", 1),
    ],
)
def test_answers_that_do_not_count(playing, answer, message, times):
    playing.play(answer)
    with pytest.raises(MarbleError, match=message):
        remote("mean", playing.url, retries=2).score(IMAGES, [RED] * 3)
    assert len(playing.asked) == times


def test_tries_again_and_waits_as_long_as_it_is_told(playing, monkeypatch):
    monkeypatch.setenv("MARBLE_TOKEN", TOKEN)
    playing.play(status(500), status(503, **{"Retry-After": "0.2"}), well)
    scores = remote("mean", playing.url).score(IMAGES, [RED] * 3)
    assert scores.tolist()[::2] == [1.0, 2.0]
    assert scores[1].isnan()
    first, second, third = playing.asked
    assert second - first < 0.15
    assert 0.2 <= third - second < 1
    assert {headers["authorization"] for headers in playing.headers} == {f"Bearer {TOKEN}"}


def test_a_busy_server_is_asked_until_it_has_time(playing):
    one, other = (status(code, **{"Retry-After": "0"}) for code in (503, 429))
    playing.play(one, other, one, other, one, status(500), one, well)
    assert remote("mean", playing.url, retries=1).score(IMAGES, [RED] * 3).tolist()[0] == 1.0
    assert len(playing.asked) == 8
    assert playing.asked[5] - playing.asked[4] > 0.08  # 0.01 s · 2^4 · (0.5 to 1.5)
    playing.play(one)
    began = time.perf_counter()
    with pytest.raises(MarbleError, match=r"answered 503|did not answer within"):
        remote("mean", playing.url, timeout=0.6).score(IMAGES, [RED] * 3)
    assert 0.2 < time.perf_counter() - began < 0.6


def test_one_server_is_busy_and_one_dead(playing, unused):
    playing.play(*[status(503, **{"Retry-After": "0"})] * 3, well)
    reward = remote("mean", unused, playing.url, retries=0)
    assert reward.score(IMAGES, [RED] * 3).tolist()[0] == 1.0


def test_pauses_are_bounded_by_the_time_there_is(playing):
    playing.play(status(503, **{"Retry-After": "20"}))
    began = time.perf_counter()
    with pytest.raises(MarbleError, match="503"):
        remote("mean", playing.url, timeout=2).score(IMAGES, [RED] * 3)
    assert time.perf_counter() - began < 2
    assert len(playing.asked) == 1


def test_a_server_that_hangs_is_left():
    stop = threading.Event()

    class Hanging(Mean):
        def score(self, images, records):
            stop.wait(10)
            return super().score(images, records)

    with serving(Hanging()) as (hanging, _), serving(Mean()) as (works, _):
        reward = remote("mean", hanging, works, answer_within=0.2)
        reward.check()
        for _ in range(3):
            assert reward.score(IMAGES, [RED] * 3).tolist() == EXPECTED
        stop.set()


def test_a_portion_is_never_sent_again_to_a_server_that_may_still_judge_it(playing):
    slow = Slow(workers=4)
    with serving(slow) as (url, _):
        reward = remote("slow", url, answer_within=0.1)
        reward.check()
        with pytest.raises(MarbleError, match=r"did not answer within 0\.1 s, and may still be at work"):
            reward.score(IMAGES, [RED] * 3)
        slow.go.set()
        time.sleep(0.1)
        assert slow.calls == 1
    playing.play(status(504))
    with pytest.raises(MarbleError, match="504"):
        remote("mean", playing.url).score(IMAGES, [RED] * 3)
    assert len(playing.asked) == 1


def test_one_answer_may_take_as_long_as_the_reward(playing, monkeypatch):
    seen = []
    send = http.Server.send

    def spy(self, method, path, content, seconds, wait):
        seen.append(seconds)
        return send(self, method, path, content, seconds, wait)

    monkeypatch.setattr(http.Server, "send", spy)
    playing.play(well)
    remote("mean", playing.url, timeout=1000).score(IMAGES, [RED] * 3)
    assert seen == pytest.approx([30, 900], abs=1)


def test_a_lost_connection_is_tried_again():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        reward = remote("mean", f"http://127.0.0.1:{listening.getsockname()[1]}", retries=2)
        reward._learn(remote_module.Served("mean", True, False, False, False, 64, "mean 1", ""))
        taken = []

        def hang_up():
            for _ in range(3):
                connection, _ = listening.accept()
                with connection:
                    taken.append(connection.recv(100)[:11])

        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(MarbleError, match="does not answer"):
            reward.score(IMAGES, [RED] * 3)
        thread.join(5)
    assert taken == [b"POST /score"] * 3


def test_an_open_way_is_warned_of_once(caplog, monkeypatch):
    monkeypatch.setattr(http, "_warned", set())
    with caplog.at_level(logging.WARNING):
        for url, token in (
            ("http://judges.example:1", TOKEN),
            ("http://judges.example:2", TOKEN),
            ("https://more.example", TOKEN),
            ("http://third.example", None),
            ("http://127.0.0.1:3", TOKEN),
        ):
            http.warn_if_open(url, token, "MARBLE_TOKEN")
    assert len(caplog.messages) == 1
    assert "unencrypted" in caplog.text
    assert TOKEN not in caplog.text
    caplog.clear()
    monkeypatch.setenv("OTHER", TOKEN)
    remote("mean", "http://fourth.example:1", "http://127.0.0.1:1", token_variable="OTHER")._connect()
    assert [message.split(" ")[0] for message in caplog.messages] == ["OTHER:"]


def test_proxies_are_for_other_machines(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    remote("mean", server).check()


def test_a_reward_is_a_reward(server):
    assert isinstance(remote("mean", server), Reward)
    assert json.dumps(remote_module.server_url(server, "my.module:f ü")).startswith(f'"{server}/my.module:f%20%C3')
