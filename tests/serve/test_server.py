"""The server's answers, over real connections."""

import asyncio
import hashlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest
import torch
from starlette.datastructures import URL
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from marble.prompts import Record
from marble.rewards import wire
from marble.serve import app as app_module
from marble.serve import desk as desk_module
from marble.serve.door import Door, Limits, Rates

from ..rewards.running import BLUE, RED, Clip, Mean, Raising, Slow, Together, pictures, serving

TOKEN = "a-token-of-some-length"
JSON = {"Content-Type": "application/json"}
IMAGES = pictures(0, 90, 250)
BODY = wire.pack_request("mean", IMAGES, [RED] * 3)


@pytest.fixture(scope="module")
def served():
    with (
        serving(Mean(), Together(), Clip(), Raising(), most_bytes=2**16) as (url, _),
        httpx.Client(base_url=url) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def guarded():
    with serving(Mean(), token=TOKEN) as (url, _), httpx.Client(base_url=url) as client:
        yield client


def post(client, path, body, **headers):
    content = body if isinstance(body, bytes) else json.dumps(body)
    return client.post(path, content=content, headers=JSON | headers)


def request(**changes):
    return json.loads(BODY) | changes


def test_health_and_rewards(served):
    health = served.get("/health")
    assert health.json() == {"status": "ok", "rewards": ["mean", "together", "clip", "raising"]}
    assert not [name for name in health.headers if name.startswith("access-control")]
    rows = {row["name"]: row for row in served.get("/rewards").json()["rewards"]}
    assert rows["mean"] == {
        "name": "mean",
        "served_as": "served-mean",
        "groupwise": False,
        "judges_videos": False,
        "cached": False,
        "batch": 5,
        "revision": "mean 1",
        "about": "mean of all values",
        "needs_prompt": True,
        "accuracy_above": 0.1,
    }
    assert rows["together"]["groupwise"]
    assert rows["clip"]["judges_videos"]


def test_scores(served):
    answer = post(served, "/score", BODY)
    assert answer.status_code == 200
    said = answer.json()
    assert said["digest"] == hashlib.sha256(BODY).hexdigest()
    assert (said["reward"], said["revision"]) == ("mean", "mean 1")
    assert said["scores"] == Mean().score(IMAGES, [RED] * 3).tolist()
    assert said["scores"][0] > 0
    black = wire.pack_request("served-mean", 0 * IMAGES[:2], [RED] * 2)  # by the name it was asked for by
    assert post(served, "/score", black).json()["scores"] == [None, None]
    videos = torch.stack([pictures(0, 90), pictures(200, 100)])
    expected = Clip().score(videos, [RED, BLUE]).tolist()
    assert post(served, "/score", wire.pack_request("clip", videos, [RED, BLUE])).json()["scores"] == expected


def test_what_applies(served):
    body = {"reward": "mean", "records": wire.pack_records([RED, BLUE, RED])}
    assert post(served, "/applies", body).json() == {"applies": [True, False, True]}
    assert post(served, "/applies", body | {"reward": "together"}).json() == {"applies": [True] * 3}
    with serving(Mean()) as (url, _), httpx.Client(base_url=url) as client:
        assert post(client, "/applies", body | {"records": body["records"] * 4000}).status_code == 413
        long = body | {"records": [{"text": "a b" * 10}] * 9000, "more": "c d" * 1_300_000}
        assert len(json.dumps(long)) < 5 * 2**20
        for path, message in (("/applies", "a body may have 4194304 bytes"), ("/score", "at most 4194304 bytes are")):
            answer = post(client, path, long)
            assert (answer.status_code, message in answer.text) == (413, True)


def test_prompts_to_which_a_reward_does_not_apply_get_no_score(served):
    body = wire.pack_request("mean", IMAGES, [RED, BLUE, RED])
    first, second, third = post(served, "/score", body).json()["scores"]
    assert (first, second, third) == (*Mean().score(IMAGES[:1], [RED]), None, *Mean().score(IMAGES[2:], [RED]))
    assert post(served, "/score", wire.pack_request("mean", IMAGES, [BLUE] * 3)).json()["scores"] == [None] * 3


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/score", b"{", 400, "no JSON"),
        ("/score", b"[" * 60_000, 400, "no JSON"),
        ("/score", [1], 400, "no JSON object"),
        ("/score", {}, 422, "reward: "),
        ("/score", request(reward="men"), 404, 'Did you mean "mean"'),
        ("/score", request(records=[]), 422, "as many as records"),
        ("/score", request(records=[{"text": 3}] * 3), 422, "records.0: "),
        ("/score", request(records=None), 422, "records: "),
        ("/score", request(images=request()["images"][:2]), 422, "as many as records are needed, 3, got 2"),
        ("/score", request(images=["~"] * 3), 400, "base64"),
        ("/score", request(images=["AAAA"] * 3), 400, "no PNG"),
        ("/score", request(images=[], records=[]), 422, "at least one"),
        ("/score", request(images=[3] * 3), 422, "base64 PNG"),
        ("/score", request(reward="raising"), 500, "ValueError: no such luck"),
        ("/applies", {"reward": "mean"}, 422, "records: "),
        ("/applies", {"reward": "other", "records": []}, 404, "no such reward"),
        ("/score/", BODY, 404, "Not Found"),
        ("/rewards", BODY, 405, "Method Not Allowed"),
    ],
)
def test_what_is_refused(served, path, body, status, message):
    answer = post(served, path, body)
    assert (answer.status_code, list(answer.json())) == (status, ["error"])
    said = answer.json()["error"]
    assert message in said
    assert "\n" not in said
    assert "Traceback" not in said
    assert post(served, "/score", BODY).status_code == 200  # it lives


