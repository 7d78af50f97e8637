import base64
import time

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from marble import MarbleError
from marble.config import RewardUse
from marble.prompts import Record
from marble.rewards import http, load_rewards, make_reward, score_images
from marble.rewards import judge as judge_module
from marble.rewards.judge import Judge, UnifiedReward
from marble.rewards.wire import from_png

from .running import pictures, running

RECORDS = [Record(f"a {colour} {{thing}}", "s") for colour in ("red", "green", "blue")]
IMAGES = pictures(0, 90, 200, size=8)


class Endpoint:
    """Plays an endpoint; `say(question, image, turn)` makes the answer, a response or what the model writes."""

    def __init__(self):
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
        ]
        self.asgi = Starlette(routes=routes)
        self.play(lambda question, image, turn: "Score: 7")

    def play(self, say, token=None):
        self.say, self.token, self.asked, self.now, self.most = say, token, [], 0, 0

    async def models(self, request):
        return self._stranger(request) or JSONResponse({"object": "list", "data": [{"id": "a-judge"}]})

    async def complete(self, request):
        import asyncio

        body = await request.json()
        self.now += 1
        self.most = max(self.most, self.now)
        picture, text = body["messages"][0]["content"]
        image = from_png(base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,")))
        await asyncio.sleep(0.005 + float(image[0, 0, 0]) / 10_000)  # answers come in another order
        self.now -= 1
        self.asked.append((body, text["text"], image))
        if stranger := self._stranger(request):
            return stranger
        said = self.say(text["text"], image, sum(asked[1] == text["text"] for asked in self.asked))
        if not isinstance(said, str):
            return said
        return JSONResponse({"choices": [{"message": {"role": "assistant", "content": said}}]})

    def _stranger(self, request):
        if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
            return JSONResponse({"error": {"message": "no valid key", "type": "auth"}}, 401)
        return None


@pytest.fixture(scope="module")
def endpoint():
    made = Endpoint()
    with running(made.asgi) as url:
        made.url = f"{url}/v1"
        yield made


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(http, "PAUSE", 0.01)


def judge_at(endpoint, **settings):
    return Judge(model="a-judge", url=endpoint.url, **settings)


def test_what_is_asked_and_read(endpoint):
    marks = dict(
        zip(("red", "green", "blue"), ("Score: 7", "I say\n**Score:** 8.5, no more", "Score: 10"), strict=True)
    )
    endpoint.play(lambda question, image, turn: next(said for colour, said in marks.items() if colour in question))
    assert judge_at(endpoint).score(IMAGES, RECORDS).tolist() == [0.7, 0.85, 1.0]
    assert len(endpoint.asked) == 3
    for body, text, image in endpoint.asked:
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("a-judge", 0, 512)
        at = next(i for i, record in enumerate(RECORDS) if record.text in text)
        assert "{prompt}" not in text
        assert torch.equal(image, IMAGES[at])


def test_answers_do_not_depend_on_how_many_are_asked_at_once(endpoint):
    def say(question, image, turn):
        return f"Score: {image.float().mean() / 30:.2f}"

    records, images = [RECORDS[n % 3] for n in range(12)], pictures(*range(0, 240, 20), size=8)
    tables = []
    for workers in (0, 8):
        endpoint.play(say)
        reward = judge_at(endpoint)
        reward.workers = workers
        tables.append(score_images([reward], images.float() / 255, records, torch.arange(12)).scores)
        assert endpoint.most == 1 if workers == 0 else 1 < endpoint.most <= 8
    assert torch.equal(*tables)
    assert len(tables[0].unique()) > 10
    endpoint.play(say)
    assert torch.equal(judge_at(endpoint).score(images, records), tables[0][:, 0])
    assert 1 < endpoint.most <= 8


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("no number at all", 200),
        ("", 200),
        ("Score: ten", 200),
        (None, 200),
        ({"choices": []}, 200),
        ({"choices": [{"message": {}}]}, 200),
        ([], 200),
        ("<html>", 0),
        ({"error": {"message": "too long"}}, 400),
        ({"error": "broken"}, 500),
    ],
)
def test_an_answer_that_cannot_be_read_is_missing_and_never_nought(endpoint, caplog, said, status):
    def say(question, image, turn):
        if "green" not in question:
            return "Score: 5"
        if status == 0:
            return PlainTextResponse(said)
        content = {"choices": [{"message": {"content": said}}]} if said is None or isinstance(said, str) else said
        return JSONResponse(content, status)

    endpoint.play(say)
    scores = judge_at(endpoint, retries=1).score(IMAGES, RECORDS)
    assert scores.isnan().tolist() == [False, True, False]
    assert scores[0] == 0.5
    table = score_images([judge_at(endpoint, retries=1)], IMAGES.float() / 255, RECORDS, torch.arange(3))
    assert table.applies[:, 0].tolist() == [True, False, True]
    assert "no score for 1 of 3 images" in caplog.text


