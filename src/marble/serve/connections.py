"""Connections, before any token is looked at: how many there may be, and how long one may be silent.

uvicorn bounds neither: whoever opens connections and says nothing would keep them, until the process may open no more
files and nobody else gets in.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections import Counter
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST = 1024
"""Connections in all, if the system lets the process open twice as many files."""
SHARE = 2
"""An address may have the `SHARE`th part of them."""
SPEAKING = 10.0
"""Seconds in which the head of a request must have come, from its first byte or from the connection's beginning."""


class Connections:
    """Those that are open. Where there is no room, one without a request under way makes some, the oldest first."""

    def __init__(self, most: int) -> None:
        """At most `most`."""
        self.most, self.most_each = most, max(1, most // SHARE)
        self.every: set[Guarded] = set()
        self.by_address: Counter[str] = Counter()
        self.idle: tuple[dict[Guarded, None], dict[Guarded, None]] = {}, {}  # that have asked nothing yet, and others

    def enter(self, connection: Guarded) -> bool:
        """Whether there is room, now at least."""
        if self.by_address[connection.address] >= self.most_each:
            self._turn_out(connection.address)
        elif len(self.every) >= self.most:
            self._turn_out(None)
        if self.by_address[connection.address] >= self.most_each or len(self.every) >= self.most:
            return False
        self.every.add(connection)
        self.by_address[connection.address] += 1
        self.idle[0][connection] = None
        return True

    def busy(self, connection: Guarded) -> None:
        """A request is under way."""
        for some in self.idle:
            some.pop(connection, None)

    def rest(self, connection: Guarded) -> None:
        """It has been answered."""
        if connection in self.every:
            self.idle[1][connection] = None

    def leave(self, connection: Guarded) -> None:
        """It is closed."""
        self.busy(connection)
        if connection in self.every:
            self.every.remove(connection)
            self.by_address[connection.address] -= 1
            if not self.by_address[connection.address]:
                del self.by_address[connection.address]

    def _turn_out(self, address: str | None) -> None:
        for some in self.idle:
            for connection in some:
                if address in (None, connection.address):
                    self.leave(connection)
                    connection.transport.abort()
                    return


class Guarded(H11Protocol):
    """uvicorn's connection, counted, and closed if the head of a request does not come in time."""

    def __init__(self, *arguments: Any, book: Connections, **named: Any) -> None:
        """`book` is that of all connections, the rest is uvicorn's."""
        super().__init__(*arguments, **named)
        self.book, self.address, self.entered = book, "", False
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """By the event loop."""
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if peer else ""
        if not self.book.enter(self):
            transport.abort()
            return
        self.entered = True
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        """By the event loop."""
        if not self.entered or self.transport.is_closing():
            return
        super().data_received(data)
        self._expect()

    def on_response_complete(self) -> None:
        """By uvicorn."""
        super().on_response_complete()  # may begin with the next request, if it is there
        if not self._under_way():
            self.book.rest(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """By the event loop."""
        self.book.leave(self)
        self._forget()
        if self.entered:
            super().connection_lost(exc)

    def _under_way(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect(self) -> None:
        if self._under_way():
            self.book.busy(self)
            self._forget()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(SPEAKING, self._close)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _close(self) -> None:
        self._deadline = None
        if not self._under_way():
            self.transport.abort()


def room() -> int:
    """How many connections there may be: half of the files that the process may open, up to `MOST`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MOST if hard == resource.RLIM_INFINITY else min(2 * MOST, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (OSError, ValueError):  # some systems allow less than they say
            logging.getLogger("marble").debug("at most %d files", soft)
    return MOST if soft == resource.RLIM_INFINITY else max(1, min(MOST, soft // 2))


class Rarely(logging.Filter):
    """Lets through one line of a kind in `SECONDS`, without its traceback: what strangers can cause fills no disk."""

    SECONDS = 60.0
    KINDS = 100

    def __init__(self) -> None:
        """Nothing seen yet."""
        super().__init__()
        self._seen: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is let through."""
        kind = str(record.msg).split("\n")[0][:100]
        if time.monotonic() - self._seen.get(kind, -self.SECONDS) < self.SECONDS:
            return False
        if len(self._seen) >= self.KINDS:
            self._seen.clear()
        self._seen[kind] = time.monotonic()
        record.msg, record.args = record.getMessage().split("\n")[0][:300].replace("%", "%%"), None
        record.exc_info = record.exc_text = record.stack_info = None
        return True