def test_strangers(served, guarded):
    for host in ("evil.example", "evil.example:8420", "127.0.0.1.evil.example", "10.0.0.1", "[::2]", ""):
        assert served.get("/health", headers={"Host": host}).status_code == 403
    for host in ("localhost", "localhost:1", "[::1]:8420", "127.0.0.2"):
        assert served.get("/health", headers={"Host": host}).status_code == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        assert post(served, "/score", BODY, **{"Content-Type": kind}).status_code == 415
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    preflight = served.options("/score", headers=asked)
    assert preflight.status_code == 405
    assert not [name for name in preflight.headers if name.startswith("access-control")]
    assert guarded.get("/health").status_code == 200
    for path in ("/rewards", "/metrics", "/nothing"):
        assert guarded.get(path).status_code == 401
    for given in ("", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer", f"Bearer {TOKEN[:-1]}"):
        answer = post(guarded, "/score", BODY, Authorization=given)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert TOKEN not in answer.text
    assert post(guarded, "/score", BODY, Authorization=f"Bearer {TOKEN}").status_code == 200


ODD = [b"a/health?", b"a/health#", b"localhost/health?x=", b"me@localhost", b"localhost:80/x", b"[::1]x", b"[", b"a b"]


def through_the_door(path, hosts, **limits):
    """The status of a POST without a token, straight into the middleware: no server has looked at its headers."""
    door = Door(PlainTextResponse("in"), Limits(**limits), lambda *_: None)
    headers = [(b"host", host) for host in hosts] + [(b"content-type", b"text/plain")]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b"", "scheme": "http"}
    scope |= {"server": ("127.0.0.1", 8420), "client": ("10.0.0.9", 1), "root_path": "", "http_version": "1.1"}
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(door(scope, receive, send))
    return sent[0]["status"]


@pytest.mark.parametrize("hosts", [[host] for host in ODD] + [[b"localhost", b"localhost"], [b""], [], [b"localhost"]])
def test_no_host_is_a_way_around_the_token(hosts, monkeypatch):
    misled = property(lambda request: URL("http://x/health"))  # as versions of starlette read it from some of these
    monkeypatch.setattr(Request, "url", misled)
    good = hosts in ([b"localhost"],)
    for path in ("/score", "/applies", "/metrics", "/rewards", "//health", "/health/", "/HEALTH"):
        bad = hosts in [[host] for host in ODD] or len(hosts) > 1
        assert through_the_door(path, hosts, token=TOKEN, local=False) == (400 if bad else 401)
        assert through_the_door(path, hosts, token=TOKEN) == (400 if bad else 401 if good else 403)
        assert through_the_door(path, hosts) == (400 if bad else 415 if good else 403)
    assert through_the_door("/health", [b"my_box.local:8420"], token=TOKEN, local=False) == 200


