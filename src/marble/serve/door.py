"""Who may come in, how often, and with how much: checked before a request is looked at."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from marble.rewards.http import is_loopback

log = logging.getLogger("marble")

CLIENTS = 1024
"""Addresses whose rate is remembered."""
READING = 120.0
"""Seconds in which a body must have come."""
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{0,5})?", re.IGNORECASE | re.ASCII)
DRAINING = 5.0
"""Seconds for which the body of a refused request is taken in."""


class Problem(Exception):  # noqa: N818  a status with its reason, whether or not it is an error of ours
    """What a client is told instead of an answer."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        """`retry_after` in seconds."""
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after

    def response(self) -> JSONResponse:
        """As JSON."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"error": self.message}, self.status, headers)


@dataclass(frozen=True)
class Limits:
    """What is asked of who comes in."""

    token: str | None = None
    local: bool = True
    """Listens on loopback: then a Host of another name is a web page's, through DNS rebinding."""
    most_bytes: int = 256 * 2**20
    """Of a body."""
    rate: float | None = None
    """Requests per second and client."""


class Rates:
    """A bucket of tokens for each address: `rate` a second flow in, as many as that (at least one) fit."""

    def __init__(self, rate: float, now: Callable[[], float] = time.monotonic) -> None:
        """All full."""
        self.rate, self.size, self.now = rate, max(1.0, rate), now
        self._buckets: dict[str, tuple[float, float]] = {}  # address → (tokens, when), the longest unseen first

    def wait(self, client: str) -> float:
        """Take one token; seconds until there is one if there is none, else 0."""
        now = self.now()
        tokens, when = self._buckets.pop(client, (self.size, now))
        tokens = min(self.size, tokens + (now - when) * self.rate)
        taken = tokens >= 1
        self._buckets[client] = (tokens - taken, now)
        if len(self._buckets) > CLIENTS:
            self._buckets.pop(next(iter(self._buckets)))
        return 0.0 if taken else (1 - tokens) / self.rate


class Door:
    """ASGI middleware around the app: refuses, counts what is answered, and lets no traceback out."""

    def __init__(self, app: ASGIApp, limits: Limits, count: Callable[[str, int], None]) -> None:
        """`count(path, status)` is called once a request."""
        self.app, self.limits, self.count = app, limits, count
        self.rates = Rates(limits.rate) if limits.rate else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        request, started = Request(scope, receive), False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self.count(scope["path"], message["status"])
            await send(message)

        try:
            self._check(request, scope["path"])
        except Problem as problem:
            await drain(request, self.limits.most_bytes)
            await problem.response()(scope, receive, counted)
            return
        try:
            await self.app(scope, receive, counted)
        except ClientDisconnect:
            self.count(scope["path"], 499)
        except Exception as error:
            log.warning("%r %r failed: %s", scope["method"], scope["path"][:100], type(error).__name__)
            if not started:
                await Problem(500, "the server failed").response()(scope, receive, counted)

    def _check(self, request: Request, path: str) -> None:
        """`path` as it will be routed: a request's URL is made of its Host too, which is the client's to choose."""
        hosts = request.headers.getlist("host")
        found = [_HOST.fullmatch(host) for host in hosts]
        if len(hosts) > 1 or (hosts != [""] and None in found):
            raise Problem(400, "Host: one name or address is needed")
        if self.limits.local and not any(host and is_loopback(host[1]) for host in found):
            raise Problem(403, "Host: this server answers to localhost, 127.0.0.1 and [::1] only")
        if path == "/health":
            return
        if self.rates is not None and (wait := self.rates.wait(request.client.host if request.client else "")):
            raise Problem(429, f"more than {self.rates.rate:g} requests a second", max(1, round(wait)))
        if self.limits.token is not None:
            kind, _, given = request.headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer":
                raise Problem(401, "a token is needed: Authorization: Bearer …")
            if not hmac.compare_digest(given.strip().encode(), self.limits.token.encode()):
                raise Problem(401, "the token is not this server's")
        if request.method == "POST":
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise Problem(415, "Content-Type must be application/json")
            length = request.headers.get("content-length", "0")
            if not length.isdigit() or int(length) > self.limits.most_bytes:
                raise too_large(self.limits.most_bytes)


def too_large(most: int) -> Problem:
    """Says how much is taken."""
    return Problem(413, f"a body may have {most} bytes, {most / 2**20:g} MB")


async def read_body(request: Request, most: int) -> bytearray:
    """The body, counted while it comes: what it says of its length need not be true.

    Raises:
        Problem: it is longer than `most` bytes, or did not come in time.
    """
    try:
        body, taken = await asyncio.wait_for(_take(request, most, 2 * most), READING)
    except asyncio.TimeoutError as error:
        raise Problem(408, f"the body did not come within {READING:g} s") from error
    if taken > most:
        raise too_large(most)
    return body


async def drain(request: Request, most: int) -> None:
    """Take in what a refused client still sends, within reason: it would see a broken connection and no answer."""
    try:
        await asyncio.wait_for(_take(request, 0, most), DRAINING)
    except (asyncio.TimeoutError, ClientDisconnect):
        log.debug("a refused body was cut off")


async def _take(request: Request, keep: int, most: int) -> tuple[bytearray, int]:
    """A body of up to `keep` bytes, or nothing of a longer one; and how much came, of which `most` is waited for."""
    body, taken, more = bytearray(), 0, True
    while more and taken <= most:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk, more = message.get("body", b""), message.get("more_body", False)
        taken += len(chunk)
        if taken <= keep:
            body += chunk
        else:
            body.clear()
    return body, taken
