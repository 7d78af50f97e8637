"""Servers that are slow, busy, dead or wrong: which answers count, and how long one is waited for."""

import logging
import socket
import threading
import time

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, RedirectResponse
from starlette.routing import Route

from marble import MarbleError, Reward
from marble.rewards import http
from marble.rewards import remote as remote_module

from .running import (
    EXPECTED,
    IMAGES,
    RED,
    TOKEN,
    Mean,
    Slow,
    remote,
    running,
    serving,
)

pytestmark = pytest.mark.usefixtures("quick")


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
    with pytest.raises(MarbleError, match=r"answered 503|did not answer in time"):
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
        with pytest.raises(MarbleError, match=r"did not answer in time, and may still be at work"):
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


def test_a_server_that_hangs_leaves_the_others_their_time():
    """It once used up all of it, and the healthy one was asked with none left and sent to rest."""
    with socket.create_server(("127.0.0.1", 0)) as silent, serving(Mean()) as (server, _):
        hanging = f"http://127.0.0.1:{silent.getsockname()[1]}"
        reward = remote("mean", hanging, server, timeout=2)
        reward._learn(remote_module.Served("mean", True, False, False, False, 64, "mean 1", ""))
        for _ in range(2):  # in whichever turn it is asked
            assert reward.score(IMAGES, [RED] * 3).tolist() == EXPECTED