def test_failures_are_asked_again_and_refusals_are_not(endpoint):
    endpoint.play(lambda question, image, turn: "Score: 4" if turn > 2 else JSONResponse({"error": "busy"}, 503))
    assert judge_at(endpoint).score(IMAGES, RECORDS).tolist() == [0.4] * 3
    assert len(endpoint.asked) == 9
    endpoint.play(lambda question, image, turn: JSONResponse({"error": {"message": "too long\nby far"}}, 400))
    with pytest.raises(MarbleError, match=r"/v1/chat/completions answered 400: too long$"):
        judge_at(endpoint).score(IMAGES, RECORDS)
    assert len(endpoint.asked) == 3


def test_the_key(endpoint, monkeypatch):
    endpoint.play(lambda question, image, turn: "Score: 4", token="a-key")
    with pytest.raises(MarbleError, match=r"answered 401: no valid key; settings.key_variable names"):
        judge_at(endpoint).prepare()
    reward = judge_at(endpoint, key_variable="THE_KEY")
    monkeypatch.delenv("THE_KEY", raising=False)
    with pytest.raises(MarbleError, match="the environment variable THE_KEY is not set"):
        reward.check()
    monkeypatch.setenv("THE_KEY", "another")
    with pytest.raises(MarbleError, match="the key in THE_KEY is not right") as caught:
        judge_at(endpoint, key_variable="THE_KEY").score(IMAGES, RECORDS)
    assert "another" not in str(caught.value)
    monkeypatch.setenv("THE_KEY", "a-key")
    reward.check()
    reward.prepare()
    assert reward.score(IMAGES, RECORDS).tolist() == [0.4] * 3


def test_a_key_on_an_open_way_is_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(http, "_warned", set())
    monkeypatch.setenv("THE_KEY", "a-key")
    for url, key in (
        ("http://judges.example/v1", "THE_KEY"),
        ("http://judges.example/v1", "THE_KEY"),
        ("http://other.example/v1", None),
        ("https://third.example/v1", "THE_KEY"),
        ("http://127.0.0.1:1/v1", "THE_KEY"),
    ):
        Judge(model="a-judge", url=url, key_variable=key)._connect()
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("THE_KEY: what it holds and all images travel to judges.example unencrypted")


def test_one_picture_needs_no_threads(endpoint, monkeypatch):
    monkeypatch.setattr(judge_module, "ThreadPoolExecutor", None)
    endpoint.play(lambda question, image, turn: "Score: 4")
    assert judge_at(endpoint).score(IMAGES[:1], RECORDS[:1]).tolist() == [0.4]


def test_an_endpoint_that_is_slow_is_asked_once(endpoint):
    def say(question, image, turn):
        time.sleep(0.3)  # nothing else is to be answered meanwhile
        return "Score: 4"

    endpoint.play(say)
    with pytest.raises(MarbleError, match=r"did not answer in time"):
        judge_at(endpoint, answer_within=0.1).score(IMAGES[:1], RECORDS[:1])
    time.sleep(0.3)
    assert len(endpoint.asked) == 1
    assert judge_at(endpoint).score(IMAGES[:1], RECORDS[:1]).tolist() == [0.4]


