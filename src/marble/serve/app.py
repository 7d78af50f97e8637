"""The endpoints."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from marble.errors import nearest
from marble.rewards import Reward, wire
from marble.serve.desk import APPLYING, WAITING, Desk, FullError, JudgingError, by_name
from marble.serve.door import Door, Limits, Problem, read_body
from marble.serve.lane import Call, Lane
from marble.serve.metrics import Metrics

UNPACKED = 4
"""Bytes of pictures, unpacked, for each byte that a body may have: flat pictures pack well, bombs better."""
Made = TypeVar("Made")


class App:
    """Answers for some rewards. `asgi` is what a server runs."""

    def __init__(self, desks: Sequence[Desk], limits: Limits) -> None:
        """For rewards that are prepared."""
        self.desks, self.limits, self.metrics = desks, limits, Metrics()
        self.names, self._by_name = [desk.reward.name for desk in desks], by_name(desks)
        self._bodies = 0
        # apart from the judging, or a body that is unpacked would wait for a reward
        self._aside = Lane("unpacking", 2)
        self.paths = {"/health", "/rewards", "/applies", "/score", "/metrics"}
        routes = [
            Route("/health", self.health, methods=["GET"]),
            Route("/rewards", self.rewards, methods=["GET"]),
            Route("/metrics", self.show_metrics, methods=["GET"]),
            Route("/applies", self.applies, methods=["POST"]),
            Route("/score", self.score, methods=["POST"]),
        ]
        handlers: Any = {Problem: _told, HTTPException: _not_found, Exception: _failed}
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.redirect_slashes = False
        self.asgi: ASGIApp = Door(app, limits, self._count)

    async def health(self, request: Request) -> Response:
        """That it runs."""
        return JSONResponse({"status": "ok", "rewards": self.names})

    async def rewards(self, request: Request) -> Response:
        """What is served."""
        return JSONResponse({"marble": version("marble-diffusion"), "rewards": [desk.facts() for desk in self.desks]})

    async def show_metrics(self, request: Request) -> Response:
        """How it goes."""
        return PlainTextResponse(self.metrics.text(self.desks), media_type="text/plain; version=0.0.4")

    async def applies(self, request: Request) -> Response:
        """Which prompts a reward can judge."""
        with self._room():
            message = await self._apart(wire.unpack, await self._body(request, wire.MOST_JSON))
            desk, records = self._desk(wire.unpack_name, message), _fitting(wire.unpack_records, message)
            del message
            flags = await self._outcome(request, desk.ask(records), APPLYING)
        return JSONResponse({"applies": flags})

    async def score(self, request: Request) -> Response:
        """What a reward says of pictures, all of a request in one call; null where it does not apply."""
        with self._room():
            body = await self._body(request, self.limits.most_bytes)
            digest = hashlib.sha256(body).hexdigest()
            asked = await self._apart(wire.unpack_request, body)
            del body
            desk = self._desk(lambda asked: asked.reward, asked)
            desk.check_room()
            images = await self._apart(wire.decode_images, asked, UNPACKED * self.limits.most_bytes)
            call = desk.submit(images, asked.records)
            name = asked.reward
            del images, asked
            scores = await self._outcome(request, call, float(getattr(desk.reward, "timeout", Reward.timeout)))
        return JSONResponse(
            {"reward": name, "revision": desk.revision, "digest": digest, "scores": wire.pack_scores(scores)}
        )

    @contextmanager
    def _room(self) -> Iterator[None]:
        """For one more body."""
        if self._bodies >= sum(WAITING + desk.workers for desk in self.desks):
            raise Problem(503, "too many requests at once", 1)
        self._bodies += 1
        try:
            yield
        except FullError as error:
            raise Problem(503, "too many requests wait for this reward", 1) from error
        except JudgingError as error:
            raise Problem(500, str(error)) from error
        finally:
            self._bodies -= 1

    def close(self) -> None:
        """Let all threads end, within a second; those that hang are left behind."""
        until = time.monotonic() + 1.0
        self._aside.close(0.0)
        for desk in self.desks:
            desk.close(max(0.0, until - time.monotonic()))

    def _count(self, path: str, status: int) -> None:
        self.metrics.requests[path if path in self.paths else "other", status] += 1

    async def _body(self, request: Request, most: int) -> bytearray:
        return await read_body(request, min(most, self.limits.most_bytes))

    async def _apart(self, work: Callable[..., Made], *arguments: Any) -> Made:
        """Done in a thread, so that others are answered meanwhile."""
        return await self._aside.do(functools.partial(_fitting, work, *arguments))

    def _desk(self, name_of: Callable[[Any], str], message: Any) -> Desk:
        name = _fitting(name_of, message)
        if name not in self._by_name:
            raise Problem(
                404, f"no such reward is served.{nearest(name, self.names)} There are: {', '.join(self.names)}"
            )
        return self._by_name[name]

    async def _outcome(self, request: Request, call: Call[Made], seconds: float) -> Made:
        """Wait for what a reward says, as long as it may take and as the client waits."""
        gone = asyncio.ensure_future(_gone(request))
        first: set[asyncio.Future[Any]] = {call.done, gone}
        try:
            await asyncio.wait(first, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            call.abandoned = not call.done.done()
        if call.abandoned:
            call.done.cancel()
            if gone.done() and not gone.cancelled():
                raise Problem(499, "the client has gone")
            raise Problem(504, f"the reward did not answer within {seconds:g} s")
        return call.done.result()


async def _gone(request: Request) -> None:
    """Until the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _fitting(work: Callable[..., Made], *arguments: Any) -> Made:
    """What `work` makes of what a client sent; what does not fit is the client's problem."""
    try:
        return work(*arguments)
    except wire.WireError as error:
        raise Problem(error.status, str(error)) from error


async def _told(request: Request, problem: Problem) -> Response:
    return problem.response()


async def _not_found(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    return Problem(500, "the server failed").response()