def test_bodies_are_counted_while_they_come(served):
    def endless():
        for _ in range(12):
            yield b"x" * 2**13

    for content in (b"x" * (2**16 + 1), endless()):
        answer = served.post("/score", content=content, headers=JSON)
        assert answer.status_code == 413
        assert "65536 bytes" in answer.json()["error"]
    flat = wire.pack_request("mean", torch.zeros(2, 3, 300, 300, dtype=torch.uint8), [RED] * 2)  # 540 kB unpacked
    assert len(flat) < 2**14
    assert post(served, "/score", flat).status_code == 413
    with socket.create_connection((served.base_url.host, served.base_url.port)) as raw:  # says less than it sends
        raw.sendall(b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        raw.sendall(b"Content-Length: -5\r\n\r\n" + b"x" * 100)
        assert b" 400 " in raw.recv(1000)
    assert post(served, "/score", BODY).status_code == 200


def test_a_client_that_asks_too_often():
    with serving(Mean(), rate=2.0) as (url, _), httpx.Client(base_url=url) as client:
        answers = [client.get("/rewards") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 429, 429]
        assert answers[-1].headers["Retry-After"] == "1"
        assert client.get("/health").status_code == 200


def test_the_bucket():
    now = 100.0
    rates = Rates(0.5, lambda: now)
    assert rates.wait("a") == 0.0
    assert rates.wait("a") == 2.0
    assert rates.wait("b") == 0.0
    now = 101.0
    assert rates.wait("a") == 1.0
    now = 102.0
    assert rates.wait("a") == 0.0
    for other in range(3000):
        rates.wait(str(other))
    assert len(rates._buckets) == 1024


def wait_until(true):
    deadline = time.monotonic() + 5
    while not true() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert true()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_reward_judges_in_its_own_threads(workers):
    slow = Slow(workers)
    body = wire.pack_request("slow", IMAGES, [RED] * 3)
    with serving(slow) as (url, app), httpx.Client(base_url=url) as client, ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(post, client, "/score", body) for _ in range(6)]
        wait_until(lambda: slow.now == max(1, workers) and app.desks[0].length == 6 - max(1, workers))
        assert f'marble_queue_length{{reward="slow"}} {6 - max(1, workers)}' in client.get("/metrics").text
        applies = {"reward": "slow", "records": wire.pack_records([RED])}
        assert post(client, "/applies", applies).json() == {"applies": [True]}  # waits for no judging
        slow.go.set()
        assert [answer.result().status_code for answer in answers] == [200] * 6
    assert slow.most == max(1, workers)


def test_a_full_queue_a_client_that_goes_and_an_end(monkeypatch):
    monkeypatch.setattr(desk_module, "WAITING", 2)
    slow = Slow()
    body = wire.pack_request("slow", IMAGES, [RED] * 3)
    with serving(slow) as (url, app), httpx.Client(base_url=url, timeout=10) as client:
        with ThreadPoolExecutor(3) as pool:
            stays = [pool.submit(post, client, "/score", body) for _ in range(2)]
            wait_until(lambda: slow.now == 1 and app.desks[0].length == 1)
            with httpx.Client(base_url=url, timeout=0.2) as hasty, pytest.raises(httpx.ReadTimeout):
                post(hasty, "/score", body)
            assert app.desks[0].length == 2
            full = post(client, "/score", body)
            assert (full.status_code, full.headers["Retry-After"]) == (503, "1")
            slow.go.set()
            assert [answer.result().status_code for answer in stays] == [200] * 2
        wait_until(lambda: app.desks[0].length == 0)
        text = client.get("/metrics").text
    assert slow.calls == 2  # nothing was judged for the client that had gone
    for line in (
        'marble_requests_total{endpoint="/score",status="200"} 2',
        'marble_requests_total{endpoint="/score",status="499"} 1',
        'marble_requests_total{endpoint="/score",status="503"} 1',
        'marble_images_total{reward="slow"} 6',
    ):
        assert line in text.splitlines()
    seconds, memory = (float(text.split(name)[-1].split()[0]) for name in ('seconds_total{reward="slow"}', "bytes"))
    assert seconds > 0.2
    assert memory > 10**7


