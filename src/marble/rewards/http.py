"""Asking servers over HTTP: connections that are kept, tries again after growing pauses, errors that say what to do.

A server that cannot be reached or fails is tried again `retries` times. One that says it is busy lives: it is asked
again until the time is over. One that has taken a question and not answered in time may still be at work on it, so it
is not sent the same again.
"""

from __future__ import annotations

import ipaddress
import logging
import random
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import httpx

from marble.errors import MarbleError

log = logging.getLogger("marble")

CONNECT = 5.0
"""Seconds that a connection may take."""
PAUSE = 0.5
"""Seconds before the second try, about; doubled for each further one."""
LONGEST_PAUSE = 30.0
"""Seconds that a server's Retry-After is followed."""
LONGEST_OWN_PAUSE = 8.0
"""Seconds between two questions to a busy server, about, if it does not ask for more."""
REST = 10.0
"""Seconds for which servers that never answered are not asked again, so that what waits fails at once."""

Answer = TypeVar("Answer")


class RefusedError(MarbleError):
    """An answer that asking again would not change."""


class UnansweredError(MarbleError):
    """No answer, or none for now."""

    def __init__(
        self, message: str, *, busy: bool = False, pause: float = 0.0, silent: bool = False, taken: bool = False
    ) -> None:
        """Worth another try.

        Args:
            message: for the user.
            busy: the server lives and asks to come again.
            pause: after how many seconds.
            silent: nothing came at all.
            taken: the server may still be working on an answer.
        """
        super().__init__(message)
        self.busy, self.pause, self.silent, self.taken = busy, pause, silent, taken


class Server:
    """One server, by its base URL."""

    def __init__(self, url: str, *, token: str | None = None, connections: int = 4) -> None:
        """`token` is sent as a bearer's, and nowhere but in that header."""
        self.url = url
        self.failed = 0.0  # time.monotonic of its last failure, 0 if it has answered since
        self.rests_until = 0.0
        self.reason = ""
        parsed = httpx.URL(url)
        local = is_loopback(parsed.host)
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            limits=httpx.Limits(
                max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=30
            ),
            trust_env=not local,  # a proxy cannot reach this machine's own servers
            verify=httpx.create_ssl_context() if parsed.scheme == "https" else False,  # slow, and http has none
        )
        weakref.finalize(self, self._client.close)

    def send(self, method: str, path: str, content: bytes | None, seconds: float, wait: float) -> httpx.Response:
        """One try: at most `seconds` of silence, after at most `wait` seconds for a free connection.

        Raises:
            UnansweredError: nothing came.
        """
        timeout = httpx.Timeout(seconds, connect=min(CONNECT, seconds), pool=wait)
        headers = {} if content is None else {"Content-Type": "application/json"}
        try:
            return self._client.request(method, self.url + path, content=content, headers=headers, timeout=timeout)
        except httpx.ReadTimeout as error:  # the question is there
            raise UnansweredError(
                f"{self.url} did not answer in time, and may still be at work", silent=True, taken=True
            ) from error
        except httpx.RequestError as error:
            text = str(error) or "no answer in time"
            raise UnansweredError(f"{self.url} does not answer: {type(error).__name__}: {text}", silent=True) from error


