"""Rewards on servers started by `marble serve`: the same portions as here, the same scores bit for bit."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

import httpx
from torch import Tensor

from marble.errors import MarbleError, nearest
from marble.prompts import Record
from marble.registry import is_url
from marble.rewards import wire
from marble.rewards.base import Reward
from marble.rewards.http import RefusedError, Server, UnansweredError, ask, check_url, is_loopback

log = logging.getLogger("marble")

TOKEN = "MARBLE_TOKEN"
"""Environment variable: what lets this process in, sent as a bearer token."""
PIECE = 1000
"""Prompts in one question of what applies."""
_ADVICE = {
    401: f"; the server wants its token in the environment variable {TOKEN}",
    413: "; give the server a larger --max-megabytes, or the reward a smaller settings.batch (here and where it is "
    "judged locally: the last bits depend on it)",
}
_warned: set[str] = set()


@dataclass(frozen=True)
class Served:
    """What a server says of one of its rewards."""

    groupwise: bool
    judges_videos: bool
    cached: bool
    batch: int
    revision: str
    about: str


class Remote(Reward):
    """A reward that one or several servers judge.

    What decides how images are cut into portions (`groupwise`, `batch`) comes from the server, so it must have been
    asked before: `check` does, or else the first question of what applies. A batch in the settings is kept.
    """

    name = "remote"
    about = "a reward on a server started by marble serve"
    workers = 4  # connections, each with a portion under way

    def __init__(self, reward: str, url: list[str], *, retries: int = 3, answer_within: float = 120.0) -> None:
        """As a config names it.

        Args:
            reward: `http://host:8420/NAME`, or NAME with `url`.
            url: `http://host:8420`, one or several servers of the same reward.
            retries: how often a portion that no server answered is asked for again, after growing pauses.
            answer_within: seconds for one answer.

        Raises:
            MarbleError: the URLs are none, or a setting is out of range.
        """
        if is_url(reward):
            if url:
                raise MarbleError(f'reward "{reward}": is a URL already; give its name as reward, or leave url out')
            base, _, name = reward.rpartition("/")
            if not name or base.endswith(("/", ":")):
                raise MarbleError(f'reward "{reward}": must name a reward, like http://host:8420/NAME')
            reward, url = unquote(name), [base]
        if retries < 0:
            raise MarbleError(f'reward "{reward}": settings.retries must be at least 0, got {retries}')
        if answer_within <= 0:
            raise MarbleError(f'reward "{reward}": settings.answer_within must be positive, got {answer_within}')
        self.name = self.served = reward
        self.urls = [check_url(each, f'reward "{reward}": url') for each in url]
        self.retries, self.answer_within = retries, answer_within
        self._servers: list[Server] = []
        self._known: Served | None = None
        self._turn = itertools.count()
        self._lock = threading.Lock()
        self._applies: dict[Record, bool] = {}
        self._guess: tuple[object, ...] | None = None  # how images were cut when no server could be asked

    def check(self) -> None:
        """Ask every server what it serves.

        Raises:
            MarbleError: one does not answer, refuses, has no such reward, or another revision of it than the others.
        """
        servers = self._connect()
        for server in servers:
            server.rests_until = 0.0
        found = [self._look([server]) for server in servers]
        for url, one in zip(self.urls[1:], found[1:], strict=True):
            if one != found[0]:
                raise MarbleError(f"{url} serves another one than {self.urls[0]}: {one} and not {found[0]}")
        self._learn(found[0])

    def prepare(self) -> None:
        """As `check`, once: a server that is away later on is no reason to stop.

        Raises:
            MarbleError: as `check`.
        """
        if self._known is None:
            self.check()

    def applies(self, record: Record) -> bool:
        """What the server's reward says; `applies_to` asks for many at once."""
        return self.applies_to([record])[0]

    def applies_to(self, records: Sequence[Record]) -> list[bool]:
        """What the server's reward says, remembered. True if no server answers: the scores will be missing then."""
        unknown = [record for record in dict.fromkeys(records) if record not in self._applies]
        self._guess = None
        try:
            if unknown or self._known is None:
                self._reach()
            for start in range(0, len(unknown), PIECE):
                piece = unknown[start : start + PIECE]
                body = wire.pack({"reward": self.served, "records": wire.pack_records(piece)})
                flags = self._ask("/applies", body, functools.partial(_flags, count=len(piece)))
                self._applies |= zip(piece, flags, strict=True)
        except MarbleError as error:
            self._guess = self._manner() if self._known is None else None
            log.warning("reward %s: taken to apply to every prompt, as nothing else is known: %s", self.name, error)
        return [self._applies.get(record, True) for record in records]

    def score(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """What a server answers, `[N]` float64.

        Raises:
            MarbleError: none does, or not for these images, or the reward there is another one by now.
        """
        self._reach()
        if self._guess not in (None, self._manner()):
            raise MarbleError(f"{self.urls[0]} could not be asked before, and wants other portions than these")
        body = wire.pack_request(self.served, images, records)
        digest = hashlib.sha256(body).hexdigest()
        return self._ask("/score", body, lambda response: self._read(response, digest, len(images)))

    def _manner(self) -> tuple[object, ...]:
        return self.groupwise, self.judges_videos, self.batch

    def _ask(self, path: str, body: bytes, read: Any) -> Any:
        servers = self._connect()
        first = next(self._turn) % len(servers)
        return ask(
            servers[first:] + servers[:first],
            "POST",
            path,
            body,
            read=read,
            retries=self.retries,
            within=0.9 * self.timeout,  # before whoever waits for it gives up
            answer_within=self.answer_within,
            advice=_ADVICE,
        )

    def _read(self, response: httpx.Response, digest: str, count: int) -> Tensor:
        answer = _json(response)
        if answer.get("digest") != digest or answer.get("reward") != self.served:
            raise RefusedError(f"{response.url} answered another request than the one it was sent")
        if answer.get("revision") != self.revision:
            raise RefusedError(
                f'{response.url} serves revision "{answer.get("revision")}" by now and no longer "{self.revision}"; '
                "scores of both cannot be compared"
            )
        try:
            return wire.unpack_scores(answer.get("scores"), count)
        except wire.WireError as error:
            raise RefusedError(f"{response.url}: {error}") from error

    def _connect(self) -> list[Server]:
        """The servers; connections are made on first use, with the settings that hold then."""
        with self._lock:
            if not self._servers:
                token = os.environ.get(TOKEN, "").strip() or None
                if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
                    raise MarbleError(f"{TOKEN}: a token is of ASCII letters, digits and signs, without spaces")
                for url in self.urls:
                    _warn_if_open(url, token)
                self._servers = [Server(url, token=token, connections=max(self.workers, 1)) for url in self.urls]
            return self._servers

    def _reach(self) -> None:
        """First contact with any server."""
        if self._known is None:
            self._learn(self._look(self._connect()))

    def _look(self, servers: Sequence[Server]) -> Served:
        within = min(30.0, self.answer_within)
        return ask(
            servers,
            "GET",
            "/rewards",
            read=self._find,
            retries=min(self.retries, 1),
            within=within,
            answer_within=within,
            advice=_ADVICE,
        )

    def _find(self, response: httpx.Response) -> Served:
        rows = _json(response).get("rewards")
        try:
            named = {name: row for row in reversed(rows or []) for name in (row["served_as"], row["name"])}
            if self.served not in named:
                known = [row["name"] for row in rows or []]
                raise RefusedError(
                    f'{response.url.join("/")} serves no reward "{self.served}".{nearest(self.served, known)} '
                    f"It serves: {', '.join(known) or 'none'}"
                )
            row = named[self.served]
            flags = bool(row["groupwise"]), bool(row["judges_videos"]), bool(row["cached"])
            return Served(*flags, int(row["batch"]), str(row["revision"]), str(row["about"]))
        except (KeyError, TypeError, ValueError) as error:
            raise RefusedError(f"{response.url} is no marble server, or one of another version") from error

    def _learn(self, served: Served) -> None:
        self.groupwise, self.judges_videos, self.cached = served.groupwise, served.judges_videos, served.cached
        self.revision, self.about = served.revision, served.about or type(self).about
        if "batch" not in self.settings:
            self.batch = served.batch
        self._known = served


def server_url(url: str, name: str) -> str:
    """What a config calls the reward `name` of the server at `url`."""
    return f"{url.rstrip('/')}/{quote(name, safe=':')}"


def _flags(response: httpx.Response, count: int) -> list[bool]:
    flags = _json(response).get("applies")
    if not isinstance(flags, list) or len(flags) != count or not all(isinstance(flag, bool) for flag in flags):
        raise RefusedError(f"{response.url} did not say of {count} prompts whether the reward applies")
    return flags


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        return wire.unpack(response.content)
    except wire.WireError as error:
        raise UnansweredError(f"{response.url} answered with no JSON") from error


def _warn_if_open(url: str, token: str | None) -> None:
    parsed = httpx.URL(url)
    if token and parsed.scheme == "http" and not is_loopback(parsed.host) and parsed.host not in _warned:
        _warned.add(parsed.host)
        log.warning("%s: the token and all images travel to %s unencrypted; use https or a tunnel", TOKEN, parsed.host)
