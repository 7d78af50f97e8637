"""A server in a thread of this process, and rewards made to be served."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from contextlib import contextmanager

import torch
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from marble import Reward
from marble.config import RewardUse
from marble.prompts import Record
from marble.rewards import make_reward

RED = Record("red", "s", {"text": "RED"})
BLUE = Record("blue", "s")


class Mean(Reward):
    """Of all values; as awkward as floats get."""

    name = "mean"
    revision = "mean 1"
    about = "mean of all values"
    accuracy_above = 0.1
    batch = 5

    def applies(self, record):
        return "text" in record.targets

    def score(self, images, records):
        scores = images.double().flatten(1).mean(dim=1) / 3
        return torch.where(scores > 0, scores, torch.nan)


class Together(Reward):
    name = "together"
    revision = "together 1"
    groupwise = True

    def score(self, images, records):
        return torch.full((len(images),), float(len(images)))


class Clip(Reward):
    """Light of the last frame less that of the first."""

    name = "clip"
    judges_videos = True

    def score(self, images, records):
        return images[:, -1].double().mean(dim=(1, 2, 3)) - images[:, 0].double().mean(dim=(1, 2, 3))


class Raising(Reward):
    name = "raising"

    def score(self, images, records):
        raise ValueError("no such luck\nsecond line")


class Slow(Reward):
    """Judges only while `go` is set, and remembers how many calls were under way at once."""

    name = "slow"

    def __init__(self, workers=0):
        self.workers, self.go, self.lock = workers, threading.Event(), threading.Lock()
        self.now = self.most = self.calls = 0

    def score(self, images, records):
        with self.lock:
            self.now, self.calls = self.now + 1, self.calls + 1
            self.most = max(self.most, self.now)
        self.go.wait(10)
        time.sleep(0.01)
        with self.lock:
            self.now -= 1
        return torch.zeros(len(images))


@functools.cache
def event_loop():
    """One for all servers, in a thread."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


@contextmanager
def running(asgi, port=0):
    """The URL of a server of `asgi`; uvicorn's connections without its server, which takes long to start and end."""
    config = uvicorn.Config(asgi, lifespan="off", http="h11", ws="none", log_config=None)
    config.load()
    loop, state = event_loop(), ServerState()

    async def start():
        made = functools.partial(H11Protocol, config=config, server_state=state, app_state={})
        return await loop.create_server(made, "127.0.0.1", port)

    async def stop():
        server.close()
        for connection in list(state.connections):
            connection.shutdown()
        if state.tasks:
            await asyncio.wait(state.tasks, timeout=2)
        for connection in list(state.connections):
            connection.transport.abort()

    server = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)


@contextmanager
def serving(*rewards, port=0, **limits):
    """The URL of a marble server of `rewards`, and its app."""
    from marble.serve.app import App
    from marble.serve.desk import Desk
    from marble.serve.door import Limits

    app = App([Desk(reward, f"served-{reward.name}") for reward in rewards], Limits(**limits))
    try:
        with running(app.asgi, port) as url:
            yield url, app
    finally:
        app.close()


def pictures(*values, size=4):
    """`[N, 3, size, size]` uint8: noise around each value."""
    noise = torch.randint(0, 40, (len(values), 3, size, size), generator=torch.Generator().manual_seed(0))
    return (torch.tensor(values)[:, None, None, None] + noise).clamp(0, 255).to(torch.uint8)


TOKEN = "a-token-of-some-length"
IMAGES = pictures(0, 90, 250)
EXPECTED = Mean().score(IMAGES, [RED] * 3).tolist()


def remote(name, *urls, **settings):
    return make_reward(RewardUse(reward=name, url=list(urls), settings=settings))
