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
from urllib.parse import unquote

import httpx
import torch
from torch import Tensor

from marble.errors import MarbleError, nearest
from marble.prompts import Record
from marble.registry import is_url
from marble.rewards import wire
from marble.rewards.base import Reward
from marble.rewards.http import RefusedError, Server, UnansweredError, ask, check_url, warn_if_open
from marble.rewards.load import MOST

log = logging.getLogger("marble")

TOKEN = "MARBLE_TOKEN"
"""Environment variable: what lets this process in, sent as a bearer token."""
PIECE = 1000
"""Prompts in one question of what applies, or as many as fit."""


@dataclass(frozen=True)
class Served:
    """What a server says of one of its rewards."""

    name: str
    needs_prompt: bool
    groupwise: bool
    judges_videos: bool
    cached: bool
    batch: int
    revision: str
    about: str
    accuracy_above: float | None = None


class Remote(Reward):
    """A reward that one or several servers judge.

    What decides how images are cut into portions (`groupwise`, `batch`) comes from the server, so it must have been
    asked before: `check` does, or else the first question of what applies. A batch in the settings is kept.

    Settings of its own: `retries` (3), how often a server is tried again that cannot be reached or fails; a busy one is
    asked until the reward's `timeout` is over. `answer_within` (as long as `timeout` lets it), seconds after which a
    portion goes to the next server instead; never to the same one, which may still be judging it. `token_variable`
    (`MARBLE_TOKEN`), the environment variable with the token of these servers; every server that a reward names is sent
    it, so servers of different owners want different ones. Empty: no token is sent.
    """

    name = "remote"
    about = "a reward on a server started by marble serve"
    workers = 4  # connections, each with a portion under way

    def __init__(
        self,
        reward: str,
        url: list[str],
        *,
        retries: int = 3,
        answer_within: float | None = None,
        token_variable: str = TOKEN,
    ) -> None:
        """As a config names it.

        Args:
            reward: `http://host:8420/NAME`, or NAME with `url`.
            url: `http://host:8420`, one or several servers of the same reward.
            retries: how often a server is tried again that cannot be reached or fails, after growing pauses.
            answer_within: seconds for one answer; what `timeout` leaves, if not given.
            token_variable: environment variable with the servers' token; empty for none.

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
        if answer_within is not None and answer_within <= 0:
            raise MarbleError(f'reward "{reward}": settings.answer_within must be positive, got {answer_within}')
        self.name = self.served = reward
        self.urls = [check_url(each, f'reward "{reward}": url') for each in url]
        self.retries, self.answer_within, self.token_variable = retries, answer_within, token_variable
        self._servers: list[Server] = []
        self._known: Served | None = None
        self._turn = itertools.count()
        self._lock = threading.Lock()
        self._applies: dict[Record, bool] = {}
        self._guessed: set[Record] = set()  # taken to apply while no server could be asked
        self._others: set[str] = set()  # servers of another revision, warned of
        self._guess: tuple[object, ...] | None = None  # how images were cut when no server could be asked

    def check(self) -> None:
        """Ask every server what it serves; those that do not answer are left for later, with a warning, if one does.

        Raises:
            MarbleError: none answers, one refuses, has no such reward, or another revision of it than the others.
        """
        found: dict[str, Served] = {}
        absent: list[UnansweredError] = []
        for server in self._connect():
            server.rests_until = 0.0
            try:
                found[server.url] = self._look([server])
            except UnansweredError as error:
                absent.append(error)
        if not found:
            raise absent[0]
        (url, served), *others = found.items()
        for other, one in others:
            if one != served:
                raise MarbleError(f"{other} serves another one than {url}: {one} and not {served}")
        self._learn(served)
        for lost in absent:
            log.warning("reward %s: going on with %s alone for now: %s", self.name, ", ".join(found), lost)

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
                self._ask_what_applies(unknown[start : start + PIECE])
        except MarbleError as error:
            self._guess = self._manner() if self._known is None else None
            self._guessed |= {record for record in unknown if record not in self._applies}
            log.warning("reward %s: taken to apply to every prompt, as nothing else is known: %s", self.name, error)
        return [self._applies.get(record, True) for record in records]

    def _ask_what_applies(self, records: list[Record]) -> None:
        """Remember it of `records`."""
        body = wire.pack({"reward": self.served, "records": wire.pack_records(records)})
        if len(body) > wire.MOST_JSON and len(records) > 1:
            middle = len(records) // 2
            self._ask_what_applies(records[:middle])
            self._ask_what_applies(records[middle:])
            return
        flags = self._ask("/applies", body, functools.partial(_flags, count=len(records)))
        self._applies |= zip(records, flags, strict=True)
        self._guessed -= set(records)

    def score(self, images: Tensor, records: Sequence[Record]) -> Tensor:
        """What a server answers, `[N]` float64; NaN for prompts that turn out not to be the reward's.

        Raises:
            MarbleError: none does, or not for these images, or the reward there is another one by now.
        """
        self._reach()
        if self._guess not in (None, self._manner()):
            raise MarbleError(f"{self.urls[0]} could not be asked before, and wants other portions than these")
        if guessed := [record for record in dict.fromkeys(records) if record in self._guessed]:
            self._ask_what_applies(guessed)
        fit = [at for at, record in enumerate(records) if self._applies.get(record, True)]
        if len(fit) == len(records):
            return self._judged(images, records)
        log.warning(
            "reward %s: no score for %d of %d images: it does not apply to their prompts, of which no server could be "
            "asked before",
            self.name,
            len(records) - len(fit),
            len(records),
        )
        scores = torch.full((len(records),), torch.nan, dtype=torch.float64)
        if fit:
            scores[fit] = self._judged(images[fit], [records[at] for at in fit])
        return scores

    def _judged(self, images: Tensor, records: Sequence[Record]) -> Tensor:
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
            advice=self._advice(),
        )

    def _read(self, response: httpx.Response, digest: str, count: int) -> Tensor:
        answer = _json(response)
        if answer.get("digest") != digest or answer.get("reward") != self.served:
            raise RefusedError(f"{response.url} answered another request than the one it was sent")
        if answer.get("revision") != self.revision:
            problem = (
                f'{response.url} serves revision "{answer.get("revision")}" by now and no longer "{self.revision}"; '
                "scores of both cannot be compared"
            )
            if len(self.urls) > 1 and str(response.url) not in self._others:  # or another's answer would hide it
                self._others.add(str(response.url))
                log.warning("reward %s: %s, so this server is left out", self.name, problem)
            raise RefusedError(problem)
        try:
            return wire.unpack_scores(answer.get("scores"), count)
        except wire.WireError as error:
            raise RefusedError(f"{response.url}: {error}") from error

    def _connect(self) -> list[Server]:
        """The servers; connections are made on first use, with the settings that hold then."""
        with self._lock:
            if not self._servers:
                token = self._token()
                for url in self.urls:
                    warn_if_open(url, token, self.token_variable)
                self._servers = [Server(url, token=token, connections=max(self.workers, 1)) for url in self.urls]
            return self._servers

    def _token(self) -> str | None:
        token = os.environ.get(self.token_variable, "").strip() if self.token_variable else ""
        if not token:
            if self.token_variable not in ("", TOKEN):
                raise MarbleError(f"settings.token_variable: the environment variable {self.token_variable} is not set")
            return None
        if not (token.isascii() and token.isprintable() and " " not in token):
            raise MarbleError(f"{self.token_variable}: a token is of ASCII letters, digits and signs, without spaces")
        return token

    def _advice(self) -> dict[int, str]:
        return {
            401: f"; the server wants its token in the environment variable {self.token_variable or TOKEN}"
            + ("" if self.token_variable else ", to be named in settings.token_variable"),
            413: "; give the server a larger --max-megabytes, or the reward a smaller settings.batch (here and where "
            "it is judged locally: the last bits depend on it)",
        }

    def _reach(self) -> None:
        """First contact with any server."""
        if self._known is None:
            self._learn(self._look(self._connect()))

    def _look(self, servers: Sequence[Server]) -> Served:
        within = min(30.0, self.answer_within or self.timeout)
        return ask(
            servers,
            "GET",
            "/rewards",
            read=self._find,
            retries=min(self.retries, 1),
            within=within,
            advice=self._advice(),
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
            if not 1 <= int(row["batch"]) <= MOST["batch"]:
                raise RefusedError(f"{response.url} wants portions of {row['batch']}")
            told = str(row["name"]), bool(row.get("needs_prompt", True))
            flags = bool(row["groupwise"]), bool(row["judges_videos"]), bool(row["cached"])
            above = None if row.get("accuracy_above") is None else float(row["accuracy_above"])
            return Served(*told, *flags, int(row["batch"]), str(row["revision"]), str(row["about"]), above)
        except (KeyError, TypeError, ValueError) as error:
            raise RefusedError(f"{response.url} is no marble server, or one of another version") from error

    def _learn(self, served: Served) -> None:
        self.groupwise, self.judges_videos, self.cached = served.groupwise, served.judges_videos, served.cached
        self.revision, self.about = served.revision, served.about or type(self).about
        self.needs_prompt, self.accuracy_above = served.needs_prompt, served.accuracy_above
        if "batch" not in self.settings:
            self.batch = served.batch
        if "name" not in self.settings:
            self.name = served.name  # as it would be called here
        self._known = served


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