def ask(
    servers: Sequence[Server],
    method: str,
    path: str,
    content: bytes | None = None,
    *,
    read: Callable[[httpx.Response], Answer],
    retries: int,
    within: float,
    answer_within: float | None = None,
    advice: Mapping[int, str] | None = None,
) -> Answer:
    """Ask one server after the other until one answers, then those again whose pause is over.

    Args:
        servers: in the order to ask; those that failed lately come last.
        method: GET or POST.
        path: after the base URL.
        content: the body, JSON.
        read: makes something of an answer of status 200; its `RefusedError` means that this server is not asked again.
        retries: how often a server is asked again that could not be reached or failed. Being busy (429 or 503 with
            Retry-After) does not count.
        within: seconds in all.
        answer_within: seconds that one answer may take; what is left of `within`, shared by the servers, if not given.
        advice: what to add to the message of a refusal, by status.

    Raises:
        MarbleError: the last server's reason.
    """
    deadline = time.monotonic() + within
    if all(server.rests_until > time.monotonic() for server in servers):
        raise UnansweredError(servers[0].reason, silent=True)
    left = sorted(servers, key=lambda server: time.monotonic() - server.failed < REST if server.failed else False)
    until = dict.fromkeys(left, 0.0)  # of time.monotonic: not asked before
    failures, waits = dict.fromkeys(left, 0), dict.fromkeys(left, 0)
    silent: set[Server] = set()
    problem: MarbleError = UnansweredError(f"{servers[0].url} was not asked")
    while left:
        ready = [server for server in left if until[server] <= time.monotonic()]
        if not ready:
            wake = min(until[server] for server in left)
            if wake >= deadline - (PAUSE if any(waits.values()) else 0.0):  # too late to be answered
                break
            time.sleep(max(0.0, wake - time.monotonic()))
        for server in ready:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                left.clear()
                break
            own = answer_within or remaining / len(left)  # one that hangs leaves the others their time
            try:
                response = server.send(method, path, content, min(own, remaining), remaining)
                _check_status(server.url, path, response, advice or {})
                answer = read(response)
            except RefusedError as error:
                problem, server.failed = error, time.monotonic()
                left.remove(server)
            except UnansweredError as error:
                problem, now = error, time.monotonic()
                jitter = random.uniform(0.5, 1.5)
                if error.busy:
                    own = min(PAUSE * 2 ** min(waits[server], 10), LONGEST_OWN_PAUSE, max(PAUSE, (deadline - now) / 2))
                    until[server] = now + max(own * jitter, error.pause * random.uniform(1, 1.2))
                    waits[server] += 1
                    continue
                until[server] = now + PAUSE * 2 ** failures[server] * jitter
                failures[server] += 1
                server.failed, server.reason = now, str(error)
                (silent.add if error.silent else silent.discard)(server)
                if error.taken or failures[server] > retries:
                    left.remove(server)
            else:
                server.failed = server.rests_until = 0.0
                return answer
    if isinstance(problem, UnansweredError) and problem.silent:
        for server in silent:
            server.rests_until = time.monotonic() + REST
    raise problem


def _check_status(url: str, path: str, response: httpx.Response, advice: Mapping[int, str]) -> None:
    status = response.status_code
    if status == 200:
        return
    message = f"{url}{path} answered {status}: {_reason(response)}{advice.get(status, '')}"
    if status == 429 or status >= 500:
        busy = status in (429, 503) and "Retry-After" in response.headers
        raise UnansweredError(message, busy=busy, pause=_retry_after(response), taken=status == 504)
    raise RefusedError(message)


def _reason(response: httpx.Response) -> str:
    """One line of what a server says of an error, in the ways that are usual."""
    if response.is_redirect:
        return "a redirect, which is not followed"
    try:
        said: Any = response.json()
    except (ValueError, RecursionError):
        said = response.text
    if isinstance(said, dict):
        said = said.get("error") or said.get("message") or said.get("detail") or ""
    if isinstance(said, dict):
        said = said.get("message", "")
    lines = str(said).strip().splitlines()
    return lines[0][:300] if lines else response.reason_phrase


def _retry_after(response: httpx.Response) -> float:
    try:
        return min(max(float(response.headers.get("Retry-After", 0)), 0.0), LONGEST_PAUSE)
    except ValueError:  # a date
        return 0.0


def check_url(url: str, where: str) -> str:
    """`url` without a slash at its end.

    Raises:
        MarbleError: it is no URL of a server, or has a password in it.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise MarbleError(f'{where}: "{url}" is no URL: {error}') from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise MarbleError(f'{where}: must be like http://host:8420, got "{url}"')
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise MarbleError(f"{where}: no name, password, query or fragment belongs in the URL of {parsed.host}")
    return url.rstrip("/")


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine under a name that no other has."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


_warned: set[str] = set()


def warn_if_open(url: str, secret: str | None, variable: str | None) -> None:
    """Warn, once a host, if a secret from the environment `variable` would travel to it unencrypted."""
    parsed = httpx.URL(url)
    if secret and parsed.scheme == "http" and not is_loopback(parsed.host) and parsed.host not in _warned:
        _warned.add(parsed.host)
        log.warning(
            "%s: what it holds and all images travel to %s unencrypted; use https or a tunnel", variable, parsed.host
        )