def test_an_endpoint_that_is_not_there_or_has_another_model(endpoint, monkeypatch):
    endpoint.play(lambda question, image, turn: "Score: 4")
    with pytest.raises(MarbleError, match=r'has no model "a-juge"\. Did you mean "a-judge"\? It has: a-judge'):
        Judge(model="a-juge", url=endpoint.url).prepare()
    with pytest.raises(MarbleError, match=r"answered 404: .*usually ends with /v1"):
        Judge(model="a-judge", url=endpoint.url.removesuffix("/v1")).prepare()
    absent = Judge(model="a-judge", url="http://127.0.0.1:9/v1")
    absent.check()  # contacts nothing
    with pytest.raises(MarbleError, match=r"127.0.0.1:9/v1 does not answer: ConnectError.*; start an endpoint there"):
        absent.prepare()
    reward = judge_at(endpoint)
    reward.prepare()
    monkeypatch.setattr(endpoint, "token", "by now")
    reward.prepare()  # as evaluations ask for in the middle of a run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "how good is it?"}, r"settings.template: must contain \{prompt\}"),
        ({"pattern": "("}, "settings.pattern: .* is no regular expression"),
        ({"pattern": r"\d+"}, "settings.pattern: must have one group"),
        ({"pattern": r"(\d+)/(\d+)"}, "settings.pattern: must have one group"),
        ({"divide_by": 0}, "settings.divide_by: must be positive, got 0"),
        ({"size": 0}, "settings.size: must be at least 1"),
        ({"square": True}, "settings.square: needs a size"),
        ({"retries": -1}, "settings.retries"),
        ({"max_tokens": 0}, "settings.max_tokens"),
        ({"url": "127.0.0.1:8000"}, "settings.url: must be like"),
        ({"model": ""}, "settings.model: must name"),
        ({"siz": 3}, 'unknown setting "siz"'),
    ],
)
def test_settings(settings, message):
    with pytest.raises(MarbleError, match=message):
        make_reward(RewardUse(reward="judge", settings={"model": "m"} | settings))


def test_a_scale_that_is_no_number():
    with pytest.raises(MarbleError, match=r"settings\.divide_by: must be positive, got nan"):
        Judge(model="m", divide_by=float("nan"))


def test_registered():
    with pytest.raises(MarbleError, match=r"settings.model is required"):
        load_rewards(["judge"])
    (unified,) = load_rewards(["unifiedreward"])
    assert unified.revision.startswith("CodeGoat24/UnifiedReward-7b-v1.5 asked ")
    assert Judge(model="m").revision == Judge(model="m", retries=0).revision != Judge(model="m", size=9).revision
    assert unified.cached


def test_sizes(endpoint):
    wide = torch.randint(0, 256, (1, 3, 20, 40), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    picture = Image.fromarray(wide[0].permute(1, 2, 0).numpy())
    for settings, size in (
        ({}, (40, 20)),
        ({"size": 40}, (40, 20)),
        ({"size": 64}, (40, 20)),  # never made larger
        ({"size": 10}, (10, 5)),
        ({"size": 16, "square": True}, (16, 16)),
        ({"size": 64, "square": True}, (64, 64)),
    ):
        endpoint.play(lambda question, image, turn: "Score: 4")
        judge_at(endpoint, **settings).score(wide, RECORDS[:1])
        expected = picture.resize(size, Image.Resampling.BICUBIC) if size != picture.size else picture
        assert np.array_equal(endpoint.asked[0][2].permute(1, 2, 0).numpy(), np.array(expected))


def test_unified_reward(endpoint):
    marks = {"red": "red (colour): 1\nFinal Score: 4", "green": "Final Score:3.5", "blue": "Final score 3"}
    endpoint.play(lambda question, image, turn: next(said for colour, said in marks.items() if colour in question))
    reward = UnifiedReward(model="a-judge", url=endpoint.url)
    scores = reward.score(IMAGES, RECORDS)
    assert scores[:2].tolist() == [0.8, 0.7]
    assert scores[2].isnan()  # where published code has 0
    body, text, image = endpoint.asked[0]
    assert image.shape == (3, 512, 512)
    assert text.startswith("<image>\nYou are given a text caption and a generated image based on that caption.")
    assert text.endswith("Text Caption: [" + next(r.text for r in RECORDS if r.text in text) + "]")
    assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "text"]


def test_frames_of_a_video_are_asked_about_one_by_one(endpoint):
    endpoint.play(lambda question, image, turn: f"Score: {int(image[0, 0, 0])}")
    clips = torch.tensor([[2, 4, 9], [1, 1, 4]])[:, :, None, None, None].expand(-1, -1, 3, 4, 4) / 255
    table = score_images([judge_at(endpoint)], clips, RECORDS[:2], torch.arange(2))
    assert table.scores[:, 0].tolist() == pytest.approx([0.5, 0.2])