def test_a_reward_that_hangs():
    slow = Slow()
    slow.timeout = 0.1
    with serving(slow, Mean()) as (url, _), httpx.Client(base_url=url) as client:
        answer = post(client, "/score", wire.pack_request("slow", IMAGES, [RED] * 3))
        assert (answer.status_code, answer.json()["error"]) == (504, "the reward did not answer within 0.1 s")
        assert post(client, "/score", BODY).status_code == 200
        slow.go.set()


def test_a_reward_that_ends_its_thread(caplog):
    class Leaving(Mean):
        name = "leaving"

        def score(self, images, records):
            raise SystemExit(f"with {threading.current_thread().name}")

    class Unsure(Mean):
        name = "unsure"

        def applies(self, record):
            raise KeyError("x")

    with serving(Leaving(), Unsure()) as (url, _), httpx.Client(base_url=url) as client:
        for _ in range(2):
            answer = post(client, "/score", wire.pack_request("leaving", IMAGES, [RED] * 3))
            assert answer.json() == {"error": "SystemExit: with reward leaving"}
        unsure = {"reward": "unsure", "records": wire.pack_records([RED])}
        for path, body in (("/applies", unsure), ("/score", wire.pack_request("unsure", IMAGES[:1], [RED]))):
            answer = post(client, path, body)
            assert answer.status_code == 500
            assert "KeyError: 'x'" in answer.json()["error"]
    assert caplog.messages == ["reward leaving: SystemExit"] * 2 + ["reward unsure: MarbleError"] * 2


def test_what_a_reward_says_of_a_prompt_is_not_logged(caplog):
    class Telling(Mean):
        name = "telling"

        def score(self, images, records):
            raise ValueError(f"cannot parse {records[0].text}")

    secret = Record("my secret prompt", "s", {"text": "A"})
    with serving(Telling()) as (url, _), httpx.Client(base_url=url) as client:
        answer = post(client, "/score", wire.pack_request("telling", IMAGES[:1], [secret]))
        assert answer.json() == {"error": "ValueError: cannot parse my secret prompt"}
    assert caplog.messages == ["reward telling: ValueError"]


def test_a_reward_that_hangs_when_asked_what_applies_stops_no_other(monkeypatch):
    monkeypatch.setattr(app_module, "APPLYING", 0.2)
    go = threading.Event()

    class Pondering(Mean):
        name = "pondering"

        def applies(self, record):
            return go.wait(10)

    body = {"records": wire.pack_records([RED])}
    with serving(Pondering(), Mean()) as (url, _), httpx.Client(base_url=url) as client, ThreadPoolExecutor(3) as pool:
        stuck = [pool.submit(post, client, "/applies", body | {"reward": "pondering"}) for _ in range(3)]
        time.sleep(0.05)
        began = time.perf_counter()
        assert post(client, "/applies", body | {"reward": "mean"}).json() == {"applies": [True]}
        assert post(client, "/score", BODY).status_code == 200
        assert time.perf_counter() - began < 0.15
        assert [answer.result().status_code for answer in stuck] == [504] * 3
        go.set()
        assert post(client, "/applies", body | {"reward": "pondering"}).json() == {"applies": [True]}


def test_questions_of_what_applies_count_among_the_bodies_under_way(monkeypatch):
    monkeypatch.setattr(app_module, "WAITING", 2)
    head = b"POST /applies HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    with serving(Mean()) as (url, app), httpx.Client(base_url=url) as client:
        with ExitStack() as stack:
            address = client.base_url.host, client.base_url.port
            for _ in range(3):  # two in waiting, and one for the reward's thread
                stack.enter_context(socket.create_connection(address)).sendall(head)
            wait_until(lambda: app._bodies == 3)
            full = post(client, "/score", BODY)
            assert (full.status_code, full.headers["Retry-After"]) == (503, "1")
        wait_until(lambda: app._bodies == 0)
        assert post(client, "/score", BODY).status_code == 200
