"""Asking servers over HTTP: connections that are kept, tries again after growing pauses, errors that say what to do."""

from __future__ import annotations

import ipaddress
import random
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import httpx

from marble.errors import MarbleError

CONNECT = 5.0
"""Seconds that a connection may take."""
PAUSE = 0.5
"""Seconds before the second try, about; doubled for each further one."""
LONGEST_PAUSE = 30.0
"""Seconds that a server's Retry-After is followed."""
REST = 10.0
"""Seconds for which servers that never answered are not asked again, so that what waits fails at once."""

Answer = TypeVar("Answer")


class RefusedError(MarbleError):
    """An answer that asking again would not change."""


class UnansweredError(MarbleError):
    """No answer, or none for now; `pause` is what the server asks for, `silent` whether nothing came at all."""

    def __init__(self, message: str, *, pause: float = 0.0, silent: bool = False) -> None:
        """Worth another try."""
        super().__init__(message)
        self.pause, self.silent = pause, silent


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
    answer_within: float,
    advice: Mapping[int, str] | None = None,
) -> Answer:
    """Ask one server after the other until one answers, then all of them again, up to `retries` times.

    Args:
        servers: in the order to ask; those that failed lately come last.
        method: GET or POST.
        path: after the base URL.
        content: the body, JSON.
        read: makes something of an answer of status 200; its `RefusedError` means that this server is not asked again.
        retries: rounds after the first.
        within: seconds in all.
        answer_within: seconds that one answer may take.
        advice: what to add to the message of a refusal, by status.

    Raises:
        MarbleError: the last server's reason.
    """
    deadline = time.monotonic() + within
    if all(server.rests_until > time.monotonic() for server in servers):
        raise UnansweredError(servers[0].reason, silent=True)
    left = sorted(servers, key=lambda server: time.monotonic() - server.failed < REST if server.failed else False)
    problem: MarbleError = UnansweredError(f"{servers[0].url} was not asked")
    for turn in range(1 + retries):
        pause = PAUSE * 2**turn * random.uniform(0.5, 1.5)
        for server in list(left):
            remaining = max(deadline - time.monotonic(), 0.001)
            try:
                response = server.send(method, path, content, min(answer_within, remaining), remaining)
                _check_status(server.url, path, response, advice or {})
                answer = read(response)
            except RefusedError as error:
                problem = error
                left.remove(server)
                continue
            except UnansweredError as error:
                problem, server.failed, server.reason = error, time.monotonic(), str(error)
                pause = max(pause, error.pause)
                continue
            server.failed = server.rests_until = 0.0
            return answer
        if not left or turn == retries or time.monotonic() + pause >= deadline:
            break
        time.sleep(pause)
    if isinstance(problem, UnansweredError) and problem.silent:
        for server in left:
            server.rests_until = time.monotonic() + REST
    raise problem


def _check_status(url: str, path: str, response: httpx.Response, advice: Mapping[int, str]) -> None:
    status = response.status_code
    if status == 200:
        return
    message = f"{url}{path} answered {status}: {_reason(response)}{advice.get(status, '')}"
    if status == 429 or status >= 500:
        raise UnansweredError(message, pause=_retry_after(response))
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
